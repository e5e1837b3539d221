"""What a person sees while a run trains: a live bar on a terminal, plain lines elsewhere.

The same fields in the same order in both. A log file gets one `key=value` line for each line of
metrics, and one every half minute while there is none (the first step compiles; a step of a
large model on a small machine is long): carriage returns are noise in a log that is tailed.
Everything goes to standard error. Only rank 0 makes a Progress.
"""

import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from casallm.estimate.cost import usd_to_finish
from casallm.train.metrics import Line
from casallm.units import format_count, format_duration

HEARTBEAT_SECONDS = 30.0
"""A log file hears of a run at least this often, however long its steps are."""

_UNKNOWN = "-"


@dataclass(frozen=True)
class Outlook:
    """How far a run is and what lies ahead of it."""

    step: int
    total_steps: int
    seconds_left: float | None
    usd_per_hour: float | None
    """None where no price is known; dollars are then not shown."""


class Progress:
    """Shows the progress of one run; also a sink of metrics.

    `total_steps` may be set while the run goes on: a budget that nears ends it earlier.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        usd_per_hour: float | None = None,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total_steps = total_steps
        self._usd_per_hour = usd_per_hour
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._pace = _Pace(clock)
        self._step = 0
        self._line: Line = {}
        self._spoken_at = clock()
        self._live: Live | None = None
        if self._console.is_terminal:
            self._live = Live(
                get_renderable=self._render, console=self._console, refresh_per_second=4
            )
            stderr = sys.stderr
            self._live.start()
            _move_log_handlers(stderr, sys.stderr)

    def advance(self, step: int) -> None:
        """`step` optimizer steps are done; called at every one, and costs next to nothing."""
        self._step = step
        if self._live is None and self._clock() - self._spoken_at >= HEARTBEAT_SECONDS:
            self._speak({"usd": self._line.get("usd")})

    def log(self, line: Line) -> None:
        """Show a training line; tell of a validation line."""
        if "val_loss" in line:
            self.note(validation_note(line))
            return
        self._line = line
        self._step = int(line["step"] or 0)
        self._pace.see(line)
        if self._live is None:
            self._speak(line)

    def note(self, text: str) -> None:
        """Show one sentence above the bar, or as a line of its own."""
        self._console.print(Text(text), soft_wrap=True)

    def close(self) -> None:
        """Leave the last state on the screen and give the terminal back."""
        if self._live is not None:
            proxy = sys.stderr
            self._live.stop()
            _move_log_handlers(proxy, sys.stderr)

    def _outlook(self) -> Outlook:
        seconds_left = self._pace.seconds_for(self.total_steps - self._step)
        return Outlook(self._step, self.total_steps, seconds_left, self._usd_per_hour)

    def _speak(self, line: Line) -> None:
        self._spoken_at = self._clock()
        self.note(plain_line(line, self._outlook()))

    def _render(self) -> Group:
        outlook = self._outlook()
        names = dict(fields(self._line, outlook))
        head = Table.grid(padding=(0, 1))
        head.add_row(
            Text(f"step {names.pop('step')}"),
            ProgressBar(total=max(outlook.total_steps, 1), completed=outlook.step, width=30),
            Text(names.pop("done")),
            Text(f"eta {names.pop('eta')}"),
        )
        return Group(head, Text("  ".join(_PHRASES[name].format(names[name]) for name in names)))


def fields(line: Line, outlook: Outlook) -> list[tuple[str, str]]:
    """The fields of one progress line, in their fixed order; `-` where nothing is known yet."""
    shown = [
        ("step", f"{outlook.step}/{outlook.total_steps}"),
        ("done", f"{outlook.step / max(outlook.total_steps, 1):.1%}"),
        ("loss", _format(line.get("loss"), ".4f")),
        ("lr", _format(line.get("lr"), ".2e")),
        ("grad_norm", _format(line.get("grad_norm"), ".3f")),
        ("tokens_per_second", _format(line.get("tokens_per_second"), ".0f")),
        ("mfu", _format(line.get("mfu"), ".1%")),
    ]
    if outlook.usd_per_hour is not None:
        to_finish = None
        if outlook.seconds_left is not None:
            to_finish = usd_to_finish(outlook.seconds_left, outlook.usd_per_hour)
        shown.append(("usd", _format(line.get("usd"), ".2f")))
        shown.append(("usd_to_finish", _format(to_finish, ".2f")))
    left = outlook.seconds_left
    shown.append(("eta", _UNKNOWN if left is None else format_duration(left)))
    return shown


def plain_line(line: Line, outlook: Outlook) -> str:
    """One `key=value` line for a log file."""
    return " ".join(f"{name}={value}" for name, value in fields(line, outlook))


def validation_note(line: Line) -> str:
    """One sentence that tells of a validation."""
    step, tokens = int(line["step"] or 0), line.get("tokens")
    text = f"validation at step {step}"
    if tokens is not None:
        text += f" ({format_count(tokens)} tokens)"
    text += f": loss {_format(line.get('val_loss'), '.4f')}"
    if line.get("val_bpb") is not None:
        text += f", {_format(line['val_bpb'], '.4f')} bits per byte"
    return text


def _move_log_handlers(old: TextIO, new: TextIO) -> None:
    """Let what is logged to `old` go to `new`: while a bar is live it must appear above it."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is old:
            handler.setStream(new)


class _Pace:
    """Seconds a step takes, pauses for validation and saves included."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._first: tuple[float, float] | None = None
        self._seconds_per_step: float | None = None

    def see(self, line: Line) -> None:
        """Learn from a training line; the first only says how fast steps are without pauses."""
        step, now = float(line["step"] or 0), self._clock()
        if self._first is None:
            self._first = (step, now)
            tokens, speed = line.get("tokens"), line.get("tokens_per_second")
            if tokens and speed and step:
                self._seconds_per_step = tokens / step / speed
        elif step > self._first[0]:
            self._seconds_per_step = (now - self._first[1]) / (step - self._first[0])

    def seconds_for(self, steps: int) -> float | None:
        """Seconds that many steps will take; None before the first line."""
        return None if self._seconds_per_step is None else max(steps, 0) * self._seconds_per_step


_PHRASES = {
    "loss": "loss {}",
    "lr": "lr {}",
    "grad_norm": "grad norm {}",
    "tokens_per_second": "{} tokens/s",
    "mfu": "mfu {}",
    "usd": "${} so far",
    "usd_to_finish": "${} to finish",
}


def _format(value: float | None, spec: str) -> str:
    return _UNKNOWN if value is None else format(value, spec)
