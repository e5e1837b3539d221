"""The best model that a budget buys: size, tokens and machine with the lowest expected loss.

For every offer and size on a fixed grid the bill is affine in the tokens, so the tokens that a
budget (and a deadline) allow follow directly; the scaling law says which choice ends with the
lowest loss. The budget must hold in nine of ten runs, as far as the spread of the offer's own
bill tells. A larger budget allows more tokens in every cell of the grid: it never gives a worse
model.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache

from casallm.errors import ConfigError
from casallm.estimate.architecture import ModelConfig, count_params, shape_for_params
from casallm.estimate.cost import middle_of, price_job
from casallm.estimate.job import SETUP_SPREAD, SPOT_PRICE_SPREAD, Job
from casallm.estimate.prices import Offer, hourly_price
from casallm.estimate.scaling import BESIROGLU_2024, FINEWEB_EDU_TOKENS, optimal_split
from casallm.estimate.throughput import Z90
from casallm.units import format_usd

GRID_RATIO = 1.25
"""Between neighbouring sizes: the loss is flat around its minimum."""

GRID_START, GRID_STEPS = 1_000_000, 52
"""From 1M to about 90B parameters."""

PATIENCE_HOURS = 30 * 24.0
"""Without a deadline, a budget is not spent on a run that may take longer than this."""

_TYPICAL_MFU = 0.45
"""Only to find the neighbourhood of the best size."""

_SAFETY = 1.02
"""On top of the spread of the bill, which varies a little with the model."""

_STARTUP_MARGIN = math.exp(Z90 * math.hypot(SETUP_SPREAD, SPOT_PRICE_SPREAD))
"""Ninetieth percentile over the median of what is paid before the first token."""

MakeJob = Callable[[Offer, bool, ModelConfig, int], Job]


@dataclass(frozen=True)
class BestModel:
    """What a budget buys at best."""

    config: ModelConfig
    tokens: int
    loss: float
    job: Job


def best_model(
    candidates: Iterable[tuple[Offer, bool]],
    config: ModelConfig | None,
    *,
    budget_usd: float,
    deadline_hours: float | None,
    make_job: MakeJob,
) -> BestModel:
    """The lowest expected loss within budget and deadline; of one size only if `config` is given.

    ConfigError where the money does not even start a machine.
    """
    deadline_hours = deadline_hours or PATIENCE_HOURS
    offers = _undominated(candidates)
    found: list[BestModel] = []
    floors: list[float] = []
    for offer, is_spot in offers:
        sizes = [config] if config else list(_sizes(offer, is_spot, budget_usd, deadline_hours))
        margin: tuple[float, float] | None = None
        for size in sizes:
            try:
                job = make_job(offer, is_spot, size, 10**9)
            except ConfigError:
                continue
            margin = margin or _margins(job)
            fixed, tokens = _affordable(job, budget_usd, deadline_hours, margin)
            floors.append(fixed)
            if tokens >= (1 if config else count_params(size)):
                loss = BESIROGLU_2024.loss(count_params(size), tokens)
                found.append(BestModel(size, tokens, loss, replace(job, tokens=tokens)))
    if not found:
        raise ConfigError(_too_little(budget_usd, floors))
    return min(found, key=lambda best: best.loss)


def grid_size(step: int) -> int:
    """The `step`-th size of the grid, in parameters."""
    return round(GRID_START * GRID_RATIO**step)


def _sizes(
    offer: Offer, is_spot: bool, budget_usd: float, deadline_hours: float
) -> Iterator[ModelConfig]:
    """Shapes around the best size for what `offer` computes for the money."""
    hours = min(budget_usd / hourly_price(offer, is_spot), deadline_hours)
    flops = hours * 3600 * offer.hardware.peak_flops * offer.n_gpus * _TYPICAL_MFU
    wanted = optimal_split(max(flops, 1e12))[0]
    held = offer.hardware.memory_bytes / 18
    middle = math.log(min(wanted, held) / GRID_START, GRID_RATIO)
    for step in range(round(middle) - 3, round(middle) + 4):
        if 0 <= step < GRID_STEPS:
            yield _shape(step)


@cache
def _shape(step: int) -> ModelConfig:
    return shape_for_params(grid_size(step))


def _undominated(candidates: Iterable[tuple[Offer, bool]]) -> list[tuple[Offer, bool]]:
    """Of machines alike in everything but the price, the cheapest."""
    best: dict[tuple[object, ...], tuple[Offer, bool]] = {}
    for offer, is_spot in candidates:
        key = (offer.hardware.name, offer.n_gpus, offer.node_bandwidth, is_spot)
        known = best.get(key)
        if known is None or hourly_price(offer, is_spot) < hourly_price(*known):
            best[key] = (offer, is_spot)
    return list(best.values())


def _margins(job: Job) -> tuple[float, float]:
    """Ninetieth percentile over the median of dollars and hours, for a long run on this offer."""
    bill = price_job(replace(job, tokens=10**12))
    usd, hours = bill.usd.p90 / bill.usd.p50, bill.hours.p90 / bill.hours.p50
    return usd * _SAFETY, hours * _SAFETY


def _affordable(
    job: Job, budget_usd: float, deadline_hours: float, margin: tuple[float, float]
) -> tuple[float, int]:
    """Dollars to be ready for before the first token, and the tokens that the rest allows.

    Percentiles are added up as if everything went wrong together, which is on the safe side.
    """
    usd_1, hours_1 = middle_of(replace(job, tokens=10**9))
    usd_2, hours_2 = middle_of(replace(job, tokens=2 * 10**9))
    fixed_usd, fixed_hours = 2 * usd_1 - usd_2, 2 * hours_1 - hours_2
    fixed_usd, fixed_hours = fixed_usd * _STARTUP_MARGIN, fixed_hours * _STARTUP_MARGIN
    billions = (budget_usd - fixed_usd) / (usd_2 - usd_1) / margin[0]
    in_time = (deadline_hours - fixed_hours) / (hours_2 - hours_1) / margin[1]
    return fixed_usd, math.floor(min(min(billions, in_time) * 1e9, FINEWEB_EDU_TOKENS))


def _too_little(budget_usd: float, floors: list[float]) -> str:
    if not floors:
        return "no machine of the price list holds the model: take a smaller one, or name a --gpu"
    least = min(floors)
    return (
        f"a budget of {format_usd(budget_usd)} buys no model in that time: before the first token"
        f" the cheapest machine costs {format_usd(least)}; ${math.ceil(5 * least)} buys a tiny one"
    )
