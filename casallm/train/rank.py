"""`python -m casallm.train.rank DIR`: one rank of one generation, as torchrun starts it.

Reads what to do from the control folder, joins the other ranks, loads the checkpoint, trains,
and leaves word of how it ended. Rank 0 also writes, speaks and decides.
"""

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch

from casallm.config import build
from casallm.errors import CasallmError, CheckpointError, ConfigError, TrainingError
from casallm.estimate.architecture import count_params, flops_per_token
from casallm.estimate.memory import largest_micro_batch
from casallm.model.gpt import GPT, build_gpt
from casallm.storage.store import open_store
from casallm.train import pretrain, sft
from casallm.train.attempts import CheckpointName, read_attempt
from casallm.train.base import open_base
from casallm.train.budget import Purse
from casallm.train.checkpoint import TrainState, fetch, load, load_tensors
from casallm.train.checkpoint_writer import CheckpointWriter
from casallm.train.control import Control, Outcome, Spec, StopRequest, die_with_parent
from casallm.train.distributed import World, broadcast_object, broadcast_tensors, join_world
from casallm.train.journal import AttemptLog
from casallm.train.leader import Leader, Sampler
from casallm.train.machine import Machine
from casallm.train.metrics import Metrics, Sink, Yardstick
from casallm.train.optim import Optimizers
from casallm.train.progress import Progress
from casallm.train.run import RunConfig
from casallm.train.stage import Feed, OpenFeed
from casallm.train.trainer import Trainer
from casallm.train.wandb_mirror import mirror_run_id, open_mirror

OPEN_FEED: dict[str, OpenFeed] = {"pretrain": pretrain.open_feed, "sft": sft.open_feed}

MICRO_BATCH_TOKENS = 16_384
"""The most of one forward pass on a CPU, or on a GPU that is in no table."""


def main(directory: str) -> int:
    """Train as one rank; 0 if the generation ended as planned."""
    die_with_parent()
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("casallm").setLevel(logging.INFO if rank == 0 else logging.ERROR)
    control = Control(Path(directory))
    control.dump_stacks_on_signal(rank)
    _obey_signals(control)
    try:
        _train(control.spec(), control)
    except CasallmError as error:
        control.write_outcome(Outcome("failed", 0, str(error)))
        return 1
    except BaseException as error:  # noqa: BLE001 - the last words of a rank, whatever they are
        control.write_error(rank, error)
        return 1
    return 0


def _train(spec: Spec, control: Control) -> None:
    machine = Machine(**spec.machine)
    world = join_world(machine.device_kind)
    if world.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    config = build(RunConfig, spec.config)
    micro_batch = micro_batch_size(config, machine, world)
    feed = OPEN_FEED[config.stage](Path(spec.data_directory), config, world, micro_batch)
    try:
        outcome = _train_on(feed, spec, config, world, control)
    except torch.OutOfMemoryError as error:
        raise TrainingError(_out_of_memory(error, micro_batch)) from None
    feed.loader.close()
    if world.is_leader:
        control.write_outcome(outcome)


def _train_on(feed: Feed, spec: Spec, config: RunConfig, world: World, control: Control) -> Outcome:
    machine = Machine(**spec.machine)
    model = build_gpt(
        config.model, config.train.context_length, seed=config.train.seed, device=world.device
    )
    optimizers = Optimizers(model, config.optim)
    state = _load_state(spec, config, world, model, optimizers)
    with _leader(spec, config, world, machine, model, feed) as leader:
        trainer = Trainer(
            config=config,
            world=world,
            model=model,
            loader=feed.loader,
            optimizers=optimizers,
            state=state,
            control=control,
            token_bytes_V=torch.from_numpy(feed.tokenizer.token_bytes()).to(world.device),
            observer=leader,
            sources=feed.sources,
        )
        return trainer.run()


def micro_batch_size(config: RunConfig, machine: Machine, world: World) -> int:
    """Sequences of one forward pass: as set, else what fits of this rank's share."""
    if config.train.micro_batch_size:
        return config.train.micro_batch_size
    share = -(-config.train.global_batch_size // world.size)
    most = max(1, MICRO_BATCH_TOKENS // config.train.context_length)
    if machine.device_kind == "cuda" and machine.hardware:
        most = largest_micro_batch(
            config.model,
            config.train.context_length,
            machine.hardware,
            precision=config.train.precision,
            stack="eager" if config.train.compile == "off" else "compiled",
        )
        if not most:
            raise ConfigError(
                f"a model of {count_params(config.model):,} parameters does not fit one"
                f" {machine.device_name}: take a smaller --params or a GPU with more memory"
            )
    n_micro_batches = -(-share // most)
    return -(-share // n_micro_batches)


@torch.no_grad()
def _load_state(
    spec: Spec, config: RunConfig, world: World, model: GPT, optimizers: Optimizers
) -> TrainState:
    """Rank 0 reads and verifies the checkpoint; the others get its tensors one by one.

    A run without one starts from its base, or with the weights that the seed has drawn.
    """
    weights: dict[str, torch.Tensor] = dict(model.named_parameters())
    moments = optimizers.state()
    state = TrainState()
    name = CheckpointName.parse(spec.start_from) if spec.start_from else None
    if name is None and config.base is None:
        return state
    if world.is_leader and name is not None:
        checkpoint = fetch(open_store(spec.run_url), name, Path(spec.scratch))
        state = load(checkpoint, model=weights, optimizer=moments)
    elif world.is_leader and config.base is not None:
        load_tensors(open_base(config.base), "model", weights)
    broadcast_tensors(world, [*weights.values(), *moments.values()])
    return broadcast_object(world, state)


@contextlib.contextmanager
def _leader(
    spec: Spec, config: RunConfig, world: World, machine: Machine, model: GPT, feed: Feed
) -> Iterator[Leader | None]:
    """Rank 0's observer, closed when the training is over; None elsewhere."""
    if not world.is_leader:
        yield None
        return
    run = open_store(spec.run_url)
    attempt = read_attempt(run, spec.attempt)
    if attempt is None:
        raise CheckpointError(f"attempt {spec.attempt} of {run.url} cannot be read: start again")
    journal = AttemptLog(run, attempt)
    progress = Progress(config.train.steps, usd_per_hour=config.budget.usd_per_hour)
    sinks: list[Sink] = [progress]
    mirror = open_mirror(
        config.log.wandb,
        run_id=mirror_run_id(run.url, str(spec.run_started)),
        name=run.url.rstrip("/").rsplit("/", 1)[-1],
        config=spec.config,
        directory=Path(spec.scratch) / "wandb",
    )
    if mirror:
        sinks.append(mirror)
    writer = CheckpointWriter(
        run,
        attempt,
        journal,
        config=config.checkpoint,
        identity_sha256=spec.identity_sha256,
        world_size=world.size,
        start=CheckpointName.parse(spec.start_from) if spec.start_from else None,
        scratch=Path(spec.scratch),
    )
    metrics = Metrics(journal.metric, sinks)
    leader = Leader(
        config=config,
        run=run,
        attempt=attempt,
        journal=journal,
        writer=writer,
        metrics=metrics,
        progress=progress,
        sampler=Sampler(
            feed.tokenizer, feed.prompts, config.train.context_length, config.train.seed
        ),
        model=model,
        purse=Purse(spec.usd_before, spec.billed_since, spec.run_started, config.budget),
        yardstick=Yardstick(
            flops_per_token(config.model, config.train.context_length),
            machine.hardware,
            machine.devices_of(world.size),
        ),
        elapsed_before=spec.elapsed_before,
    )
    try:
        yield leader
    finally:
        leader.close()


def _out_of_memory(error: torch.OutOfMemoryError, micro_batch: int) -> str:
    said = str(error).split(". ")[0]
    if micro_batch == 1:
        return f"the GPU ran out of memory ({said}) with one sequence: take a smaller model"
    return (
        f"the GPU ran out of memory ({said}) with {micro_batch} sequences at a time: add"
        f" train.micro_batch_size={micro_batch // 2}"
    )


def _obey_signals(control: Control) -> None:
    """Let SIGTERM and SIGUSR1 become requests to stop; Ctrl-C is the supervisor's business."""

    def request(number: int, frame: FrameType | None) -> None:
        control.request_stop(StopRequest(signal.Signals(number).name))

    signal.signal(signal.SIGTERM, request)
    signal.signal(signal.SIGUSR1, request)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _leave(code: int) -> NoReturn:
    """End this process at once: no upload that was given up and no other rank holds it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _leave(main(sys.argv[1]))
