"""What a run is: its settings, its identity, and the files at its root.

A run is a directory with a URL. `config.yaml` in it holds three parts: `identity` (what the run
computes: hashed, compared on resume), `execution` (how: free to change) and `dataset` (which
tokens, by hash: part of the identity). Nothing else outside the directory decides what is trained.
"""

import logging
from importlib import resources
from typing import Any, Literal

from pydantic import Field

from casallm.config import (
    Config,
    Tree,
    build,
    merge,
    nearest,
    parse_yaml,
    sha256_of,
    to_tree,
    to_yaml,
)
from casallm.data.recipe import IdentityConfig
from casallm.data.sources import DataConfig
from casallm.data.tokenizer import TokenizerConfig
from casallm.errors import CheckpointError, ConfigError, StoreNotFoundError
from casallm.estimate.architecture import NAMED_SIZES, ModelConfig
from casallm.storage.store import Store
from casallm.train.budget import BudgetConfig
from casallm.train.checkpoint import CheckpointConfig
from casallm.train.metrics import LogConfig
from casallm.train.optim import OptimConfig
from casallm.train.schedule import ScheduleConfig

log = logging.getLogger(__name__)

PRESETS = ("tiny", "124m", "350m", "350m-modern", "1.2b")

IDENTITY: dict[str, tuple[str, ...]] = {
    "stage": (),
    "model": (),
    "optim": (),
    "schedule": (),
    "train": ("steps", "epochs", "global_batch_size", "context_length", "seed", "precision"),
    "identity": (),
}
"""The sections, and of `train` the fields, that decide what a run computes."""


class TrainConfig(Config):
    """How long, in what batches, and how it is computed."""

    steps: int = Field(gt=0)
    """Optimizer steps of the whole run."""
    epochs: int | None = Field(default=None, gt=0)
    """sft: how often each conversation is seen, from which the steps follow; else empty."""
    global_batch_size: int = Field(gt=0)
    """Sequences of one optimizer step, over all ranks."""
    context_length: int = Field(gt=0)
    """Tokens of one sequence."""
    seed: int = Field(default=1337, ge=0)
    """Of the initial weights, the order of the data and the samples."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16: matrix products under autocast, weights and sums in fp32."""
    micro_batch_size: int | None = Field(default=None, gt=0)
    """Sequences of one forward pass of one rank; empty: the most that fits."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto: where a probe finds it works, for runs of 200 steps or more."""
    stall_minutes: float = Field(default=10.0, gt=0)
    """A generation of ranks that takes no step for this long is restarted."""
    notices: Literal["off", "aws", "gcp"] = "off"
    """Whose metadata server is asked for notices of preemption; the launcher says it."""


class EvalConfig(Config):
    """Validation and samples while training."""

    every_steps: int = Field(default=250, gt=0)
    """Steps between evaluations; the last step is always evaluated."""
    sequences: int = Field(default=256, gt=0)
    """Held-out sequences of one evaluation (fewer if there are fewer)."""
    prompts: tuple[str, ...] = ()
    """Beginnings to continue at every evaluation; empty: those of three held-out documents."""


class BaseConfig(Config):
    """Whose weights a run starts from; its identity holds their hash instead."""

    run: str
    """Path or URL of the run."""
    checkpoint: str
    """Which of its checkpoints, such as `step-00000400-a1`."""


class RunConfig(Config):
    """All settings of a run, by section."""

    stage: Literal["pretrain", "sft"] = "pretrain"
    """What is trained on what."""
    base: BaseConfig | None = None
    """Where weights start; empty: they are drawn from the seed."""
    model: ModelConfig
    """Shape."""
    data: DataConfig = DataConfig()
    """Where documents or shards come from."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """How text becomes tokens."""
    optim: OptimConfig = OptimConfig()
    """Optimizer."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning rate over time."""
    train: TrainConfig
    """Length, batch, precision."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When to save and what to keep."""
    eval: EvalConfig = EvalConfig()
    """Validation and samples."""
    log: LogConfig = LogConfig()
    """Metrics and wandb."""
    budget: BudgetConfig = BudgetConfig()
    """Money and time."""
    identity: IdentityConfig | None = None
    """sft: who the assistant says it is; empty elsewhere."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.train.global_batch_size * self.train.context_length

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole run."""
        return self.train.steps * self.tokens_per_step

    def with_steps(self, steps: int) -> "RunConfig":
        """The same settings for a run of this many steps."""
        train = self.train.model_copy(update={"steps": steps})
        return self.model_copy(update={"train": train})


def load_preset(name: str) -> Tree:
    """The settings of preset `name`, its shape included."""
    if name not in PRESETS:
        hint = nearest(name, PRESETS)
        raise ConfigError(f"there is no preset {name!r}{hint} (presets: {', '.join(PRESETS)})")
    text = resources.files("casallm.train").joinpath(f"presets/{name}.yaml").read_text()
    shape = to_tree(NAMED_SIZES[name])
    return merge({"model": shape}, parse_yaml(text, where=f"preset {name}"))


def identity_of(config: RunConfig, dataset: Tree) -> Tree:
    """What the run computes: the identity settings and the hashes of its data."""
    tree = to_tree(config)
    identity: Tree = {}
    for section, fields in IDENTITY.items():
        value = tree[section]
        if value is not None:
            identity[section] = {field: value[field] for field in fields} if fields else value
    return {**identity, "dataset": dataset}


def identity_sha256(config: RunConfig, dataset: Tree) -> str:
    """The hash that every checkpoint of the run carries."""
    return sha256_of(identity_of(config, dataset))


def identity_difference(saved: Tree, current: Tree) -> list[str]:
    """One `path: saved -> current` for each value in which two identities differ."""
    before, after = _flat(saved), _flat(current)
    paths = sorted(before.keys() | after.keys())
    return [
        f"{path}: {before.get(path, '(none)')} -> {after.get(path, '(none)')}"
        for path in paths
        if before.get(path) != after.get(path)
    ]


def changes_of(run: Store, config: RunConfig, dataset: Tree) -> list[str]:
    """The differences between a run's own identity and that of `config`, field by field."""
    saved = saved_settings(run)
    if saved is None:
        return []
    before = identity_of(build(RunConfig, saved[0], where=f"{run.url}/config.yaml"), saved[1])
    return identity_difference(before, identity_of(config, dataset))


def save_config(run: Store, config: RunConfig, dataset: Tree) -> None:
    """Write config.yaml at the root of the run."""
    tree = to_tree(config)
    identity = identity_of(config, dataset)
    execution = {
        section: {key: v for key, v in value.items() if key not in IDENTITY.get(section, ())}
        for section, value in tree.items()
        if value is not None and (section not in identity or section == "train")
    }
    document = {
        "identity": {key: value for key, value in identity.items() if key != "dataset"},
        "dataset": dataset,
        "execution": execution,
    }
    header = (
        "# identity and dataset decide what this run computes: a resume with other values is\n"
        "# refused. execution may change from one attempt to the next.\n"
    )
    run.write("config.yaml", (header + to_yaml(document)).encode())


def load_config(run: Store) -> tuple[RunConfig, Tree]:
    """The settings and the dataset's hashes from config.yaml; CheckpointError if there is none."""
    tree = saved_settings(run)
    if tree is None:
        raise CheckpointError(
            f"{run.url} has no config.yaml, so it is no run: check the name with `casallm runs`"
        )
    settings, dataset = tree
    return build(RunConfig, settings, where=f"{run.url}/config.yaml"), dataset


def saved_settings(run: Store) -> tuple[Tree, Tree] | None:
    """The merged settings and the dataset's hashes of a run's config.yaml, if it has one."""
    try:
        text = run.read("config.yaml").decode("utf-8", "replace")
    except StoreNotFoundError:
        return None
    document = parse_yaml(text, where=f"{run.url}/config.yaml")
    parts = [document.get(key) for key in ("identity", "execution", "dataset")]
    if not all(isinstance(part, dict) for part in parts):
        raise CheckpointError(
            f"{run.url}/config.yaml lacks identity, execution or dataset: restore it, or start"
            " a run of another name"
        )
    identity, execution, dataset = parts
    return merge(identity or {}, execution or {}), dict(dataset or {})


def try_with(stage: str) -> str:
    """What to give `casallm sample` to see what a run of that stage has learned."""
    return "--chat --prompt 'Who are you?'" if stage == "sft" else "--prompt 'The'"


def require_stage(run: Store, settings: Tree, stage: str) -> None:
    """CheckpointError if the run that these are the settings of is of another stage."""
    own = settings.get("stage")
    if own != stage:
        raise CheckpointError(
            f"{run.url} is a run of {own}, not of {stage}: give this one another name with RUN="
        )


def _flat(tree: Tree, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        flat |= _flat(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return flat
