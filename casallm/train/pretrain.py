"""The pretraining stage: from what a person asked for to settings, shards and batches.

Settings are laid over each other: the preset or the shape of `params`, what the run's own
config.yaml says when it exists, then what was said on the command line.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from casallm.config import Tree, build, merge, parse_overrides, to_tree
from casallm.data.loader import PretrainLoader
from casallm.data.prepare import load_or_prepare
from casallm.data.progress import say_progress
from casallm.data.shards import Dataset, open_dataset
from casallm.data.sources import BUILTIN, source_name
from casallm.data.tokenizer import Tokenizer
from casallm.errors import ConfigError
from casallm.estimate.architecture import count_params, shape_for_params
from casallm.evals.bigram import dataset_bigram_loss
from casallm.storage.store import Store
from casallm.train.distributed import World
from casallm.train.evaluation import Prompt, longest_prompt
from casallm.train.machine import Machine, supports_bf16
from casallm.train.report_loader import dataset_facts
from casallm.train.run import RunConfig, load_preset, require_stage, saved_settings
from casallm.train.run_place import run_url as named_run
from casallm.train.stage import Feed, Material, Start
from casallm.units import format_count, parse_count

log = logging.getLogger(__name__)

TOKENS_PER_PARAM = 20
"""Compute-optimal for a GPT on web text (Hoffmann et al. 2022, arXiv 2203.15556)."""

MAX_EPOCHS = 4
"""Repeating data up to four times is nearly as good as new data (Muennighoff et al. 2023)."""

N_PROMPTS = 3
PROMPT_TOKENS = 12
PROMPT_SEARCH_TOKENS = 100_000


@dataclass(frozen=True)
class PretrainRequest:
    """What a person asked for; empty means: decide for me."""

    start: Start = field(default_factory=Start)
    preset: str | None = None
    params: str | None = None
    data: str | None = None
    tokens: str | None = None

    def run_url(self, machine: Machine) -> str:
        """Where the run lives: as asked, else `runs/<preset or size>-<data>`."""
        if self.start.run:
            return named_run(self.start.run)
        size = self.params or self.preset or choose_preset(machine)
        return named_run(f"{size.lower()}-{source_name(self.data or BUILTIN)}")

    def plan(self, machine: Machine, run: Store) -> RunConfig:
        """All settings of the run; ConfigError names every mistake at once.

        A run that exists keeps its settings, so that the same command always continues it; a
        shape or a setting asked for that differs shows up as a difference in identity.
        """
        if self.preset and self.params:
            raise ConfigError("--preset and --params both choose the size: give one of them")
        size = _size_settings(self, machine)
        asked = parse_overrides(self.start.settings)
        if self.data:
            asked = merge({"data": {"source": self.data}}, asked)
        saved = saved_settings(run)
        if saved is not None:
            require_stage(run, saved[0], "pretrain")
            is_size_asked = self.preset or self.params
            shape = {"model": size["model"]} if is_size_asked else {}
            config = build(RunConfig, merge(saved[0], shape, asked))
        else:
            config = build(RunConfig, merge(_defaults(machine), size, asked))
        if config.train.epochs:
            raise ConfigError("train.epochs is for sft: here --tokens or train.steps say how long")
        if not self.tokens:
            return config
        tokens = parse_count(self.tokens, what="tokens")
        return config.with_steps(math.ceil(tokens / config.tokens_per_step))

    def settle(self, machine: Machine, run: Store) -> tuple[RunConfig, Material]:
        """All settings, checked against the shards, which are made first if need be."""
        config = self.plan(machine, run)
        dataset = prepare_dataset(config)
        if saved_settings(run) is None:
            settings = self.start.settings
            is_asked = bool(self.tokens) or any(s.startswith("train.steps=") for s in settings)
            config = fit_to_data(config, dataset, is_length_asked=is_asked)
        return config, _material(dataset)

    def score(
        self, run: Store, config: RunConfig, material: Material
    ) -> Iterator[tuple[str, Tree]]:
        """A bigram model of the same tokens on the same windows: what has to be beaten."""
        baseline = dataset_bigram_loss(
            open_dataset(material.directory),
            context_length=config.train.context_length,
            n_windows=config.eval.sequences,
        )
        if baseline:
            yield "baseline", asdict(baseline)


def open_feed(directory: Path, config: RunConfig, world: World, micro_batch_size: int) -> Feed:
    """This rank's windows of the shards in `directory`, and beginnings to continue."""
    dataset = open_dataset(directory)
    tokenizer = dataset.tokenizer()
    loader = PretrainLoader(
        dataset,
        context_length=config.train.context_length,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=micro_batch_size,
        rank=world.rank,
        world_size=world.size,
        seed=config.train.seed,
        device=world.device,
    )
    texts = config.eval.prompts or _held_out_beginnings(dataset, tokenizer)
    most = longest_prompt(config.train.context_length)
    prompts = [Prompt(text, (tokenizer.bos_id, *tokenizer.encode(text))[:most]) for text in texts]
    return Feed(loader, tokenizer, prompts)


def choose_preset(machine: Machine) -> str:
    """The largest preset that is sensible here."""
    if machine.device_kind == "cpu":
        return "tiny"
    gib = machine.gpu_memory_bytes / 2**30
    return "350m" if gib > 30 else "124m"


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
    return config.with_steps(most)


def _defaults(machine: Machine) -> Tree:
    return {"train": {"precision": "bf16" if supports_bf16(machine) else "fp32"}}


def _material(dataset: Dataset) -> Material:
    manifest = dataset.manifest
    files = {
        f"tokenizer/{path.name}": path
        for path in sorted((dataset.directory / "tokenizer").iterdir())
    }
    identity = {
        "manifest_sha256": manifest.sha256,
        "tokenizer_fingerprint": manifest.tokenizer.fingerprint,
    }
    return Material(dataset.directory, identity, dataset_facts(manifest), files)


def _held_out_beginnings(dataset: Dataset, tokenizer: Tokenizer) -> list[str]:
    """The first words of three held-out documents: what samples continue unless set."""
    tokens = dataset.shard("val", 0)[:PROMPT_SEARCH_TOKENS]
    starts = np.flatnonzero(tokens == tokenizer.bos_id)[:N_PROMPTS]
    return [
        tokenizer.decode(tokens[start + 1 : start + 1 + PROMPT_TOKENS].tolist()) for start in starts
    ]


def _size_settings(request: PretrainRequest, machine: Machine) -> Tree:
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
