"""The best model that a budget buys: size, tokens and machine with the lowest expected loss.

For every offer and size on a fixed grid the bill is affine in the tokens, so the tokens that a
budget (and a deadline) allow follow directly; the scaling law says which choice ends with the
lowest loss. The budget must hold in nine of ten runs, as far as the spread of the offer's own
bill tells. A larger budget allows more tokens in every cell of the grid, and what is left out of
it cannot be better than what was found: more money never gives a worse model.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import NoReturn

from casallm.errors import ConfigError
from casallm.estimate.architecture import ModelConfig, count_params, shape_for_params
from casallm.estimate.cost import middle_of, price_job
from casallm.estimate.job import SETUP_SPREAD, SPOT_PRICE_SKEW, SPOT_PRICE_SPREAD, Job
from casallm.estimate.prices import Offer, hourly_price
from casallm.estimate.scaling import BESIROGLU_2024, FINEWEB_EDU_TOKENS
from casallm.estimate.throughput import Z90
from casallm.units import format_count, format_usd

GRID_RATIO = 1.25
"""Between neighbouring sizes: the loss is flat around its minimum."""

GRID_START, GRID_STEPS = 1_000_000, 52
"""From 1M to about 90B parameters."""

PATIENCE_HOURS = 30 * 24.0
"""Without a deadline, a budget is not spent on a run that may take longer than this."""

LEAST_TOKENS_PER_PARAM = 1
"""A model that sees less is not worth its name, and the scaling law knows none."""

_SAFETY = 1.02
"""On top of the spread of the bill, which is taken from a long run."""

_STARTUP_MARGIN = math.exp(Z90 * math.hypot(SETUP_SPREAD, SPOT_PRICE_SPREAD * SPOT_PRICE_SKEW))
"""Ninetieth percentile over the median of what is paid before the first token."""

MakeJob = Callable[[Offer, bool, ModelConfig, int], Job]


@dataclass(frozen=True)
class BestModel:
    """What a budget buys at best."""

    config: ModelConfig
    tokens: int
    loss: float
    job: Job


@dataclass(frozen=True)
class _Needs:
    """Dollars and hours of one model on one offer: so much at once, and so much a token."""

    fixed_usd: float
    fixed_hours: float
    usd_per_token: float
    hours_per_token: float

    def tokens(self, budget_usd: float, deadline_hours: float) -> int:
        """The tokens that budget and deadline allow."""
        paid = (budget_usd - self.fixed_usd) / self.usd_per_token
        in_time = (deadline_hours - self.fixed_hours) / self.hours_per_token
        return math.floor(min(paid, in_time, FINEWEB_EDU_TOKENS))


def best_model(
    candidates: Iterable[tuple[Offer, bool]],
    config: ModelConfig | None,
    *,
    budget_usd: float,
    deadline_hours: float | None,
    make_job: MakeJob,
) -> BestModel:
    """The lowest expected loss within budget and deadline; of one size only if `config` is given.

    ConfigError says what budget or deadline the smallest model needs where these buy none, or what
    keeps it off the largest machine where none holds it.
    """
    limits = budget_usd, deadline_hours or PATIENCE_HOURS
    offers = _undominated(candidates)
    best: BestModel | None = None
    for offer, is_spot in offers:
        for size in [config] if config else _grid():
            n_params = count_params(size)
            if best and BESIROGLU_2024.loss(n_params, math.inf) >= best.loss:
                continue
            job = _job_or_none(make_job, offer, is_spot, size)
            if job is None:
                break
            typical = _typical_needs(job)
            most = typical.tokens(*limits)
            if most < _least_tokens(size):
                break
            if best and BESIROGLU_2024.loss(n_params, most) >= best.loss:
                continue
            tokens = _careful_needs(job, typical).tokens(*limits)
            if tokens < _least_tokens(size):
                continue
            loss = BESIROGLU_2024.loss(n_params, tokens)
            if best is None or loss < best.loss:
                best = BestModel(size, tokens, loss, replace(job, tokens=tokens))
    if best is None:
        _refuse(offers, config or _shape(0), limits, make_job)
    return best


def grid_size(step: int) -> int:
    """The `step`-th size of the grid, in parameters."""
    return round(GRID_START * GRID_RATIO**step)


def _grid() -> Iterator[ModelConfig]:
    for step in range(GRID_STEPS):
        yield _shape(step)


@cache
def _shape(step: int) -> ModelConfig:
    return shape_for_params(grid_size(step))


def _least_tokens(config: ModelConfig) -> int:
    return LEAST_TOKENS_PER_PARAM * count_params(config)


def _job_or_none(make_job: MakeJob, offer: Offer, is_spot: bool, size: ModelConfig) -> Job | None:
    """The run, if the offer holds the model."""
    try:
        return make_job(offer, is_spot, size, 10**9)
    except ConfigError:
        return None


def _undominated(candidates: Iterable[tuple[Offer, bool]]) -> list[tuple[Offer, bool]]:
    """Of machines alike in everything but the price, the cheapest."""
    best: dict[tuple[object, ...], tuple[Offer, bool]] = {}
    for offer, is_spot in candidates:
        key = (offer.hardware.name, offer.n_gpus, offer.node_bandwidth, is_spot)
        known = best.get(key)
        if known is None or hourly_price(offer, is_spot) < hourly_price(*known):
            best[key] = (offer, is_spot)
    return sorted(best.values(), key=_usd_per_flop)


def _usd_per_flop(candidate: tuple[Offer, bool]) -> float:
    """What the arithmetic costs at its peak: the best is likely found among the first."""
    offer = candidate[0]
    return hourly_price(*candidate) / (offer.n_gpus * offer.hardware.peak_flops)


def _memory_bytes(candidate: tuple[Offer, bool]) -> int:
    return candidate[0].n_gpus * candidate[0].hardware.memory_bytes


def _typical_needs(job: Job) -> _Needs:
    """What the middle of all runs needs."""
    usd_1, hours_1 = middle_of(replace(job, tokens=10**9))
    usd_2, hours_2 = middle_of(replace(job, tokens=2 * 10**9))
    return _Needs(
        fixed_usd=2 * usd_1 - usd_2,
        fixed_hours=2 * hours_1 - hours_2,
        usd_per_token=(usd_2 - usd_1) / 1e9,
        hours_per_token=(hours_2 - hours_1) / 1e9,
    )


def _careful_needs(job: Job, typical: _Needs) -> _Needs:
    """What nine of ten runs need at most.

    Percentiles are added up as if everything went wrong together, which is on the safe side.
    """
    bill = price_job(replace(job, tokens=10**12))
    return _Needs(
        fixed_usd=typical.fixed_usd * _STARTUP_MARGIN,
        fixed_hours=typical.fixed_hours * _STARTUP_MARGIN,
        usd_per_token=typical.usd_per_token * _SAFETY * bill.usd.p90 / bill.usd.p50,
        hours_per_token=typical.hours_per_token * _SAFETY * bill.hours.p90 / bill.hours.p50,
    )


def _refuse(
    offers: list[tuple[Offer, bool]],
    smallest: ModelConfig,
    limits: tuple[float, float],
    make_job: MakeJob,
) -> NoReturn:
    """Say what the smallest model would need."""
    tried = [_job_or_none(make_job, offer, is_spot, smallest) for offer, is_spot in offers]
    jobs = [job for job in tried if job is not None]
    if not jobs:
        make_job(*max(offers, key=_memory_bytes), smallest, 10**9)
    raise ConfigError(_too_little(*limits, smallest, jobs))


def _too_little(
    budget_usd: float, deadline_hours: float, smallest: ModelConfig, jobs: list[Job]
) -> str:
    """The nearest budget or deadline that buys the smallest model."""
    tokens = _least_tokens(smallest)
    needs = [_careful_needs(job, _typical_needs(job)) for job in jobs]
    usd = [n.fixed_usd + n.usd_per_token * tokens for n in needs]
    hours = [n.fixed_hours + n.hours_per_token * tokens for n in needs]
    in_time = [
        dollars for dollars, spent in zip(usd, hours, strict=True) if spent <= deadline_hours
    ]
    model = f"{format_count(count_params(smallest))} parameters on as many tokens"
    if not in_time:
        return (
            f"no model is trained within {_duration(deadline_hours)}: nine of ten runs of {model}"
            f" end within {_duration(min(hours))}; add --deadline {_duration(min(hours))}"
        )
    least = math.ceil(100 * min(in_time)) / 100
    return (
        f"a budget of {format_usd(budget_usd)} buys no model: {format_usd(least)} trains {model},"
        f" nine times in ten; add --budget {least:.2f}"
    )


def _duration(hours: float) -> str:
    """As --deadline takes it, rounded up."""
    return f"{math.ceil(60 * hours)}min" if hours < 3 else f"{math.ceil(hours)}h"
