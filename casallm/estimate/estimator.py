"""From a request to an estimate: every offer that can train the model, priced, the best one first.

A request names a model and a machine, or leaves either open. Without a machine all offers of the
price list answer; without a model, and with a budget, the best model that the budget buys is found
(`casallm.estimate.inverse`).
"""

import datetime
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property

from casallm.errors import ConfigError
from casallm.estimate import inverse, throughput
from casallm.estimate.architecture import ModelConfig, count_params, flops_per_token
from casallm.estimate.cost import Bill, price_job
from casallm.estimate.hardware import Hardware
from casallm.estimate.job import Job
from casallm.estimate.layout import Wishes, plan_layout
from casallm.estimate.prices import (
    GIVEN,
    Offer,
    Prices,
    cheapest_regions,
    choose_offers,
    load_prices,
)
from casallm.estimate.scaling import check_tokens, tokens_for_params
from casallm.estimate.throughput import Setup, Throughput
from casallm.units import format_count, format_usd

DEFAULT_CONTEXT_LENGTH = 2048

PRICE_GIVEN = "price given"
"""Source of a price list that is one price from the command line."""

PATIENCE_HOURS = 7 * 24.0
"""Without a deadline, offers that take longer than a week are not recommended."""

MOST_NODES = 10_000
"""Beyond which a number of machines is a slip of the keyboard."""

_ASKED_FOR = "it is the machine that was asked for"

_TOLERANCE = 4.0
"""How much slower than the fastest a cheaper offer may be where all are too slow."""


@dataclass(frozen=True)
class EstimateRequest:
    """What is to be estimated; None leaves a choice open."""

    config: ModelConfig | None = None
    tokens: int | None = None
    context_length: int = DEFAULT_CONTEXT_LENGTH
    hardware: Hardware | None = None
    n_gpus: int | None = None
    """Of one node."""
    n_nodes: int = 1
    cloud: str | None = None
    region: str | None = None
    is_spot: bool | None = None
    budget_usd: float | None = None
    deadline_hours: float | None = None
    usd_per_gpu_hour: float | None = None
    """A price given by hand; answers without any price list."""
    measured_tokens_per_second: float | None = None
    """The run's own rate, all GPUs together."""
    is_own: bool = True
    """Whether casallm's own program trains it, whose rate nobody has measured yet."""
    wishes: Wishes = field(default_factory=Wishes)
    prices: Prices | None = None
    """Default: the user's SkyPilot catalog, or the snapshot."""


@dataclass(frozen=True)
class OfferEstimate:
    """One offer, and what the run would take and cost on it."""

    job: Job
    bill: Bill

    @property
    def name(self) -> str:
        """Cloud, instance, nodes and how it is bought, for people."""
        offer, n_nodes = self.job.offer, self.job.setup.n_nodes
        nodes = f"{n_nodes} x " if n_nodes > 1 else ""
        kind = " spot" if self.job.is_spot else ""
        cloud = "" if offer.cloud == GIVEN else f"{offer.cloud} "
        return f"{cloud}{nodes}{offer.instance}{kind}"

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation in steady state, standard convention."""
        return throughput.mfu(self.job.rate.p50, self.job.setup)


@dataclass(frozen=True)
class Estimate:
    """The answer to a request."""

    request: EstimateRequest
    config: ModelConfig
    tokens: int
    offers: tuple[OfferEstimate, ...]
    """The recommended one first, then by dollars."""
    reason: str
    """Why the first one is recommended, in one sentence."""
    prices: Prices
    too_small: int
    """Offers left out because the model does not fit them."""

    @cached_property
    def n_params(self) -> int:
        """Weights of the model."""
        return count_params(self.config)

    @property
    def flops_per_token(self) -> int:
        """Training FLOPs of a token, standard convention."""
        return flops_per_token(self.config, self.request.context_length)

    @property
    def total_flops(self) -> int:
        """Of the whole run."""
        return self.flops_per_token * self.tokens


def estimate(request: EstimateRequest) -> Estimate:
    """Every offer that can train what is asked for, priced; the recommended one first."""
    _check(request)
    prices = _prices(request)
    candidates = _candidates(request, prices)
    chosen: tuple[Offer, bool] | None = None
    config, tokens = request.config, request.tokens
    if request.budget_usd is not None and tokens is None:
        best = inverse.best_model(
            candidates,
            config,
            budget_usd=request.budget_usd,
            deadline_hours=request.deadline_hours,
            make_job=lambda *what: _job(request, *what),
        )
        config, tokens, chosen = best.config, best.tokens, (best.job.offer, best.job.is_spot)
    if config is None and request.budget_usd is not None:
        raise ConfigError(
            "--budget finds the tokens itself: leave out --tokens, or name the model with --params"
        )
    if config is None:
        raise ConfigError("no model is named: add --params 1.2B, --preset 350m or --budget 100")
    tokens = tokens or tokens_for_params(count_params(config))
    check_tokens(tokens)
    priced, too_small = _price_all(request, candidates, config, tokens)
    offers, reason = _rank(request, priced, chosen)
    return Estimate(request, config, tokens, tuple(offers), reason, prices, too_small)


def _check(request: EstimateRequest) -> None:
    if request.usd_per_gpu_hour is not None and request.hardware is None:
        raise ConfigError("--price-per-gpu-hour needs the machine: add --gpu A100-80GB:8")
    is_one_machine = request.hardware is not None and request.n_gpus is not None
    if request.measured_tokens_per_second is not None and not is_one_machine:
        raise ConfigError(
            "a measured rate belongs to one machine: add --gpu with its count, as in --gpu A100:8"
        )
    if request.measured_tokens_per_second is not None and request.config is None:
        raise ConfigError("a measured rate belongs to one model: add --params, --preset or --shape")
    if request.usd_per_gpu_hour is not None and (request.cloud or request.region):
        raise ConfigError(
            "--price-per-gpu-hour is of a machine wherever it is: leave out --cloud and --region"
        )
    if request.context_length < 1:
        raise ConfigError(
            f"the context is {request.context_length} tokens, but must be positive: try"
            " --context 2048"
        )
    if request.n_nodes < 1:
        raise ConfigError(f"{request.n_nodes} nodes train nothing: try --nodes 1")
    if request.n_nodes > MOST_NODES:
        raise ConfigError(
            f"{request.n_nodes:,} nodes are more than anybody has had: {MOST_NODES:,} at most"
        )


def _prices(request: EstimateRequest) -> Prices:
    if request.usd_per_gpu_hour is None or request.hardware is None:
        return request.prices or load_prices()
    n_gpus = request.n_gpus or 1
    usd = request.usd_per_gpu_hour * n_gpus
    offer = Offer(
        cloud=GIVEN,
        region=request.region or "",
        zone="",
        instance=f"{n_gpus} x {request.hardware.name}",
        hardware=request.hardware,
        n_gpus=n_gpus,
        on_demand=None if request.is_spot else usd,
        spot=usd if request.is_spot else None,
    )
    return Prices((offer,), datetime.datetime.now(datetime.UTC).date(), PRICE_GIVEN)


def _candidates(request: EstimateRequest, prices: Prices) -> list[tuple[Offer, bool]]:
    """Offers where they are cheapest, each with whether it is spot."""
    offers = list(prices.offers)
    if prices.source != PRICE_GIVEN:
        offers = choose_offers(
            prices,
            cloud=request.cloud,
            region=request.region,
            hardware=request.hardware,
            n_gpus=request.n_gpus,
        )
    candidates = cheapest_regions(offers)
    if request.is_spot is not None:
        candidates = [(offer, spot) for offer, spot in candidates if spot == request.is_spot]
    if not candidates:
        kind = "spot" if request.is_spot else "on-demand"
        raise ConfigError(
            f"no {kind} price is known for what was asked ({prices.source}): leave out"
            f" {'--spot' if request.is_spot else '--on-demand'}, or widen the search"
        )
    return candidates


def _job(
    request: EstimateRequest, offer: Offer, is_spot: bool, config: ModelConfig, tokens: int
) -> Job:
    """The run on `offer`; ConfigError where the model does not fit it.

    casallm trains with DDP and recomputes nothing; other layouts are tried only where a machine or
    a sharding was asked for by name.
    """
    wishes = replace(request.wishes, node_bandwidth=offer.node_bandwidth)
    if request.hardware is None and wishes.sharding is None:
        wishes = replace(wishes, sharding="ddp")
    wanted = [wishes]
    if request.is_own:
        sharding = wishes.sharding or "ddp"
        plain = replace(wishes, sharding=sharding, recompute=wishes.recompute or "none")
        wanted = [plain] if wishes.sharding == "ddp" else [plain, wishes]
    setup = _first_that_fits(request, offer, config, wanted)
    rate: Throughput = throughput.predict(setup, is_own=request.is_own)
    if request.measured_tokens_per_second is not None:
        rate = throughput.measured(request.measured_tokens_per_second)
        _check_measured(rate.p50, setup)
    return Job(offer, is_spot, setup, rate, tokens)


def _first_that_fits(
    request: EstimateRequest, offer: Offer, config: ModelConfig, wanted: list[Wishes]
) -> Setup:
    """The layout by the first of the wishes that the machine can fulfil."""
    for wishes in wanted:
        try:
            return plan_layout(
                config,
                request.context_length,
                offer.hardware,
                gpus_per_node=offer.n_gpus,
                n_nodes=request.n_nodes,
                wishes=wishes,
            )
        except ConfigError:
            if wishes is wanted[-1]:
                raise
    raise AssertionError("there are always wishes")


def _check_measured(tokens_per_second: float, setup: Setup) -> None:
    share = throughput.mfu(tokens_per_second, setup)
    if share > 1:
        raise ConfigError(
            f"{format_count(tokens_per_second)} tokens/s would be {share:.3g} times the peak of"
            f" {setup.n_gpus} x {setup.hardware.name}: check the rate, and the GPUs it is of"
        )


def _price_all(
    request: EstimateRequest,
    candidates: Iterable[tuple[Offer, bool]],
    config: ModelConfig,
    tokens: int,
) -> tuple[list[OfferEstimate], int]:
    """Every candidate that holds the model, priced, and how many do not."""
    priced: list[OfferEstimate] = []
    refusals: list[tuple[int, ConfigError]] = []
    for offer, is_spot in candidates:
        try:
            job = _job(request, offer, is_spot, config, tokens)
        except ConfigError as error:
            refusals.append((offer.n_gpus * offer.hardware.memory_bytes, error))
            continue
        priced.append(OfferEstimate(job, price_job(job)))
    if not priced:
        raise max(refusals, key=lambda refusal: refusal[0])[1]
    return priced, len(refusals)


def _rank(
    request: EstimateRequest, priced: list[OfferEstimate], chosen: tuple[Offer, bool] | None
) -> tuple[list[OfferEstimate], str]:
    """The offers, recommended first and then by dollars, and why the first is."""
    by_usd = sorted(priced, key=lambda each: (each.bill.usd.p50, each.bill.hours.p50, each.name))
    limit = request.deadline_hours or PATIENCE_HOURS
    in_time = [each for each in by_usd if each.bill.hours.p90 <= limit]
    if chosen is not None:
        best = next(e for e in by_usd if (e.job.offer, e.job.is_spot) == chosen)
        reason = _budget_reason(request, best, len(priced))
    elif in_time:
        best = in_time[0]
        reason = _cheapest_reason(best, by_usd, in_time, limit)
    else:
        best, reason = _too_slow(by_usd, limit, has_deadline=request.deadline_hours is not None)
    if request.budget_usd is not None and best.bill.usd.p90 > request.budget_usd:
        costs = "costs" if best.bill.usd.p10 > request.budget_usd else "may cost"
        reason += f"; it {costs} more than the budget of {format_usd(request.budget_usd)}"
    return [best, *(each for each in by_usd if each is not best)], reason


def _too_slow(
    by_usd: list[OfferEstimate], limit: float, *, has_deadline: bool
) -> tuple[OfferEstimate, str]:
    """The offer to take when none ends in time: the fastest, or what is cheap and nearly so."""
    fastest = min(by_usd, key=lambda each: each.bill.hours.p90)
    if len(by_usd) == 1:
        return fastest, f"{_ASKED_FOR}, but may take more than {_duration(limit)}"
    unsure = f"no offer surely ends within {_duration(limit)}"
    if has_deadline:
        ends = f"nine of ten such runs end within {fastest.bill.hours.p90:.1f} h; add --nodes"
        return fastest, f"{unsure}: this is the fastest, {ends}"
    slowest = _TOLERANCE * fastest.bill.hours.p50
    best = next(each for each in by_usd if each.bill.hours.p50 <= slowest)
    bound = f"at most {_TOLERANCE:g} times as slow as the fastest"
    return best, f"{unsure}: of those {bound} it is the cheapest"


def _budget_reason(request: EstimateRequest, best: OfferEstimate, n_offers: int) -> str:
    budget = request.budget_usd or math.inf
    within = format_usd(budget)
    if request.deadline_hours:
        within += f" and {_duration(request.deadline_hours)}"
    buys = f"it buys the lowest expected loss for {within}, nine times in ten"
    reason = f"of {n_offers} offers {buys}" if n_offers > 1 else f"{_ASKED_FOR}: {buys}"
    if best.bill.usd.p90 < 0.8 * budget:
        reason += "; more money needs more machines or more time: add --nodes or --deadline"
    return reason


def _duration(hours: float) -> str:
    if hours == PATIENCE_HOURS:
        return "a week"
    return f"{60 * hours:.0f} min" if hours < 1 else f"{hours:g} h"


def _cheapest_reason(
    best: OfferEstimate,
    by_usd: list[OfferEstimate],
    in_time: list[OfferEstimate],
    limit: float,
) -> str:
    if len(by_usd) == 1:
        return _ASKED_FOR
    reason = f"it is the cheapest of {len(in_time)} offers that end within {_duration(limit)}"
    if best.job.is_spot:
        sure = next((each for each in in_time if not each.job.is_spot), None)
        if sure is not None:
            reason += f"; without preemptions {sure.name} costs {format_usd(sure.bill.usd.p50)}"
    return reason
