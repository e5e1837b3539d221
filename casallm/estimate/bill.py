"""The lines of a bill: what each is, in dollars, and the arithmetic behind it.

Prices of services other than the GPUs are AWS's list prices in us-east-1 (November 2026). A
machine with a price given by hand is billed for its hours alone.
"""

import math
from dataclasses import dataclass

import numpy as np

from casallm.estimate.architecture import count_params
from casallm.estimate.job import RESTART_SECONDS, STARTUP_SECONDS, Floats, Hours, Job
from casallm.estimate.prices import GIVEN
from casallm.units import format_bytes, format_count

BUCKET_CLOUD = "aws"
"""Where the bucket is; reading from it elsewhere costs egress."""

_PREPARE_TOKENS_PER_SECOND, PREPARE_USD_PER_HOUR = 1e6, 0.768
"""Tokenizing on 16 cores (m6i.4xlarge) in its own job, before the GPUs are rented."""

_CONTROLLER_USD_PER_HOUR, _CONTROLLER_IDLE_HOURS = 0.192, 1 / 6
"""SkyPilot's controller for managed jobs: 4 vCPUs (m6i.xlarge), stopped after 10 idle minutes."""

_DISK_GB, _DISK_USD_PER_GB_MONTH = 256, 0.08
"""SkyPilot's default disk, as gp3. Only these clouds bill it apart from the machine."""

_DISK_CLOUDS = ("aws", "azure", "gcp")

_STORAGE_USD_PER_GB_MONTH = 0.023
"""Tokens, three checkpoints and the finished model, kept for a month in S3."""

_USD_PER_PUT, _EGRESS_USD_PER_GB = 0.005 / 1000, 0.09

_HOURS_PER_MONTH = 730.0


@dataclass(frozen=True)
class Item:
    """A line of the bill."""

    name: str
    usd: float
    source: str
    """The arithmetic, and where its figures come from."""


def itemise(job: Job, hours: Hours) -> tuple[Item, ...]:
    """The lines for the first of the draws in `hours`, rounded to cents."""
    sources = _sources(job, hours)
    return tuple(
        Item(name, round(float(usd[0]), 2), sources[name])
        for name, usd in lines(job, hours).items()
    )


def lines(job: Job, hours: Hours) -> dict[str, Floats]:
    """Dollars of every item for each draw, in the order of the bill."""
    price = hours.usd_per_hour
    amounts = {"training": hours.train * price, "startup": hours.startup * price}
    amounts["evaluation"] = hours.evaluate * price
    amounts["checkpoints"] = hours.stalls * price
    if job.is_spot:
        amounts["preemptions"] = hours.lost * price
    if job.offer.cloud != GIVEN:
        amounts["sft"] = hours.sft * price
        amounts |= _services(job, hours)
    return amounts


def _services(job: Job, hours: Hours) -> dict[str, Floats]:
    """What is billed beside the machine."""
    once = np.ones_like(hours.train)
    amounts = {"data preparation": _prepare_hours(job) * PREPARE_USD_PER_HOUR * once}
    if job.offer.cloud in _DISK_CLOUDS:
        disk_usd_per_hour = _DISK_GB * _DISK_USD_PER_GB_MONTH / _HOURS_PER_MONTH
        amounts["disk"] = hours.paid * disk_usd_per_hour * job.setup.n_nodes
    amounts["object storage"] = _stored_bytes(job) / 1e9 * _STORAGE_USD_PER_GB_MONTH * once
    amounts["requests"] = _puts(job, hours) * _USD_PER_PUT
    if job.offer.cloud != BUCKET_CLOUD:
        amounts["egress"] = _egress_gb(job, hours) * _EGRESS_USD_PER_GB
    if job.is_spot:
        amounts["controller"] = _controller_hours(hours) * _CONTROLLER_USD_PER_HOUR
    return amounts


def _sources(job: Job, hours: Hours) -> dict[str, str]:
    """For each item the two factors whose product it is, and what they are."""
    rate = f"{job.rate.p50:,.0f} tokens/s"
    size, stall = format_bytes(job.checkpoint_bytes), job.recovery.stall
    minutes, nodes = hours.interval[0] / 60, job.setup.n_nodes

    def rented(spent: Floats, what: str) -> str:
        return f"{spent[0]:.5g} h x ${hours.usd_per_hour[0]:,.4f}/h: {what}"

    return {
        "training": rented(hours.train, f"{format_count(job.tokens)} tokens at {rate}"),
        "startup": rented(
            hours.startup, f"{STARTUP_SECONDS:.0f} s of boot, image, sync, compilation (assumed)"
        ),
        "evaluation": rented(
            hours.evaluate, f"{format_count(job.eval_tokens)} tokens forward at 3 x {rate}"
        ),
        "checkpoints": rented(
            hours.stalls, f"a stall of {stall:.1f} s for {size} every {minutes:.1f} min"
        ),
        "preemptions": rented(
            hours.lost,
            f"{hours.preemptions[0]:.1f} in all, one in {job.mtbf_hours:.1f} h (median of 23 traces"
            f" of V100 on AWS): restarts of {RESTART_SECONDS:.0f} s, work done twice;"
            f" {hours.wait[0]:.1f} h of waiting are not billed",
        ),
        "sft": rented(
            hours.sft, f"{format_count(job.sft_tokens)} tokens at {rate} (default recipe)"
        ),
        "data preparation": f"{_prepare_hours(job):.5g} h x ${PREPARE_USD_PER_HOUR}/h:"
        f" {format_count(job.tokens)} tokens at {format_count(_PREPARE_TOKENS_PER_SECOND)}/s on 16"
        " cores (m6i.4xlarge)",
        "disk": f"{_DISK_GB * nodes * hours.paid[0] / _HOURS_PER_MONTH:.5g} GB-months x"
        f" ${_DISK_USD_PER_GB_MONTH}: {nodes} x {_DISK_GB} GB for {hours.paid[0]:.1f} h (gp3)",
        "object storage": f"{_stored_bytes(job) / 1e9:.5g} GB-months x"
        f" ${_STORAGE_USD_PER_GB_MONTH}: tokens, 3 checkpoints, the model, for a month (S3)",
        "requests": f"{_puts(job, hours)[0]:.0f} PUTs x ${_USD_PER_PUT:.6f}:"
        f" {_puts_per_save(job)} a checkpoint (S3)",
        "egress": f"{_egress_gb(job, hours)[0]:.5g} GB x ${_EGRESS_USD_PER_GB}: tokens and restored"
        f" checkpoints leave {BUCKET_CLOUD}",
        "controller": f"{_controller_hours(hours)[0]:.5g} h x ${_CONTROLLER_USD_PER_HOUR}/h:"
        " SkyPilot's controller (m6i.xlarge), 10 idle min included",
    }


def _prepare_hours(job: Job) -> float:
    return job.tokens / _PREPARE_TOKENS_PER_SECOND / 3600


def _controller_hours(hours: Hours) -> Floats:
    return hours.total + _CONTROLLER_IDLE_HOURS


def _puts(job: Job, hours: Hours) -> Floats:
    """Requests of all checkpoints."""
    return hours.paid * 3600 / hours.interval * _puts_per_save(job)


def _egress_gb(job: Job, hours: Hours) -> Floats:
    """The tokens once to every node, and a checkpoint after each preemption."""
    restored = hours.preemptions * job.checkpoint_bytes
    return (job.data_bytes * job.setup.n_nodes + restored) / 1e9


def _stored_bytes(job: Job) -> int:
    return job.data_bytes + 3 * job.checkpoint_bytes + 4 * count_params(job.setup.config)


def _puts_per_save(job: Job) -> int:
    """Parts of 64 MB, the manifest, and the attempt's own files."""
    return math.ceil(job.checkpoint_bytes / 64e6) + 4
