"""What is to be trained, as far as money cares: a shape, a length, and where its data come from.

The node settles the run's configuration; this is the same arithmetic without torch, for the plan.
"""

import hashlib
import math
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from casallm.config import Tree, build, merge, nearest, parse_overrides, parse_yaml, to_tree
from casallm.data.sources import source_name
from casallm.errors import ConfigError
from casallm.estimate.architecture import (
    NAMED_SIZES,
    ModelConfig,
    count_params,
    shape_for_params,
)
from casallm.estimate.layout import default_batch_tokens
from casallm.estimate.scaling import tokens_for_params
from casallm.units import format_count, parse_count
from launch.request import DEFAULT_PRESET, LaunchRequest

BUILTIN_TOKENS = 3_770_000
"""Of the built-in corpus, in GPT-2's vocabulary (measured)."""

MAX_EPOCHS = 4
"""The trainer repeats data this often and then shortens the run, unless a length is asked for."""

SFT_TOKENS = 60_000_000
"""Of the default recipe, as `casallm.estimate` counts it."""

_FILES = re.compile(r"[*?\[]|\.(jsonl|parquet|txt)(\.gz|\.zst)?$")
"""What in a URL of a bucket shows that documents are meant, and not a directory of shards."""

DataKind = Literal["builtin", "shards", "documents"]


@dataclass(frozen=True)
class Workload:
    """One run, before it is known where it runs."""

    size: str
    config: ModelConfig
    context_length: int
    batch_tokens: int
    """Tokens of an optimizer step."""
    tokens: int
    data: DataKind
    data_url: str
    """Where its shards are or will be; empty for the built-in corpus."""

    @property
    def n_params(self) -> int:
        """Weights of the model."""
        return count_params(self.config)

    def describe(self) -> str:
        """Model and length in a few words."""
        return (
            f"{self.config.family}, {self.n_params:,} parameters, context {self.context_length:,},"
            f" {format_count(self.tokens)} tokens"
        )


def read_workload(request: LaunchRequest) -> Workload:
    """What `request` asks to train; ConfigError names what is wrong with it."""
    if request.preset and request.params:
        raise ConfigError("PRESET and PARAMS both choose the size: give one of them")
    if request.job == "sft" and not request.start_from:
        raise ConfigError("sft starts from a run: add FROM=s3://BUCKET/NAME (--from)")
    if request.job == "sft" and any(each.startswith("model.") for each in request.settings):
        raise ConfigError("an assistant has the model of its base: leave out SET=model.…")
    if request.start_from and Path(request.start_from).exists():
        raise ConfigError(
            f"FROM={request.start_from} is on this computer, where machines in a cloud cannot read"
            f" it: run `aws s3 sync {request.start_from} s3://BUCKET/NAME`, then launch with"
            " FROM=s3://BUCKET/NAME"
        )
    asked = parse_overrides(request.settings)
    settings = merge(_size_settings(request), asked)
    config = build(ModelConfig, settings["model"], where="settings model")
    context_length = _whole(settings, "context_length")
    batch_tokens = _whole(settings, "global_batch_size") * context_length
    kind, url = _data(request)
    return Workload(
        size=(request.params or request.preset or DEFAULT_PRESET).lower(),
        config=config,
        context_length=context_length,
        batch_tokens=batch_tokens,
        tokens=_tokens(
            request, settings, batch_tokens, is_length_given="steps" in asked.get("train", {})
        ),
        data=kind,
        data_url=url,
    )


def _size_settings(request: LaunchRequest) -> Tree:
    if request.params:
        n_params = parse_count(request.params, what="PARAMS")
        shape = shape_for_params(n_params)
        context_length = 2048
        batch = max(1, default_batch_tokens(n_params) // context_length)
        steps = math.ceil(tokens_for_params(count_params(shape)) / (batch * context_length))
        train = {"steps": steps, "global_batch_size": batch, "context_length": context_length}
        return {"model": to_tree(shape), "train": train}
    name = (request.preset or DEFAULT_PRESET).lower()
    presets = resources.files("casallm.train").joinpath("presets")
    known = sorted(each.name.removesuffix(".yaml") for each in presets.iterdir())
    if name not in known:
        hint = nearest(name, known)
        raise ConfigError(f"there is no preset {name!r}{hint} (presets: {', '.join(known)})")
    text = presets.joinpath(f"{name}.yaml").read_text()
    return merge({"model": to_tree(NAMED_SIZES[name])}, parse_yaml(text, where=f"preset {name}"))


def _tokens(
    request: LaunchRequest, settings: Tree, batch_tokens: int, *, is_length_given: bool
) -> int:
    if request.job == "sft":
        return SFT_TOKENS
    if request.tokens:
        return parse_count(request.tokens, what="TOKENS")
    tokens = _whole(settings, "steps") * batch_tokens
    if is_length_given or request.data:
        return tokens
    return min(tokens, MAX_EPOCHS * BUILTIN_TOKENS)


def _data(request: LaunchRequest) -> tuple[DataKind, str]:
    """Shards are named by the URL of their directory; anything else is documents."""
    data = (request.data or "builtin").rstrip("/")
    if data == "builtin" or request.job == "sft":
        return "builtin", ""
    if data.startswith(("s3://", "gs://")) and not _FILES.search(data):
        return "shards", data
    if "://" not in data and Path(data).exists():
        made = f"s3://BUCKET/data/{source_name(data)}"
        raise ConfigError(
            f"DATA={data} is on this computer, where machines in a cloud cannot read it: run"
            f" `make prepare DATA={data} OUT={made}`, then launch with DATA={made}"
        )
    digest = hashlib.sha256(data.encode()).hexdigest()[:6]  # as two sources may share a name
    return "documents", f"{request.bucket_url}/data/{source_name(data)}-{digest}"


def _whole(settings: dict[str, Any], name: str) -> int:
    return parse_count(settings["train"][name], what=f"train.{name}")
