"""One run on one rented machine, and where its hours go.

Every figure is computed from arrays of draws: a single zero for the middle of what is uncertain,
or seeded normal draws for its range. On demand the hours are those of training, evaluation,
finetuning and the stalls of checkpoints; on spot machines preemptions add restarts, work done
twice, and waiting that is not billed.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from casallm.estimate import spot
from casallm.estimate.architecture import count_params
from casallm.estimate.prices import GIVEN, Offer, hourly_price
from casallm.estimate.throughput import Setup, Throughput

Floats = NDArray[np.float64]

STARTUP_SECONDS = 480.0
"""From boot to the first step: boot 120, SkyPilot's runtime 90, wheels and data 150, compilation
120. Assumed; the simulated cloud needs 70 to 140 without boot, wheels and compilation."""

RESTART_SECONDS = 360.0
"""The same after a preemption, when the compiled kernels lie in the bucket."""

SETUP_SPREAD = 0.35
"""Standard deviation of the logarithm of either."""

SPOT_PRICE_SPREAD, SPOT_PRICE_SKEW = 0.12, 2.75
"""The same of a spot price against the one that was read, and how much more that is upwards: prices
move, and the one that was read is of a region's cheapest zone. Where that has run out the next
costs up to 1.53 times as much, nine times in ten (36 machines in regions of AWS's catalog)."""

STATE_BYTES = 12
"""A parameter in a checkpoint: fp32 weights and AdamW's moments."""

STAGING_BANDWIDTH = 8e9
"""Bytes a second from the GPU into the host's memory, which stalls training."""

UPLOAD_BANDWIDTH = 400e6
"""Bytes a second to object storage, behind the training."""

ON_DEMAND_INTERVAL = 1800.0
"""Seconds between checkpoints where nothing takes the machine away, or what an upload takes."""

EVAL_EVERY_STEPS, EVAL_SEQUENCES, EVAL_CONTEXT = 500, 1024, 2048
"""As in the presets, in fewer sequences where they are longer; a forward pass costs a third of a
training step's time."""

SFT_TOKENS = 60_000_000
"""Conversations of the default recipe, seen once, padding included."""


@dataclass(frozen=True)
class Job:
    """One run on one machine at one price."""

    offer: Offer
    is_spot: bool
    setup: Setup
    rate: Throughput
    tokens: int
    mtbf_hours: float = spot.MTBF_HOURS
    """Hours between preemptions, where the machine is spot."""

    @property
    def usd_per_hour(self) -> float:
        """All nodes together."""
        return hourly_price(self.offer, self.is_spot) * self.setup.n_nodes

    @property
    def checkpoint_bytes(self) -> int:
        """Weights and optimizer state."""
        return STATE_BYTES * count_params(self.setup.config)

    @property
    def data_bytes(self) -> int:
        """The tokens as they are stored."""
        return self.tokens * (2 if self.setup.config.vocab_size <= 65_536 else 4)

    @property
    def eval_tokens(self) -> float:
        """Tokens of all evaluations together."""
        tokens_per_step = self.setup.global_batch_size * self.setup.context_length
        evaluations = 1 + self.tokens / tokens_per_step / EVAL_EVERY_STEPS
        return evaluations * EVAL_SEQUENCES * min(self.setup.context_length, EVAL_CONTEXT)

    @property
    def sft_tokens(self) -> int:
        """Tokens of the finetuning that follows."""
        return 0 if self.offer.cloud == GIVEN else SFT_TOKENS

    @property
    def recovery(self) -> spot.Recovery:
        """What saving and coming back cost, in seconds: one GPU saves what all hold alike, each its
        part of what is sharded.
        """
        is_whole = self.setup.sharding == "ddp"
        n_gpus, n_nodes = (1, 1) if is_whole else (self.setup.n_gpus, self.setup.n_nodes)
        stall = 0.5 + self.checkpoint_bytes / STAGING_BANDWIDTH / n_gpus
        upload = self.checkpoint_bytes / UPLOAD_BANDWIDTH / n_nodes
        return spot.Recovery(stall, upload, RESTART_SECONDS)


@dataclass(frozen=True)
class Draws:
    """Standard normal draws of everything uncertain; zeros for the middle."""

    rate: Floats
    mtbf: Floats
    wait: Floats
    setup: Floats
    price: Floats


@dataclass(frozen=True)
class Hours:
    """Where the hours of a job go, for the middle or for every draw."""

    train: Floats
    evaluate: Floats
    sft: Floats
    startup: Floats
    stalls: Floats
    lost: Floats
    """Restarts and work done twice."""
    wait: Floats
    """Not paid."""
    preemptions: Floats
    goodput: Floats
    """Share of the paid hours behind the startup that trains."""
    interval: Floats
    """Useful seconds between checkpoints."""
    usd_per_hour: Floats

    @property
    def paid(self) -> Floats:
        """Hours for which the machine is billed."""
        busy = self.train + self.evaluate + self.sft
        return busy + self.startup + self.stalls + self.lost

    @property
    def total(self) -> Floats:
        """From the first boot to the end."""
        return self.paid + self.wait


def count_hours(job: Job, draws: Draws) -> Hours:
    """The hours of `job` for each of `draws`."""
    sigma = job.rate.sigma * np.where(draws.rate < 0, job.rate.skew, 1.0)
    rate = job.rate.p50 * np.exp(sigma * draws.rate)
    seconds = np.array([[job.tokens], [job.eval_tokens / 3], [job.sft_tokens]]) / rate
    train, evaluate, sft = seconds / 3600
    scale = np.exp(SETUP_SPREAD * draws.setup)
    busy = train + evaluate + sft
    nothing = np.zeros_like(busy)
    recovery = job.recovery
    interval = np.full_like(busy, max(ON_DEMAND_INTERVAL, recovery.upload))
    lost, wait, preemptions, price = nothing, nothing, nothing, job.usd_per_hour + nothing
    if job.is_spot:
        mtbf = 3600 * job.mtbf_hours * np.exp(spot.MTBF_SPREAD * draws.mtbf)
        interval = spot.best_interval(mtbf, recovery)
        paid = busy / spot.goodput(mtbf, recovery, interval)
        lost = (paid - busy * (1 + recovery.stall / interval)) * scale
        preemptions = paid * 3600 / mtbf
        wait = preemptions * spot.WAIT_HOURS * np.exp(spot.WAIT_SPREAD * draws.wait)
        spread = SPOT_PRICE_SPREAD * np.where(draws.price > 0, SPOT_PRICE_SKEW, 1.0)
        price = job.usd_per_hour * np.exp(spread * draws.price)
    stalls = busy * recovery.stall / interval
    return Hours(
        train=train,
        evaluate=evaluate,
        sft=sft,
        startup=STARTUP_SECONDS / 3600 * scale,
        stalls=stalls,
        lost=lost,
        wait=wait,
        preemptions=preemptions,
        goodput=busy / (busy + stalls + lost),
        interval=interval,
        usd_per_hour=price,
    )
