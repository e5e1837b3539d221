"""The names of all numbers that a run records, the lines that hold them, and who hears of them.

A line is one JSON object in `metrics.jsonl`, which is the truth; the progress display and wandb
are told of each line and may be absent. A number that is not finite is null in a line: strict
JSON has no NaN. Everything but `Metrics` is a pure function.

    step               optimizer steps done
    tokens             training targets seen up to that step
    loss               nats per token, mean over the steps since the line before
    lr                 learning rate of that step
    grad_norm          norm of the whole gradient before clipping
    tokens_per_second  all ranks together, since the line before, pauses left out
    mfu                share of the machine's peak, by the standard FLOP convention (PaLM)
    elapsed_seconds    training time of the run so far, earlier attempts included
    usd                dollars so far, earlier attempts included; null without a price
    attempt            the start of the run that wrote the line

    val_loss           nats per token over the validation windows, special tokens included
    val_bpb            bits per byte of the same text, special tokens left out
    val_loss/SOURCE    val_loss of one source alone, where the run has several
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from pydantic import Field

from casallm.config import Config
from casallm.estimate.hardware import Hardware
from casallm.estimate.hardware import mfu as mfu_of

Line = dict[str, float | None]

TRAINING_FIELDS = (
    "step",
    "tokens",
    "loss",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "mfu",
    "elapsed_seconds",
    "usd",
    "attempt",
)
EVALUATION_FIELDS = ("step", "tokens", "val_loss", "val_bpb")
SOURCE_PREFIX = "val_loss/"
"""Of the fields that tell the validation loss of one source."""


class LogConfig(Config):
    """What is recorded how often, and who else is told."""

    every_steps: int = Field(default=10, gt=0)
    """Optimizer steps between two lines of metrics and of progress."""
    wandb: Literal["auto", "off", "offline", "online"] = "auto"
    """auto: WANDB_MODE if set, else online where a key and a route are found, else offline."""


@dataclass(frozen=True)
class Measurement:
    """What the trainer knows at the end of one logging interval."""

    step: int
    tokens: int
    loss: float
    lr: float
    grad_norm: float
    interval_tokens: int
    interval_seconds: float
    elapsed_seconds: float
    usd: float | None
    attempt: int


@dataclass(frozen=True)
class Yardstick:
    """What tokens a second are held against: the model's FLOPs and the machine's peak."""

    flops_per_token: float
    """Of `estimate.architecture.flops_per_token`, standard convention."""
    hardware: Hardware | None
    """None where the peak is not known; the MFU is then null."""
    n_devices: int

    def mfu(self, tokens_per_second: float) -> float | None:
        """Model FLOPs utilisation at that speed."""
        if self.hardware is None:
            return None
        return mfu_of(tokens_per_second, self.flops_per_token, self.hardware, self.n_devices)


def training_line(measured: Measurement, yardstick: Yardstick) -> Line:
    """The line of one logging interval, fields in the order of TRAINING_FIELDS."""
    speed = measured.interval_tokens / max(measured.interval_seconds, 1e-9)
    values = {
        "tokens_per_second": speed,
        "mfu": yardstick.mfu(speed),
        **{name: getattr(measured, name) for name in TRAINING_FIELDS if hasattr(measured, name)},
    }
    return {name: _finite(values[name]) for name in TRAINING_FIELDS}


def evaluation_line(
    step: int,
    tokens: int,
    *,
    val_loss: float,
    val_bpb: float | None = None,
    by_source: Mapping[str, float] | None = None,
) -> Line:
    """The line of one validation; `val_bpb` is null where bytes cannot be counted."""
    return {
        "step": step,
        "tokens": tokens,
        "val_loss": _finite(val_loss),
        "val_bpb": _finite(val_bpb),
        **{f"{SOURCE_PREFIX}{name}": _finite(loss) for name, loss in (by_source or {}).items()},
    }


def losses_by_source(line: Line) -> dict[str, float | None]:
    """The validation loss of each source on an evaluation line; empty where there is one source."""
    return {
        name.removeprefix(SOURCE_PREFIX): value
        for name, value in line.items()
        if name.startswith(SOURCE_PREFIX)
    }


def bits_per_byte(nll_sum_nats: float, n_bytes: int) -> float:
    """Bits a model needs for one byte of text: comparable across tokenizers; NaN for no bytes.

    The sum is over targets that are text, special tokens left out, as are their bytes.
    """
    return nll_sum_nats / (math.log(2) * n_bytes) if n_bytes else math.nan


def training_lines(lines: Iterable[Line]) -> list[Line]:
    """Those of `lines` that tell of training."""
    return [line for line in lines if "loss" in line]


def evaluation_lines(lines: Iterable[Line]) -> list[Line]:
    """Those of `lines` that tell of validation."""
    return [line for line in lines if "val_loss" in line]


class Sink(Protocol):
    """Somebody who is told of every line."""

    def log(self, line: Line) -> None:
        """Take note of one line."""

    def close(self) -> None:
        """No line follows."""


class Metrics:
    """Hands every line to the run's file first, then to those who merely listen."""

    def __init__(self, write: Callable[[Line], None], sinks: Sequence[Sink] = ()) -> None:
        self._write = write
        self._sinks = tuple(sinks)

    def log(self, line: Line) -> None:
        """Record one line."""
        self._write(line)
        for sink in self._sinks:
            sink.log(line)

    def close(self) -> None:
        """Tell everybody that no line follows."""
        for sink in self._sinks:
            sink.close()


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
