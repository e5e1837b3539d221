"""What spot machines waste: preemptions, restarts, lost work, waiting; and the best interval.

Between preemptions a machine lives for `mtbf` on average. Each life pays `restart` before the
first useful step and loses what came after the last checkpoint that was safely uploaded. With
exponential lives the share of paid time that is useful (Young 1974, Daly 2006) is

    goodput = T exp(-(R + U) / M) / (M (exp((T + C) / M) - 1))

for a checkpoint every T useful seconds that stalls training for C and is safe U later, a restart
of R and a mean life of M. Real lives are no such thing: their tails are heavy, most are shorter
than an hour. But goodput depends on them almost only through the mean: `replay` walks through
recorded traces event by event, and the formula is within 5 points for every one of them.

The prior for a zone without history comes from 23 traces of V100 spot instances on AWS
(skypilot-org/spot-traces, the data of "Can't Be Late", NSDI 2024).
"""

import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from casallm.errors import DataError

Floats = NDArray[np.float64]

MTBF_HOURS = 2.3
"""Median over the traces of the mean time between preemptions (0.7 to 10.5)."""

MTBF_SPREAD = 0.7
"""Standard deviation of its logarithm over the traces."""

WAIT_HOURS = 0.6
"""Waiting after a preemption when any zone of a region will do: 0.3, 0.6 and 1.4 in the traces."""

WAIT_SPREAD = 0.7
"""Standard deviation of its logarithm."""


@dataclass(frozen=True)
class Recovery:
    """What saving and coming back cost one run, in seconds."""

    stall: float
    """Training stands still for a checkpoint."""
    upload: float
    """From there until the checkpoint is safe; training goes on."""
    restart: float
    """Paid time of a new machine before its first useful step."""


@dataclass(frozen=True)
class Trace:
    """How many instances could be had, tick by tick."""

    name: str
    seconds_per_tick: float
    available: tuple[int, ...]

    @property
    def nodes(self) -> int:
        """The nodes that the trace was recorded for."""
        return max(self.available)


@dataclass(frozen=True)
class Replay:
    """What became of the time of one trace."""

    useful: float
    """Seconds of training that were kept."""
    paid: float
    """Seconds in which all nodes ran."""
    total: float
    """Seconds of the trace."""
    preemptions: int
    """Times that a node was lost."""

    @property
    def goodput(self) -> float:
        """Useful over paid time."""
        return self.useful / self.paid

    @property
    def progress(self) -> float:
        """Useful over all time, waiting included."""
        return self.useful / self.total


def best_interval(mtbf: float | Floats, recovery: Recovery) -> Floats:
    """Useful seconds between checkpoints that waste least; never shorter than an upload.

    The maximum of the goodput: T / M = 1 + W(-exp(-1 - C / M)) with Lambert's W; for C far below
    M that is Young's sqrt(2 C M).
    """
    stall = np.asarray(max(recovery.stall, 0.1) / np.asarray(mtbf, dtype=float))
    share = np.minimum(np.sqrt(2 * stall), 1.0)
    for _ in range(30):
        share = share - (1 - share - np.exp(-share - stall)) / (np.exp(-share - stall) - 1)
    return np.maximum(share * mtbf, recovery.upload)


def goodput(
    mtbf: float | Floats, recovery: Recovery, interval: float | Floats | None = None
) -> Floats:
    """Share of paid time that is useful, at the best interval unless another is given."""
    life = np.asarray(mtbf, dtype=float)
    spacing = best_interval(life, recovery) if interval is None else np.asarray(interval)
    kept = np.exp(-(recovery.restart + recovery.upload) / life)
    return spacing * kept / (life * np.expm1((spacing + recovery.stall) / life))


def read_trace(path: Path) -> Trace:
    """A trace of skypilot-org/spot-traces, plain or gzipped JSON."""
    try:
        data = path.read_bytes()
        tree = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
        ticks = tuple(int(count) for count in tree["data"])
        return Trace(path.name.split(".")[0], float(tree["metadata"]["gap_seconds"]), ticks)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not a spot trace ({error}): expected metadata and data"
        ) from None


def replay(
    trace: Trace, recovery: Recovery, interval: float, *, nodes: int | None = None
) -> Replay:
    """Train through `trace` with `nodes` machines, saving every `interval` useful seconds.

    A job runs while all its nodes can be had. What was not safe when one is lost is done again;
    at the end of the trace nothing is lost.
    """
    needed = nodes or trace.nodes
    job = _Job(recovery, interval)
    paid, preemptions = 0.0, 0
    is_running = False
    for is_up, ticks in groupby(trace.available, lambda count: count >= needed):
        seconds = trace.seconds_per_tick * len(list(ticks))
        if is_up:
            paid += seconds
            job.start()
            job.run(seconds)
        elif is_running:
            preemptions += 1
            job.lose()
        is_running = is_up
    total = trace.seconds_per_tick * len(trace.available)
    return Replay(job.done, paid, total, preemptions)


def lives(trace: Trace, nodes: int | None = None) -> Iterator[float]:
    """Seconds of each uninterrupted stretch in which `nodes` machines could be had."""
    needed = nodes or trace.nodes
    length = 0
    for count in (*trace.available, 0):
        if count >= needed:
            length += 1
        elif length:
            yield length * trace.seconds_per_tick
            length = 0


def mean_life(trace: Trace, nodes: int | None = None) -> float:
    """Seconds between preemptions; a stretch that the end of the trace cuts ends in none."""
    stretches = list(lives(trace, nodes))
    is_cut = trace.available[-1] >= (nodes or trace.nodes)
    return sum(stretches) / max(1, len(stretches) - is_cut)


def pooled_mtbf(traces: Sequence[Trace]) -> tuple[float, float]:
    """Median hours between preemptions over `traces`, and the spread of their logarithm."""
    hours = np.array([mean_life(trace) for trace in traces]) / 3600
    return float(np.median(hours)), float(np.std(np.log(hours)))


class _Job:
    """Training under preemption: `done` counts useful seconds, `safe` those that survive."""

    def __init__(self, recovery: Recovery, interval: float) -> None:
        self.recovery = recovery
        self.interval = interval
        self.done = 0.0
        self.safe = 0.0
        self.phases: list[tuple[str, float]] = []
        self.uploads: list[tuple[float, float]] = []

    def start(self) -> None:
        self.phases = [("restart", self.recovery.restart), ("train", self.interval)]

    def lose(self) -> None:
        self.done = self.safe
        self.uploads = []

    def run(self, seconds: float) -> None:
        left = seconds
        while left > 0:
            phase, remaining = self.phases[0]
            spent = min(left, remaining)
            left -= spent
            if phase == "train":
                self.done += spent
            self._upload(spent)
            self.phases[0] = (phase, remaining - spent)
            if spent == remaining:
                self._next(phase)

    def _next(self, phase: str) -> None:
        self.phases.pop(0)
        if phase == "train":
            self.phases = [("stall", self.recovery.stall)]
        elif phase == "stall":
            self.uploads.append((self.recovery.upload, self.done))
            self.phases = [("train", self.interval)]
            self._upload(0.0)

    def _upload(self, seconds: float) -> None:
        self.uploads = [(left - seconds, done) for left, done in self.uploads]
        finished = [done for left, done in self.uploads if left <= 0]
        self.safe = max([self.safe, *finished])
        self.uploads = [(left, done) for left, done in self.uploads if left > 0]
