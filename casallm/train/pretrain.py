"""The pretraining stage: from what a person asked for to settings, shards and batches.

Settings are laid over each other: the preset or the shape of `params`, what the run's own
config.yaml says when it exists, then what was said on the command line.
"""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from casallm.config import Tree, build, merge, parse_overrides, to_tree
from casallm.data.prepare import Progress, load_or_prepare
from casallm.data.shards import Dataset
from casallm.errors import ConfigError
from casallm.estimate.architecture import count_params, shape_for_params
from casallm.storage.store import Store
from casallm.train.machine import Machine, supports_bf16
from casallm.train.nodes import Place
from casallm.train.run import (
    RunConfig,
    identity_difference,
    identity_of,
    load_preset,
    saved_settings,
)
from casallm.train.run_place import run_url as named_run
from casallm.units import format_bytes, format_count, format_duration, parse_count

log = logging.getLogger(__name__)

TOKENS_PER_PARAM = 20
"""Compute-optimal for a GPT on web text (Hoffmann et al. 2022, arXiv 2203.15556)."""

MAX_EPOCHS = 4
"""Repeating data up to four times is nearly as good as new data (Muennighoff et al. 2023)."""


PREPARE_NEWS_SECONDS = 5.0


@dataclass(frozen=True)
class Request:
    """What a person asked for; empty means: decide for me."""

    run: str | None = None
    preset: str | None = None
    params: str | None = None
    data: str | None = None
    tokens: str | None = None
    ranks: int | None = None
    allow_changes: bool = False
    place: Place = field(default_factory=Place)
    settings: tuple[str, ...] = field(default=())


def choose_preset(machine: Machine) -> str:
    """The largest preset that is sensible here."""
    if machine.device_kind == "cpu":
        return "tiny"
    gib = machine.gpu_memory_bytes / 2**30
    return "350m" if gib > 30 else "124m"


def run_url(request: Request, machine: Machine) -> str:
    """Where the run lives: as asked, else `runs/<preset or size>-<data>`."""
    if request.run:
        return named_run(request.run)
    size = request.params or request.preset or choose_preset(machine)
    data = Path(request.data.rstrip("/")).name.split(".")[0] if request.data else "builtin"
    return named_run(f"{size.lower()}-{data or 'data'}")


def resolve(request: Request, machine: Machine, run: Store) -> RunConfig:
    """All settings of the run; ConfigError names every mistake at once.

    A run that exists keeps its settings, so that the same command always continues it; a shape
    or a setting asked for that differs shows up as a difference in identity.
    """
    if request.preset and request.params:
        raise ConfigError("--preset and --params both choose the size: give one of them")
    size = _size_settings(request, machine)
    asked = parse_overrides(request.settings)
    if request.data:
        asked = merge({"data": {"source": request.data}}, asked)
    saved = saved_settings(run)
    if saved is not None:
        is_size_asked = request.preset or request.params
        shape = {"model": size["model"]} if is_size_asked else {}
        config = build(RunConfig, merge(saved[0], shape, asked))
    else:
        config = build(RunConfig, merge(_defaults(machine), size, asked))
    if not request.tokens:
        return config
    tokens = parse_count(request.tokens, what="tokens")
    return with_steps(config, math.ceil(tokens / config.tokens_per_step))


def with_steps(config: RunConfig, steps: int) -> RunConfig:
    """`config` for a run of this many steps."""
    train = config.train.model_copy(update={"steps": steps})
    return config.model_copy(update={"train": train})


def check_identity(config: RunConfig, dataset: Tree, run: Store) -> list[str]:
    """The differences between `config` and the run's own settings, field by field."""
    saved = saved_settings(run)
    if saved is None:
        return []
    before = identity_of(build(RunConfig, saved[0], where=f"{run.url}/config.yaml"), saved[1])
    return identity_difference(before, identity_of(config, dataset))


def prepare_dataset(config: RunConfig) -> Dataset:
    """The shards of the run's data: opened where they lie, or made from the documents first."""
    dataset = load_or_prepare(
        config.data,
        config.tokenizer,
        vocab_size=config.model.vocab_size,
        on_progress=say_progress(),
    )
    dataset.require_vocab_size(config.model.vocab_size)
    return dataset


def fit_to_data(config: RunConfig, dataset: Dataset, *, is_length_asked: bool) -> RunConfig:
    """`config` with fewer steps where the data would be repeated too often, unless asked for."""
    tokens = dataset.splits["train"].tokens
    most = max(1, MAX_EPOCHS * tokens // config.tokens_per_step)
    if config.train.steps <= most:
        return config
    epochs = config.total_tokens / tokens
    if is_length_asked:
        log.warning(
            "the %s tokens of the data will be repeated %.0f times", format_count(tokens), epochs
        )
        return config
    log.warning(
        "the data has %s tokens: training %s steps (%d epochs) instead of %s (TOKENS= insists)",
        format_count(tokens),
        f"{most:,}",
        MAX_EPOCHS,
        f"{config.train.steps:,}",
    )
    return with_steps(config, most)


def say_progress() -> Callable[[Progress], None]:
    """A listener that says how far tokenizing is, every few seconds."""
    last = time.monotonic()

    def say(progress: Progress) -> None:
        nonlocal last
        if time.monotonic() - last < PREPARE_NEWS_SECONDS:
            return
        last = time.monotonic()
        speed = progress.bytes_of_text / max(progress.seconds, 1e-9)
        left = (progress.text_bytes - progress.bytes_of_text) / max(speed, 1.0)
        log.info(
            "tokenizing: %s documents, %s tokens, %s/s, about %s left",
            format_count(progress.documents),
            format_count(progress.tokens),
            format_bytes(speed),
            format_duration(left),
        )

    return say


def _defaults(machine: Machine) -> Tree:
    return {"train": {"precision": "bf16" if supports_bf16(machine) else "fp32"}}


def _size_settings(request: Request, machine: Machine) -> Tree:
    if not request.params:
        return load_preset(request.preset or choose_preset(machine))
    n_params = parse_count(request.params, what="params")
    shape = shape_for_params(n_params)
    return {"model": to_tree(shape), **_recipe(count_params(shape))}


def _recipe(n_params: int) -> Tree:
    """Length, batch and peak rate for a model of this size.

    The peak rate falls as in GPT-3's Table 2.1 (6e-4 at 125M, 1.2e-4 at 6.7B); the batch is half
    a million tokens at 10B tokens and grows with the length to the power 0.383 (nanochat's fit).
    """
    context_length = 2048 if n_params >= 200e6 else 1024 if n_params >= 20e6 else 256
    tokens = TOKENS_PER_PARAM * n_params
    batch_tokens = 524_288 * (tokens / 10e9) ** 0.383
    global_batch_size = max(8, 2 ** round(math.log2(batch_tokens / context_length)))
    return {
        "optim": {"lr": float(f"{3e-4 * (n_params / 350e6) ** -0.3:.2g}")},
        "train": {
            "steps": math.ceil(tokens / (global_batch_size * context_length)),
            "global_batch_size": global_batch_size,
            "context_length": context_length,
        },
    }
