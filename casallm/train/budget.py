"""How long the money and the time still last, and when to begin the end.

A budget is a hard stop that ends well: while there is still enough left, the learning rate
begins to fall to its floor, so that what the money bought is an annealed model. Everything here
is arithmetic on seconds; the clock and the price come from outside.
"""

import math
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from casallm.config import Config
from casallm.estimate.cost import usd_so_far

DECAY_SHARE = 0.2
"""An early end spends this share of all its steps on the decay (Haegele et al. 2024: 10-20 %)."""

RESERVE_SECONDS = 20.0
"""Kept back for the last evaluation, the last save and the report."""

RESERVE_FRACTION = 0.005
"""Kept back on top, for steps that turn out slower than those before."""


class BudgetConfig(Config):
    """What a run may cost, and what its machine costs."""

    usd: float | None = Field(default=None, gt=0)
    """Dollars, all attempts together; the run anneals, saves and ends before it spends more."""
    deadline_hours: float | None = Field(default=None, gt=0)
    """Hours from the run's first start, all attempts together; likewise."""
    usd_per_hour: float | None = Field(default=None, ge=0)
    """Price of this machine (all nodes); the launcher sets it to the instance really got."""
    billed_from: Literal["start", "boot"] = "start"
    """Since when this machine costs money; the launcher says boot."""

    @model_validator(mode="after")
    def _has_price(self) -> "BudgetConfig":
        if self.usd is not None and self.usd_per_hour is None:
            raise ValueError(
                f"budget.usd is {self.usd:g}, but what this machine costs is not known: set"
                " budget.usd_per_hour"
            )
        return self


@dataclass(frozen=True)
class Purse:
    """What is left to a run at one moment of one attempt."""

    usd_before: float
    """Paid by the attempts before this one."""
    billed_since: float
    """When this machine began to bill (seconds since the epoch)."""
    run_started: float
    """When the run's first attempt began (seconds since the epoch)."""
    config: BudgetConfig

    def usd_so_far(self, now: float) -> float | None:
        """Dollars of all attempts until `now`; None where no price is known."""
        if self.config.usd_per_hour is None:
            return None
        seconds = now - self.billed_since
        return usd_so_far(seconds, self.config.usd_per_hour, self.usd_before)

    def seconds_left(self, now: float) -> float:
        """Seconds until the budget or the deadline is over, whichever is first."""
        left = math.inf
        paid = self.usd_so_far(now)
        if self.config.usd is not None and paid is not None and self.config.usd_per_hour:
            left = (self.config.usd - paid) / self.config.usd_per_hour * 3600
        if self.config.deadline_hours is not None:
            left = min(left, self.run_started + 3600 * self.config.deadline_hours - now)
        return left


def plan_early_end(
    step: int, last_step: int, *, seconds_left: float, seconds_per_step: float
) -> int | None:
    """The new last step if the decay must begin at `step`, else None.

    There is nothing to decide while all steps still fit. When they do not, the run goes on at
    full rate until only the decay's own share of the affordable steps is left.
    """
    if math.isinf(seconds_left):
        return None
    usable = seconds_left * (1 - RESERVE_FRACTION) - RESERVE_SECONDS
    affordable = max(0, math.floor(usable / seconds_per_step))
    if step + affordable >= last_step:
        return None
    end = step + max(affordable, 1)
    decay_steps = math.ceil(DECAY_SHARE * end)
    return end if affordable <= decay_steps else None
