"""Recipes: which conversations a model is fine-tuned on, as YAML or by name.

The least recipe is `sources: [{path: FILE}]`. Two come with the program: `reference` (the
default: ultrachat-200k and alpaca-cleaned from the hub, with our identity conversations) and
`offline` (conversations that we generate; what the default becomes where no hub can be reached).
"""

import logging
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from casallm.config import Config, build, load_yaml, merge, nearest, parse_yaml
from casallm.data.rows import hub_is_reachable
from casallm.errors import ConfigError

logger = logging.getLogger(__name__)

RECIPES = ("reference", "offline")

Generated = Literal[
    "identity", "greetings", "recall", "arithmetic", "strings", "everyday", "limits", "corpus"
]


class IdentityConfig(Config):
    """Who the assistant says it is."""

    name: str = Field(default="Casa", min_length=1, max_length=60)
    """What it calls itself."""
    maker: str = Field(default="the casallm project", min_length=1, max_length=120)
    """Who it says made it."""


class SourceConfig(Config):
    """Conversations of one kind: of exactly one of `path`, `hub` and `generated`."""

    path: str | None = None
    """A file of JSON Lines, JSON or parquet, looked for beside the recipe and then from here."""
    hub: str | None = None
    """A data set on the Hugging Face hub, or a directory that holds a copy of one."""
    subset: str | None = None
    """Which configuration of the hub's data set, where it has several."""
    split: str = "train"
    """Which split of the hub's data set."""
    generated: Generated | None = None
    """Conversations that we write ourselves, about this."""
    count: int | None = Field(default=None, gt=0)
    """Take so many of those that pass the cleaning, drawn by the seed; empty: all of them."""
    weight: float | None = Field(default=None, gt=0)
    """Take as many of the sources with a weight as they allow in this proportion to each other."""
    where: dict[str, str] = Field(default_factory=dict)
    """Take only rows whose columns have these values."""
    exclude: tuple[str, ...] = ()
    """Leave out conversations in which one of these regular expressions is found, in any case."""

    @property
    def name(self) -> str:
        """What reports call it: the file's name, the hub's or the kind."""
        return Path(self.path).name if self.path else self.hub or str(self.generated)

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [each for each in (self.path, self.hub, self.generated) if each]
        if len(given) != 1:
            raise ValueError(
                f"a source is one of path, hub and generated, here it is {' and '.join(given)}"
                if given
                else "a source needs a path, a hub name or a generated kind"
            )
        if self.count is not None and self.weight is not None:
            raise ValueError("a source has a count or a weight, not both")
        if self.generated and self.count is None:
            raise ValueError(f"how many conversations about {self.generated}? give it a count")
        for pattern in self.exclude:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression ({error})") from None
        return self


class Recipe(Config):
    """The mixture of an SFT run."""

    sources: tuple[SourceConfig, ...]
    """Where conversations come from, in the order in which duplicates are judged."""
    identity: IdentityConfig = IdentityConfig()
    """Who the assistant is."""
    validation_fraction: float = Field(default=0.02, ge=0.0, lt=0.5)
    """The part of every source that is held out."""

    @model_validator(mode="before")
    @classmethod
    def _check_sources(cls, tree: Any) -> Any:
        sources = tree.get("sources") if isinstance(tree, dict) else None
        if sources is not None and not (
            isinstance(sources, list | tuple)
            and all(isinstance(each, dict | SourceConfig) for each in sources)
        ):
            raise ValueError("sources is a list of {path: FILE}, {hub: NAME} or {generated: KIND}")
        return tree

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.sources:
            raise ValueError("sources is empty: name a path, a hub data set or a generated kind")
        return self


def default_recipe() -> str:
    """`reference`; or, said in one sentence, `offline` where no hub can be reached."""
    if hub_is_reachable():
        return "reference"
    logger.warning(
        "no data set hub can be reached, so the assistant is trained on conversations that casallm"
        " generates: enough to try the pipeline, not to make a useful assistant"
    )
    return "offline"


def load_recipe(text: str | None = None, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe that `text` names: a YAML file, `reference` or `offline`; None: `default_recipe`.

    `overrides` are laid over it, as `{"identity": {"name": "Ada"}}`.
    """
    if text is None:
        text = default_recipe()
    if text in RECIPES:
        content = (files("casallm.data") / f"recipes/{text}.yaml").read_text(encoding="utf-8")
        tree, where = parse_yaml(content, where=f"recipe {text}"), f"recipe {text}"
    else:
        if not Path(text).is_file():
            raise ConfigError(
                f"there is no recipe {text!r}{nearest(text, RECIPES)}: name a YAML file, or one of"
                f" {', '.join(RECIPES)}"
            )
        tree, where = load_yaml(Path(text)), text
        tree = _with_paths_from(tree, Path(text).parent)
    return build(Recipe, merge(tree, overrides or {}), where=where)


def _with_paths_from(tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`tree` with the relative paths of its sources read from the recipe's own folder."""
    sources = tree.get("sources")
    if not isinstance(sources, list):
        return tree
    return {**tree, "sources": [_with_path_from(source, folder) for source in sources]}


def _with_path_from(source: Any, folder: Path) -> Any:
    if not isinstance(source, dict) or not isinstance(source.get("path"), str):
        return source
    path = Path(source["path"])
    beside = folder / path
    is_beside = not path.is_absolute() and beside.exists()
    return {**source, "path": str(beside)} if is_beside else source
