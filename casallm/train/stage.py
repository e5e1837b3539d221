"""What a stage has to say for itself: everything else is one code for pretraining and for SFT.

A stage is a request (`pretrain.PretrainRequest`, `sft.SftRequest`), which settles what is trained
on what and says afterwards what came of it, and a function `open_feed`, with which every rank
opens what it trains on. Attempts, ranks, resume, money and the report know no stage.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from casallm.config import Tree
from casallm.data.loader import Batch
from casallm.data.tokenizer import Tokenizer
from casallm.storage.store import Store
from casallm.train.distributed import World
from casallm.train.evaluation import Prompt
from casallm.train.machine import Machine
from casallm.train.nodes import Place
from casallm.train.run import RunConfig
from casallm.train.trainer import BatchLoader


@dataclass(frozen=True)
class Start:
    """What a person may say about any start of a run; empty means: decide for me."""

    run: str | None = None
    ranks: int | None = None
    allow_changes: bool = False
    place: Place = field(default_factory=Place)
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Material:
    """What a run trains on: where this machine has it, and what is recorded of it."""

    directory: Path
    """What `open_feed` opens."""
    identity: Tree
    """The hashes that are part of the run's identity."""
    facts: Tree
    """What the report tells of it."""
    files: Mapping[str, Path]
    """What the run keeps a copy of, by its name there: with it the run goes on anywhere."""


@dataclass(frozen=True)
class Feed:
    """What one rank trains with."""

    loader: BatchLoader
    tokenizer: Tokenizer
    prompts: Sequence[Prompt]
    """What the model answers or continues at every evaluation."""
    sources: Mapping[str, Callable[[int], Iterator[Batch]]] = field(default_factory=dict)
    """The held-out sequences of each source, where there are several."""


OpenFeed = Callable[[Path, RunConfig, World, int], Feed]
"""From the material's directory, the settings, this rank and its micro-batch size."""


class Request(Protocol):
    """What a person asked for, in the terms of one stage."""

    @property
    def start(self) -> Start:
        """What can be said in any stage."""

    def run_url(self, machine: Machine) -> str:
        """Where the run lives."""

    def plan(self, machine: Machine, run: Store) -> RunConfig:
        """The settings of the run; nothing is written."""

    def settle(self, machine: Machine, run: Store) -> tuple[RunConfig, Material]:
        """The settings of the run and what it trains on, ready on this machine.

        A run that exists keeps its settings, but for those that are asked for.
        """

    def score(
        self, run: Store, config: RunConfig, material: Material
    ) -> Iterator[tuple[str, Tree]]:
        """What there is to say of the finished run: events for its journal, kind and fields."""
