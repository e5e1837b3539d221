"""An estimate as people and programs read it: a table and JSON.

The recommended offer comes first, with one sentence why. Text is plain and fits the given width;
`rich_table` is the same table for a terminal. Nothing here prints.
"""

import datetime
import textwrap
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from casallm.estimate.cost import Interval
from casallm.estimate.estimator import PRICE_GIVEN, Estimate, OfferEstimate
from casallm.estimate.layout import fits_ddp, setup_memory
from casallm.estimate.prices import STALE_DAYS
from casallm.estimate.scaling import FINEWEB_EDU_TOKENS, loss_range
from casallm.estimate.throughput import Setup, step_time
from casallm.units import format_bytes, format_count, format_usd

if TYPE_CHECKING:
    from rich.table import Table

MAX_ROWS = 9
"""Offers in the table; `--json` has them all."""

P4D = "p4d.24xlarge"
OLD_P4D_USD_PER_HOUR = 32.7726
"""Its on-demand price in the US before AWS's cut of June 2025, which older articles use."""

OLD_MFU = 0.45
"""The utilisation that those articles reckon with."""

_WORTH_COMPARING = 1e18
"""FLOP: a quarter of an hour on that machine."""


def format_table(
    estimate: Estimate, *, width: int = 100, today: datetime.date | None = None
) -> str:
    """The whole answer as plain text, no line longer than `width`."""
    rows = _table(estimate, width)
    widths = _widths(rows)
    lines = [_heading(estimate, width), ""]
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(size) for cell, size in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    lines += ["", *(wrap(note, width) for note in notes(estimate, today=today))]
    return "\n".join(lines)


def rich_table(estimate: Estimate, *, width: int = 100) -> "Table":
    """The table alone for a terminal, the recommended offer set off."""
    from rich.table import Table

    header, *rows = _table(estimate, width)
    table = Table(box=None, pad_edge=False)
    for i, title in enumerate(header):
        table.add_column(title, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row, style="bold green" if row[0].startswith(">") else None)
    return table


def heading(estimate: Estimate, *, width: int = 100) -> str:
    """What is trained, what is recommended and why."""
    return _heading(estimate, width)


def notes(estimate: Estimate, *, today: datetime.date | None = None) -> list[str]:
    """What a reader must know to believe the table, a sentence or two each."""
    found = ["Ranges hold eight of ten runs; hours count from the first boot to the end."]
    loss = _expected_loss(estimate)
    if loss is not None:
        low, middle, high = loss
        found.append(
            f"Expected loss {middle:.2f} ({low:.2f} to {high:.2f}) nats a token by Chinchilla's law"
            " as refitted by Besiroglu et al. 2024, on Chinchilla's text."
        )
    p4d = next((e for e in estimate.offers if _is_p4d_on_demand(e)), None)
    if p4d is not None and estimate.total_flops >= _WORTH_COMPARING:
        found.append(_explain_old_price(estimate, p4d))
    found += doubts(estimate)
    if estimate.tokens > FINEWEB_EDU_TOKENS:
        found.append(
            f"{format_count(estimate.tokens)} tokens are more than FineWeb-Edu's"
            f" {format_count(FINEWEB_EDU_TOKENS)}: other text or several epochs are needed."
        )
    job = estimate.offers[0].job
    offer, is_ours = job.offer, estimate.request.is_own and not _what_casallm_lacks(job.setup)
    if is_ours and offer.cloud == "aws" and not offer.region.startswith("us-"):
        found.append(
            f"make pretrain CLOUD=aws looks in US regions: add REGION={offer.region} for this one."
        )
    if estimate.too_small:
        kind = " or they have no fp8" if estimate.request.wishes.precision == "fp8" else ""
        found.append(
            f"{estimate.too_small} offers are left out: the model does not fit them{kind}."
        )
    found.append(_price_age(estimate, today or datetime.datetime.now(datetime.UTC).date()))
    return found


def doubts(estimate: Estimate) -> list[str]:
    """What speaks against the recommended machine, or against casallm on it."""
    setup, found = estimate.offers[0].job.setup, []
    lacking = _what_casallm_lacks(setup)
    if estimate.request.is_own and lacking:
        found.append(
            f"The figures are those of another program: casallm's own trainer has no {lacking}."
        )
    needed, memory = setup_memory(setup).total, setup.hardware.memory_bytes
    if needed > memory:
        found.append(
            f"By this count a GPU needs {format_bytes(needed)} and has {format_bytes(memory)}:"
            " that fits programs which cut the loss in pieces."
        )
    step = setup.global_batch_size * setup.context_length
    if step > estimate.tokens:
        found.append(
            f"One optimizer step takes {format_count(step)} tokens, more than the whole run: ask"
            " for more tokens, or fewer GPUs."
        )
    if setup.sharding == "ddp" and setup.n_nodes > 1:
        alone = step_time(replace(setup, n_nodes=1)).tokens_per_second
        if step_time(setup).tokens_per_second < alone:
            found.append(
                f"{setup.n_nodes} of these machines are slower than one: the network between them"
                " holds them back."
            )
    return found


def _what_casallm_lacks(setup: Setup) -> str:
    lacking = {
        "optimizer sharded over the GPUs": setup.sharding == "zero1",
        "state sharded over the GPUs": setup.sharding == "fsdp",
        "tensor or pipeline parallelism": setup.sharding == "model",
        "recomputation of activations": setup.recompute != "none",
        "fp8": setup.precision == "fp8",
    }
    return " and no ".join(name for name, is_needed in lacking.items() if is_needed)


def _expected_loss(estimate: Estimate) -> tuple[float, float, float] | None:
    """By the scaling law, which knows nothing of runs with less than a token a parameter."""
    if estimate.tokens < estimate.n_params:
        return None
    return loss_range(estimate.n_params, estimate.tokens)


def to_json(estimate: Estimate) -> dict[str, Any]:
    """The answer as plain values; keys as documented in docs/guides/estimate.md."""
    loss = _expected_loss(estimate)
    return {
        "params": estimate.n_params,
        "tokens": estimate.tokens,
        "flops_per_token": estimate.flops_per_token,
        "total_flops": estimate.total_flops,
        "context_length": estimate.request.context_length,
        "shape": estimate.config.model_dump(mode="json"),
        "expected_loss": dict(zip(("p10", "p50", "p90"), loss, strict=True)) if loss else None,
        "offers": [_offer_json(each) for each in estimate.offers],
        "recommended": 0,
        "reason": estimate.reason,
        "prices_as_of": estimate.prices.as_of.isoformat(),
        "prices_source": estimate.prices.source,
        "notes": notes(estimate),
    }


def usd_range(usd: Interval) -> str:
    """Eight of ten runs, in dollars."""
    return f"{format_usd(usd.p10)} to {format_usd(usd.p90)}"


def wrap(text: str, width: int, *, indent: int = 0) -> str:
    """`text` in lines of at most `width`; a table's spaces are kept while it fits."""
    if len(text) <= width:
        return text
    lines = textwrap.wrap(
        text, width, subsequent_indent=" " * indent, drop_whitespace=True, break_long_words=False
    )
    return "\n".join(lines)


def _heading(estimate: Estimate, width: int) -> str:
    best = estimate.offers[0]
    ratio = estimate.tokens / estimate.n_params
    work = (
        f"{format_count(estimate.n_params)} parameters on {format_count(estimate.tokens)} tokens"
        f" ({ratio:.3g} a parameter, context {estimate.request.context_length:,}):"
        f" {estimate.total_flops:.3g} FLOP"
    )
    where = f" in {best.job.offer.region}" if best.job.offer.region else ""
    advice = (
        f"Recommended: {best.name}{where}, {format_usd(best.bill.usd.p50)}"
        f" ({usd_range(best.bill.usd)}) and {_hours(best.bill.hours.p50)} h; {estimate.reason}."
    )
    return f"{wrap(work, width)}\n{wrap(advice, width)}"


def _table(estimate: Estimate, width: int) -> list[list[str]]:
    """Header and rows; narrower widths leave columns out."""
    header = ["  machine", "where", "$/h", "tokens/s", "MFU", "hours", "dollars"]
    rows = [header, *(_row(each, each is estimate.offers[0]) for each in _shown(estimate))]
    is_placed = any(each.job.offer.region for each in estimate.offers)
    for column in ("where", "MFU", "tokens/s", "$/h", "hours"):
        is_narrow = sum(_widths(rows)) + 2 * (len(rows[0]) - 1) <= width
        if is_narrow and (is_placed or column != "where"):
            break
        i = rows[0].index(column)
        rows = [row[:i] + row[i + 1 :] for row in rows]
    return rows


def _widths(rows: list[list[str]]) -> list[int]:
    """The longest cell of every column."""
    return [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]


def _shown(estimate: Estimate) -> list[OfferEstimate]:
    """The best offers, and the p4d on demand wherever it stands."""
    shown = list(estimate.offers[:MAX_ROWS])
    missing = [e for e in estimate.offers[MAX_ROWS:] if _is_p4d_on_demand(e)]
    return shown[: MAX_ROWS - len(missing)] + missing


def _row(each: OfferEstimate, is_recommended: bool) -> list[str]:
    bill = each.bill
    return [
        ("> " if is_recommended else "  ") + each.name,
        each.job.offer.region,
        f"{each.job.usd_per_hour:.2f}",
        format_count(each.job.rate.p50),
        f"{each.mfu:.0%}",
        _hours_withusd_range(bill.hours),
        f"{_dollars(bill.usd.p50)} ({_dollars(bill.usd.p10)}-{_dollars(bill.usd.p90)})",
    ]


def _is_p4d_on_demand(each: OfferEstimate) -> bool:
    return each.job.offer.instance == P4D and not each.job.is_spot


def _explain_old_price(estimate: Estimate, p4d: OfferEstimate) -> str:
    """What one p4d would take and cost by their reckoning, and what it is by ours."""
    setup, usd_per_hour = p4d.job.setup, p4d.job.usd_per_hour / p4d.job.setup.n_nodes
    peak = setup.hardware.peak_flops * setup.gpus_per_node
    hours = estimate.total_flops / (peak * OLD_MFU) / 3600
    nodes = f" of {setup.n_nodes} of them" if setup.n_nodes > 1 else ""
    return (
        f"Older articles: {estimate.total_flops:.3g} FLOP at {OLD_MFU:.0%} of"
        f" {setup.gpus_per_node} x {setup.hardware.peak_flops / 1e12:.0f} TFLOP/s are {hours:.1f}"
        f" h, at a p4d's ${OLD_P4D_USD_PER_HOUR:.2f}/h before AWS's cut of 2025"
        f" {format_usd(hours * OLD_P4D_USD_PER_HOUR)}. At ${usd_per_hour:.2f}/h that is"
        f" {format_usd(hours * usd_per_hour)}; at the {p4d.mfu:.0%} MFU expected here{nodes},"
        f" {format_usd(p4d.bill.usd.p50)} with all else."
    )


def _price_age(estimate: Estimate, today: datetime.date) -> str:
    prices = estimate.prices
    if prices.source == PRICE_GIVEN:
        return "The price is the one that was given; storage and other services are not counted."
    days = prices.age_days(today)
    age = "today" if days == 0 else "a day old" if days == 1 else f"{days} days old"
    old = ": old, look again before spending" if days > STALE_DAYS else ""
    return f"Prices: {prices.source} of {prices.as_of} ({age}){old}."


def _offer_json(each: OfferEstimate) -> dict[str, Any]:
    job, bill = each.job, each.bill
    rate = Interval(job.rate.p10, job.rate.p50, job.rate.p90)
    return {
        "cloud": job.offer.cloud,
        "region": job.offer.region,
        "zone": job.offer.zone if job.is_spot else "",
        "instance": job.offer.instance,
        "gpu": job.offer.hardware.name,
        "gpus": job.offer.n_gpus,
        "nodes": job.setup.n_nodes,
        "spot": job.is_spot,
        "usd_per_hour": job.usd_per_hour,
        "tokens_per_second": _interval_json(rate),
        "mfu": each.mfu,
        "hours": _interval_json(bill.hours),
        "usd": _interval_json(bill.usd),
        "items": {item.name: item.usd for item in bill.items},
        "item_sources": {item.name: item.source for item in bill.items},
        "micro_batch_size": job.setup.micro_batch_size,
        "global_batch_size": job.setup.global_batch_size,
        "recompute": job.setup.recompute,
        "sharding": job.setup.sharding,
        "fits_ddp": fits_ddp(job.setup),
        "memory_bytes": setup_memory(job.setup).total,
        "goodput": bill.goodput,
        "checkpoint_seconds": bill.checkpoint_seconds,
        "preemptions": bill.preemptions,
    }


def _interval_json(interval: Interval) -> dict[str, float]:
    return {"p10": interval.p10, "p50": interval.p50, "p90": interval.p90}


def _hours(hours: float) -> str:
    return f"{hours:.1f}" if hours < 20 else f"{hours:,.0f}"


def _hours_withusd_range(hours: Interval) -> str:
    digits = 1 if hours.p90 < 20 else 0
    return f"{hours.p50:,.{digits}f} ({hours.p10:,.{digits}f}-{hours.p90:,.{digits}f})"


def _dollars(usd: float) -> str:
    """As short as a table needs: $6.30, $154, $1,025, $437K."""
    if usd >= 10_000:
        return f"${format_count(usd)}"
    return f"${usd:,.0f}" if usd >= 10 else f"${usd:.2f}"
