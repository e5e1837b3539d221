"""What a report shows of a run, as plain values; a stage may add sections of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from casallm.config import Tree
from casallm.estimate.architecture import ModelConfig
from casallm.estimate.cost import Interval
from casallm.train.metrics import Line

State = Literal["finished", "stopped", "running"]


@dataclass(frozen=True)
class Section:
    """A heading and its facts, in rows of a name and a value."""

    title: str
    rows: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Command:
    """Something to type, and what for."""

    purpose: str
    text: str


@dataclass(frozen=True)
class AttemptRow:
    """One start of the run."""

    number: int
    started: str
    machine: str
    first_step: int
    last_step: int
    first_tokens: float | None
    """Of its first line of metrics; None if it recorded none."""
    ending: str
    is_lost: bool
    """Whether it ended without a word, while another followed."""
    usd: float | None


@dataclass(frozen=True)
class Baseline:
    """The loss of the bigram model on the validation windows."""

    nats_per_token: float
    bits_per_byte: float | None


@dataclass(frozen=True)
class ReportData:
    """Everything that a report shows."""

    name: str
    url: str
    stage: str
    state: State
    reason: str
    """Why it is over, or how the newest attempt ended; empty while it goes on."""
    total_steps: int
    tokens_per_step: int
    context_length: int
    model: ModelConfig | None
    """None where the shape cannot be read by this version."""
    lines: Sequence[Line]
    samples: Sequence[Mapping[str, Any]]
    attempts: Sequence[AttemptRow]
    baseline: Baseline | None
    predicted_usd: Interval | None
    """Said by the estimator when the run began; None without a price."""
    hardware: str
    sections: tuple[Section, ...]
    settings: Tree
    commands: tuple[Command, ...]
    written_at: str
