"""Hours and dollars of a run, each with a range, and of a run that is under way.

Every item is computed once for the middle of what is uncertain, rounded to cents, and the total is
their sum. The range comes from the same formulas on seeded draws of what is uncertain: the rate of
training, how often spot machines are taken, their price, how long a new one takes and is waited
for. The same inputs give the same cents.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from casallm.estimate.bill import Item, itemise, lines
from casallm.estimate.job import Draws, Floats, Job, count_hours
from casallm.units import format_usd

N_DRAWS = 2001
SEED = 20_261_122


@dataclass(frozen=True)
class Interval:
    """Tenth, fiftieth and ninetieth percentile."""

    p10: float
    p50: float
    p90: float


@dataclass(frozen=True)
class Bill:
    """What a job takes and costs."""

    items: tuple[Item, ...]
    usd: Interval
    """The median is the sum of the items, to the cent."""
    hours: Interval
    """From the first boot to the end, waiting included; data are prepared before."""
    goodput: float
    """Share of paid time behind the startup that trains."""
    checkpoint_seconds: float
    """Useful seconds between checkpoints."""
    preemptions: float
    """Expected."""


def price_job(job: Job) -> Bill:
    """The bill of `job`."""
    middle, drawn = count_hours(job, _middle()), count_hours(job, _draws())
    items = itemise(job, middle)
    total = round(sum(item.usd for item in items), 2)
    drawn_usd = np.sum(list(lines(job, drawn).values()), axis=0)
    return Bill(
        items=items,
        usd=_around(total, drawn_usd, digits=2),
        hours=_around(float(middle.total[0]), drawn.total, digits=4),
        goodput=float(middle.goodput[0]),
        checkpoint_seconds=float(middle.interval[0]),
        preemptions=float(middle.preemptions[0]),
    )


def middle_of(job: Job) -> tuple[float, float]:
    """Dollars and hours for the middle alone, not rounded: affine in the tokens."""
    hours = count_hours(job, _middle())
    return float(sum(usd[0] for usd in lines(job, hours).values())), float(hours.total[0])


def usd_so_far(seconds_since_boot: float, usd_per_hour: float, usd_before: float = 0.0) -> float:
    """Dollars of a running job: earlier attempts, and this machine since it booted."""
    return usd_before + seconds_since_boot / 3600 * usd_per_hour


def usd_to_finish(seconds_left: float, usd_per_hour: float) -> float:
    """Dollars that the rest of a running job takes if nothing interrupts it."""
    return seconds_left / 3600 * usd_per_hour


def compare_with_paid(predicted: Interval, paid_usd: float) -> str:
    """One sentence for a finished run: what was predicted, what was paid, how they differ."""
    is_inside = predicted.p10 <= paid_usd <= predicted.p90
    return (
        f"paid {format_usd(paid_usd)}, predicted {format_usd(predicted.p50)}"
        f" ({format_usd(predicted.p10)} to {format_usd(predicted.p90)}):"
        f" {paid_usd / predicted.p50 - 1:+.0%}, {'inside' if is_inside else 'outside'} the 80 %"
        " interval"
    )


@cache
def _draws() -> Draws:
    return Draws(*np.random.default_rng(SEED).standard_normal((5, N_DRAWS)))


@cache
def _middle() -> Draws:
    return Draws(*np.zeros((5, 1)))


def _around(middle: float, drawn: Floats, *, digits: int) -> Interval:
    """The spread of the draws, laid around the itemised middle."""
    low, median, high = np.quantile(drawn, [0.1, 0.5, 0.9])
    p10, p90 = middle * low / median, middle * high / median
    return Interval(round(float(p10), digits), round(middle, digits), round(float(p90), digits))
