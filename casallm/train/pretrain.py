"""The pretraining stage: from what a person asked for to settings, shards and batches.

Settings are laid over each other: the preset or the shape of `params`, what the run's own
config.yaml says when it exists, then what was said on the command line.
"""

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path

from casallm.config import Tree, build, merge, parse_overrides, to_tree
from casallm.data.prepare import dataset_directory, prepare
from casallm.data.shards import Dataset, is_dataset, open_dataset
from casallm.errors import ConfigError, DataError
from casallm.estimate.architecture import count_params, shape_for_params
from casallm.storage.store import Store
from casallm.train.machine import Machine, supports_bf16
from casallm.train.run import (
    RunConfig,
    identity_difference,
    identity_of,
    load_preset,
    saved_settings,
)
from casallm.units import format_count, parse_count

log = logging.getLogger(__name__)

TOKENS_PER_PARAM = 20
"""Compute-optimal for a GPT on web text (Hoffmann et al. 2022, arXiv 2203.15556)."""

MAX_EPOCHS = 4
"""Repeating data up to four times is nearly as good as new data (Muennighoff et al. 2023)."""


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
    settings: tuple[str, ...] = field(default=())


def choose_preset(machine: Machine) -> str:
    """The largest preset that is sensible here."""
    if machine.device_kind == "cpu":
        return "tiny"
    gib = machine.gpu_memory_bytes / 2**30
    return "350m" if gib > 30 else "124m"


def run_url(request: Request, machine: Machine) -> str:
    """Where the run lives: as asked, else `runs/<preset or size>-<data>`."""
    if request.run and ("/" in request.run or "://" in request.run):
        return request.run
    if request.run:
        return f"runs/{request.run}"
    size = request.params or request.preset or choose_preset(machine)
    data = Path(request.data.rstrip("/")).name.split(".")[0] if request.data else "builtin"
    return f"runs/{size.lower()}-{data or 'data'}"


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
    source = Path(config.data.source)
    directory = (
        source
        if is_dataset(source)
        else dataset_directory(config.data, config.tokenizer, config.model.vocab_size)
    )
    if not is_dataset(directory):
        prepare(config.data, config.tokenizer, config.model.vocab_size, directory)
    dataset = open_dataset(directory)
    if dataset.vocab_size != config.model.vocab_size:
        raise DataError(
            f"model.vocab_size is {config.model.vocab_size} but the shards in {directory} were made"
            f" with {dataset.vocab_size}: train with model.vocab_size={dataset.vocab_size}, or"
            " prepare them again"
        )
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
