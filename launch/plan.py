"""From a request to a plan: which machines, how long, what it costs at most, and what ends it.

Pure but for reading prices from disk: the same request gives the same screen with credentials and
without, online and offline. Every plan has a budget and a deadline, asked for or computed: both
are stored in the run and enforced on the node.
"""

import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass, replace

from casallm.errors import ConfigError
from casallm.estimate.bill import PREPARE_USD_PER_HOUR, Item
from casallm.estimate.cost import Bill, Interval
from casallm.estimate.estimator import EstimateRequest, OfferEstimate, estimate
from casallm.estimate.hardware import Hardware, parse_gpu
from casallm.estimate.layout import Wishes
from casallm.estimate.prices import Offer, Prices, choose_offers, hourly_price, load_prices
from casallm.units import format_usd, parse_hours, parse_usd
from launch.request import LaunchRequest, cluster_name
from launch.tasks import Place, accelerators_of, load_task
from launch.workload import Workload, read_workload

REGIONS_PER_GPU = 3
"""Regions in which each kind of machine is sought, the cheapest first."""

WORTHWHILE = 2.0
"""A kind of machine is a candidate while the run costs at most this many times the best."""

SPOT_HEADROOM = 1.5
"""Spot prices move: SkyPilot may pay this many times the listed price, and not more."""

BUDGET_FACTOR, DEADLINE_FACTOR = 1.25, 2.0
"""Of the 90th percentile: the budget and the deadline of a run for which none was given."""

OVERSHOOT_FRACTION, OVERSHOOT_SECONDS = 0.01, 60.0
"""By how much a run may miss its budget while it saves and ends."""

ENDING_SECONDS = 300.0
"""Two idle minutes and the deletion of machines, which are billed after the run has ended."""

PREPARE_FACTOR, PREPARE_LEAST_HOURS = 4.0, 2.0
"""Preparing data may take this many times the estimate, and never less than so long."""

PREPARE_LIMIT_USD = 2 * PREPARE_USD_PER_HOUR
"""Dollars an hour of the machine that prepares data, beyond which SkyPilot takes none."""

SERVICES = ("data preparation", "disk", "object storage", "controller", "egress", "requests")
"""Items of the bill that the run's own budget does not count: it pays for machines by the hour."""

HOME = "us-"
"""Regions are sought here unless REGION says otherwise: the bucket should be on one continent."""

UNTESTED_CLOUDS = ("lambda", "runpod", "gcp", "azure", "nebius", "kubernetes")
"""Reached through SkyPilot; nobody has tried casallm there yet."""


@dataclass(frozen=True)
class Candidate:
    """A kind of machine in a region, as SkyPilot will be asked for it."""

    offer: Offer
    is_spot: bool

    @property
    def usd_per_hour(self) -> float:
        """Of one machine."""
        return hourly_price(self.offer, self.is_spot)


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before money is spent."""

    request: LaunchRequest
    workload: Workload
    candidates: tuple[Candidate, ...]
    """In order of preference."""
    best: OfferEstimate
    budget_usd: float
    deadline_hours: float
    prices: Prices

    @property
    def name(self) -> str:
        """Of the cluster or managed job."""
        return cluster_name(self.request.run_url)

    @property
    def bill(self) -> Bill:
        """Of the first candidate."""
        return self.best.bill

    def most_listed_usd(self, candidate: Candidate) -> float:
        """Dollars an hour of one machine: SkyPilot takes none of this kind that is listed above."""
        headroom = SPOT_HEADROOM if candidate.is_spot else 1.0
        return math.ceil(candidate.usd_per_hour * headroom * 100) / 100

    def place_of(self, candidate: Candidate) -> Place:
        """How a task names it."""
        offer = candidate.offer
        return Place(
            infra=f"{offer.cloud}/{offer.region}",
            accelerators=f"{offer.hardware.name}:{offer.n_gpus}",
            max_hourly_usd=self.most_listed_usd(candidate),
        )

    @property
    def most_hourly_usd(self) -> float:
        """What one machine can be billed at the most, in dollars an hour.

        AWS bills a spot machine at its market price, which never exceeds that on demand.
        """
        prices = [max(self.most_listed_usd(c), _on_demand_usd(c.offer)) for c in self.candidates]
        return max(prices)

    @property
    def prepare_hours(self) -> float:
        """After which the machine that prepares data ends itself, done or not."""
        expected = self._usd_of("data preparation") / PREPARE_USD_PER_HOUR
        return max(PREPARE_LEAST_HOURS, math.ceil(PREPARE_FACTOR * expected))

    @property
    def usd_outside_budget(self) -> float:
        """What is paid at most beside the run's own machines: controller, bucket, preparation."""
        usd = self._usd_of(*SERVICES)
        if self.workload.data == "documents":
            usd += self.prepare_hours * PREPARE_LIMIT_USD - self._usd_of("data preparation")
        return round(usd, 2)

    @property
    def worst_usd(self) -> float:
        """The most that the run can cost at the prices of the moment when each machine is got.

        The budget counts those; it does not count how machines end, nor the services.
        """
        return self._worst(self.budget_usd)

    @property
    def worst_market_usd(self) -> float:
        """The same if spot machines, got at the listed price, rose to that on demand at once."""
        rise = max(_on_demand_usd(c.offer) / c.usd_per_hour for c in self.candidates)
        return self._worst(max(1.0, rise) * self.budget_usd)

    @property
    def is_budget_short(self) -> bool:
        """Whether the budget may be spent before the first step."""
        return self.budget_usd < self.startup_usd

    @property
    def startup_usd(self) -> float:
        """Of boot, installation, data and compilation, which come before the first step."""
        return self._usd_of("startup")

    def _worst(self, budget_usd: float) -> float:
        rate = self.most_hourly_usd * self.request.nodes
        by_budget = budget_usd * (1 + OVERSHOOT_FRACTION) + rate * OVERSHOOT_SECONDS / 3600
        by_deadline = rate * (self.deadline_hours + OVERSHOOT_SECONDS / 3600)
        ending = rate * ENDING_SECONDS / 3600
        return round(min(by_budget, by_deadline) + ending + self.usd_outside_budget, 2)

    def _usd_of(self, *names: str) -> float:
        return sum(item.usd for item in self.bill.items if item.name in names)

    def items(self) -> list[Item]:
        """The lines of the bill that are worth a line."""
        return [item for item in self.bill.items if item.usd >= 0.005]

    def offers_text(self) -> str:
        """The candidates' prices, as the node reads them to know its own."""
        rows = [
            f"{c.offer.cloud}/{c.offer.region}/{c.offer.instance}={c.usd_per_hour:.6g}"
            for c in self.candidates
        ]
        return ",".join(rows)


def build_plan(request: LaunchRequest, prices: Prices | None = None) -> Plan:
    """The plan for `request`; ConfigError says what no machine can do."""
    workload = read_workload(request)
    known = _nearby(request, prices or load_prices())
    estimates = [
        each
        for machine in _machines(request)
        for each in _estimate(request, workload, machine, known)
    ]
    if not estimates:
        raise ConfigError(_nothing_sold(request, known))
    estimates.sort(key=lambda each: each.bill.usd.p50)
    best = estimates[0]
    affordable = [e for e in estimates if e.bill.usd.p50 <= WORTHWHILE * best.bill.usd.p50]
    own_p90 = best.bill.usd.p90 - sum(i.usd for i in best.bill.items if i.name in SERVICES)
    return Plan(
        request=request,
        workload=workload,
        candidates=tuple(_candidates(affordable, known, request)),
        best=best,
        budget_usd=_budget(request, own_p90, best.job.usd_per_hour),
        deadline_hours=_deadline(request, best.bill.hours.p90),
        prices=known,
    )


def _on_demand_usd(offer: Offer) -> float:
    """Dollars an hour; 0 where it is sold as spot only, or its price is not known."""
    return offer.on_demand or 0.0


def _nearby(request: LaunchRequest, prices: Prices) -> Prices:
    """The offers that may be taken: of the cloud, in the region asked for or on one continent."""
    clouds = ("aws", *UNTESTED_CLOUDS)
    if request.cloud not in clouds:
        raise ConfigError(f"there is no cloud {request.cloud!r} (clouds: {', '.join(clouds)})")
    offers = choose_offers(prices, cloud=request.cloud, region=request.region)
    if request.cloud == "aws" and not request.region:
        offers = [offer for offer in offers if offer.region.startswith(HOME)]
    return replace(prices, offers=tuple(offers))


def _machines(request: LaunchRequest) -> list[tuple[Hardware, int]]:
    """The GPU that was asked for, or those that the task's file names."""
    if request.gpu:
        return [parse_gpu(request.gpu)]
    return accelerators_of(load_task(request.job))


def _estimate(
    request: LaunchRequest, workload: Workload, machine: tuple[Hardware, int], prices: Prices
) -> list[OfferEstimate]:
    """The cheapest offer of one kind of machine, priced; none where it cannot do the work."""
    hardware, n_gpus = machine
    wanted = EstimateRequest(
        config=workload.config,
        tokens=workload.tokens,
        context_length=workload.context_length,
        hardware=hardware,
        n_gpus=n_gpus,
        n_nodes=request.nodes,
        cloud=request.cloud,
        region=request.region,
        is_spot=request.is_spot,
        wishes=Wishes(sharding="ddp", batch_tokens=workload.batch_tokens),
        prices=prices,
    )
    try:
        found = estimate(wanted).offers[0]
    except ConfigError:
        if request.gpu:
            raise
        return []
    return [replace(found, bill=_own_bill(found.bill, workload))]


def _own_bill(bill: Bill, workload: Workload) -> Bill:
    """The estimator's bill, from documents to assistant, without what is not done here."""
    elsewhere = ("sft",) if workload.data == "documents" else ("sft", "data preparation")
    usd = sum(item.usd for item in bill.items if item.name in elsewhere)
    return replace(
        bill,
        items=tuple(item for item in bill.items if item.name not in elsewhere),
        usd=Interval(*(round(each - usd, 2) for each in astuple(bill.usd))),
    )


def _candidates(
    estimates: Iterable[OfferEstimate], prices: Prices, request: LaunchRequest
) -> Iterable[Candidate]:
    for each in estimates:
        kind = each.job.offer
        same = [
            Candidate(offer, request.is_spot)
            for offer in prices.offers
            if (offer.cloud, offer.instance, offer.hardware)
            == (kind.cloud, kind.instance, kind.hardware)
        ]
        sold = [candidate for candidate in same if math.isfinite(candidate.usd_per_hour)]
        sold.sort(
            key=lambda c: (c.usd_per_hour, not c.offer.region.startswith("us-"), c.offer.region)
        )
        yield from sold[:REGIONS_PER_GPU]


def _budget(request: LaunchRequest, own_p90: float, usd_per_hour: float) -> float:
    """The budget that was asked for, or one that nine of ten runs do not reach."""
    if request.budget:
        usd = parse_usd(request.budget, what="BUDGET")
        if usd < usd_per_hour / 60:
            raise ConfigError(
                f"BUDGET is {format_usd(usd)}, less than a minute of the cheapest machine of the"
                f" plan at {format_usd(usd_per_hour)}/h: give more, or a cheaper machine with GPU="
            )
        return usd
    return float(max(1, math.ceil(BUDGET_FACTOR * own_p90)))


def _deadline(request: LaunchRequest, hours_p90: float) -> float:
    if request.deadline:
        return parse_hours(request.deadline, what="DEADLINE")
    return float(max(1, math.ceil(DEADLINE_FACTOR * hours_p90)))


def _nothing_sold(request: LaunchRequest, prices: Prices) -> str:
    kind = "as spot" if request.is_spot else "on demand"
    where = f"{request.cloud}/{request.region}" if request.region else request.cloud
    return (
        f"no machine of tasks/{request.job}.yaml that holds this model is sold {kind} on {where}"
        f" ({prices.source} of {prices.as_of}): choose one with GPU=A100:8, or SPOT=0"
    )
