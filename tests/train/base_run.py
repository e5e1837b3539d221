"""A finished pretraining run of a tiny model, made without training, and chats to teach it."""

import json
from pathlib import Path

from casallm.config import build, merge, parse_overrides
from casallm.data.tokenizer import train_tokenizer
from casallm.model.gpt import build_gpt
from casallm.storage.store import Store, open_store
from casallm.train.attempts import claim
from casallm.train.checkpoint import CheckpointConfig, TrainState
from casallm.train.checkpoint_writer import CheckpointWriter
from casallm.train.journal import AttemptLog
from casallm.train.optim import Optimizers
from casallm.train.run import RunConfig, load_preset, save_config
from casallm.train.status import finish
from tests.data.conftest import make_texts

SETTINGS = (
    "model.n_layers=2",
    "model.d_model=32",
    "model.n_heads=2",
    "model.vocab_size=400",
    "optim.lr=2e-3",
    "train.steps=24",
    "train.context_length=128",
    "train.global_batch_size=16",
)


def make_base(
    directory: Path, *, settings: tuple[str, ...] = (), is_finished: bool = True
) -> Store:
    """A run with one checkpoint, at its last step, of weights as they are drawn from the seed."""
    run = open_store(str(directory))
    config = build(RunConfig, merge(load_preset("tiny"), parse_overrides([*SETTINGS, *settings])))
    tokenizer = train_tokenizer(make_texts(200), config.model.vocab_size)
    tokenizer.save(directory / "tokenizer")
    attempt = claim(run, parent=None, started_at=0.0)
    journal = AttemptLog(run, attempt)
    model = build_gpt(config.model, config.train.context_length, seed=config.train.seed)
    writer = CheckpointWriter(
        run,
        attempt,
        journal,
        config=CheckpointConfig(),
        identity_sha256="1d" * 32,
        world_size=1,
        start=None,
        scratch=directory / "scratch",
    )
    state = TrainState(step=config.train.steps)
    writer.save(state, dict(model.named_parameters()), Optimizers(model, config.optim).state())
    writer.wait()
    writer.close()
    journal.close()
    dataset = {"manifest_sha256": "ab" * 32, "tokenizer_fingerprint": tokenizer.fingerprint}
    save_config(run, config, dataset)
    finish(run, attempt, step=config.train.steps, reason="all steps are done")
    return run


def write_recipe(folder: Path, *, n_chats: int = 60) -> Path:
    """A recipe of a file of chats about numbers, and of some that we generate."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"what comes after {n}?"},
                {"role": "assistant", "content": f"{n + 1} comes after {n}" + ", yes" * (n % 5)},
            ]
        }
        for n in range(n_chats)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        "sources:\n  - {path: chats.jsonl}\n  - {generated: greetings, count: 12}\n"
        "identity: {name: Ada}\nvalidation_fraction: 0.1\n"
    )
    return recipe
