"""The one screen before the question: what will happen, what it costs, what ends it."""

from collections.abc import Callable

from casallm.estimate.cost import Interval
from casallm.units import format_count, format_usd
from launch.plan import SPOT_HEADROOM, UNTESTED_CLOUDS, Candidate, Plan
from launch.request import CAPACITY_HOURS

_DATA = {
    "builtin": "the built-in corpus, prepared on the machine in about a minute",
    "shards": "{url}, fetched to the machine ahead of the training",
    "documents": "{source}, prepared first on a machine without GPUs into {url}",
}


def format_plan(plan: Plan) -> str:
    """The plan as text; the same offline and online."""
    request, bill = plan.request, plan.bill
    rows = [
        ("run", request.run_url),
        ("model", plan.workload.describe()),
        ("data", _data(plan)),
        ("machines", _machines(plan)),
        *(("", line) for line in _fallbacks(plan)),
        (
            "time",
            f"{_range_of(bill.hours, _hours)}, after up to {CAPACITY_HOURS:g} h of waiting",
        ),
        ("cost", f"{_range_of(bill.usd, format_usd)} in all: P50 (P10 to P90)"),
        *(("", f"{item.name:<18}{format_usd(item.usd):>10}") for item in plan.items()),
        ("ends itself", f"at {format_usd(plan.budget_usd)} or hour {plan.deadline_hours:g}:"),
        ("", "the node anneals, saves and stops, whatever becomes of this computer"),
        *_warnings(plan),
        *zip(("worst case", ""), _worst(plan), strict=False),
        ("prices", f"{plan.prices.source}, {plan.prices.as_of}"),
    ]
    title = f"casallm {request.job}: {plan.workload.size} on {request.cloud}"
    lines = [title, "", *(f"{name:<13}{text}" for name, text in rows)]
    if request.cloud in UNTESTED_CLOUDS:
        lines += [
            "",
            f"{request.cloud} is reached through SkyPilot; casallm has not been tried there.",
        ]
    return "\n".join(lines)


def _data(plan: Plan) -> str:
    workload = plan.workload
    text = _DATA[workload.data].format(url=workload.data_url, source=plan.request.data)
    if workload.data != "documents":
        return text
    usd = sum(item.usd for item in plan.bill.items if item.name == "data preparation")
    return f"{text} ({format_usd(usd)}; at most {plan.prepare_hours:g} h)"


def _machines(plan: Plan) -> str:
    nodes = f"{plan.request.nodes} x " if plan.request.nodes > 1 else ""
    kind = "spot" if plan.request.is_spot else "on demand"
    rate = format_count(plan.best.job.rate.p50)
    return f"{nodes}{_describe(plan.candidates[0])}, {kind}, {rate} tokens/s"


def _fallbacks(plan: Plan) -> list[str]:
    """The other candidates, and what an hour of any can cost."""
    others = [f"else {_describe(candidate)}" for candidate in plan.candidates[1:]]
    most = format_usd(plan.most_hourly_usd * plan.request.nodes)
    if not plan.request.is_spot:
        return [*others, f"never above {most}/h"]
    return [
        *others,
        f"each up to {SPOT_HEADROOM:g} times its listed price; billed at the market's, never above"
        f" {most}/h",
    ]


def _warnings(plan: Plan) -> list[tuple[str, str]]:
    if not plan.is_budget_short:
        return []
    usd = format_usd(plan.startup_usd)
    return [("", f"that may be before the first step: to start costs about {usd}")]


def _worst(plan: Plan) -> list[str]:
    worst = format_usd(plan.worst_usd)
    if not plan.request.is_spot:
        return [f"{worst}, all of the above included"]
    return [
        f"{worst} in all, at the spot price of the hour in which each machine is got;",
        f"{format_usd(plan.worst_market_usd)} if that rose at once to the price on demand",
    ]


def _describe(candidate: Candidate) -> str:
    offer = candidate.offer
    gpus = f"{offer.n_gpus} x {offer.hardware.name}"
    price = format_usd(candidate.usd_per_hour)
    return f"{offer.cloud}/{offer.region} {offer.instance} ({gpus}) at {price}/h"


def _range_of(interval: Interval, write: Callable[[float], str]) -> str:
    return f"{write(interval.p50)} ({write(interval.p10)} to {write(interval.p90)})"


def _hours(hours: float) -> str:
    return f"{hours:.1f} h"
