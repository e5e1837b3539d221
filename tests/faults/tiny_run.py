"""A run in miniature: the state after a step is a function of the step, saved like a real one."""

from pathlib import Path

import torch
from torch import Tensor

from casallm.storage.store import Store
from casallm.train.attempts import CheckpointName
from casallm.train.checkpoint import (
    Checkpoint,
    CheckpointConfig,
    Decision,
    TrainState,
    load,
)
from casallm.train.checkpoint_writer import CheckpointWriter
from casallm.train.journal import AttemptLog
from casallm.train.resume import start_attempt
from casallm.train.tensor_file import weights_sha256

STEPS = 10
"""Steps between two checkpoints."""


def model_at(step: int) -> dict[str, Tensor]:
    """The weights after `step`; the output matrix is tied to the embedding."""
    generator = torch.Generator().manual_seed(step)
    embedding = torch.randn(6, 4, generator=generator)
    norm = torch.randn(4, generator=generator).bfloat16()
    return {"embedding.weight": embedding, "norm.weight": norm, "output.weight": embedding}


def optimizer_at(step: int) -> dict[str, Tensor]:
    """The optimizer's state after `step`."""
    return {
        "embedding.weight.exp_avg": torch.full((6, 4), step / 7),
        "embedding.weight.step": torch.tensor(float(step)),
    }


def state_at(step: int) -> TrainState:
    """The counts after `step`, and a decision made at its first step."""
    return TrainState(step, 8 * step, 128 * step, (Decision(0, "compile", True),))


def sha256_at(step: int) -> str:
    """What `casallm verify` says of the weights after `step`."""
    return weights_sha256(model_at(step))


def content_of(checkpoint: Checkpoint) -> tuple[TrainState, dict[str, Tensor], dict[str, Tensor]]:
    """What a resuming trainer gets, loaded into tensors of the right shapes."""
    model, optimizer = model_at(-1), optimizer_at(-1)
    return load(checkpoint, model=model, optimizer=optimizer), model, optimizer


def is_right(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint holds exactly the state after its step."""
    step = checkpoint.name.step
    state, model, optimizer = content_of(checkpoint)
    expected = model_at(step) | optimizer_at(step)
    return state == state_at(step) and all(
        torch.equal(tensor, expected[name]) for name, tensor in (model | optimizer).items()
    )


class Session:
    """One start of a run: claims the attempt, continues from the newest good checkpoint."""

    def __init__(self, run: Store, scratch: Path, **config: int) -> None:
        self.run = run
        self.attempt, self.start = start_attempt(run, scratch)
        self.step = self.start.name.step if self.start else 0
        self.journal = AttemptLog(run, self.attempt, publish_every_seconds=None)
        self.writer = CheckpointWriter(
            run,
            self.attempt,
            self.journal,
            config=CheckpointConfig(**config),
            identity_sha256="1d" * 32,
            world_size=1,
            start=self.start.name if self.start else None,
            scratch=scratch,
        )

    def train(self, steps: int = STEPS) -> CheckpointName:
        """Train `steps` more steps and save; returns when the checkpoint is durable."""
        for _ in range(steps):
            self.step += 1
            line = {"step": self.step, "loss": 1 / self.step, "attempt": self.attempt.number}
            self.journal.metric(line)
        self.save()
        self.writer.wait()
        return CheckpointName(self.step, self.attempt.number)

    def save(self) -> None:
        """Stage the state as it is."""
        self.writer.save(state_at(self.step), model_at(self.step), optimizer_at(self.step))

    def close(self) -> None:
        """End as a process does: nothing more is written."""
        self.writer.close()
