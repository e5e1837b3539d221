"""The learning rate as a function of the step and of the decisions on record.

`lr_fraction` is a fraction of the peak. A run that must end before its last step (its budget or
its deadline nears) records a `FinishEarly`, from which the rate falls in a straight line to the
floor at the new last step: the money buys an annealed model. Later records replace earlier ones.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from casallm.config import Config


class ScheduleConfig(Config):
    """How the learning rate moves over the run."""

    name: Literal["cosine", "wsd"] = "cosine"
    """cosine (Loshchilov & Hutter 2017), or wsd: warm-up, stable, linear decay (Hu et al. 2024)."""
    warmup_fraction: float = Field(default=0.02, ge=0, lt=1)
    """Share of the steps in which the rate rises in a straight line from zero."""
    final_fraction: float = Field(default=0.1, ge=0, le=1)
    """The rate at the last step, as a share of the peak (GPT-3: 10 %)."""
    decay_fraction: float = Field(default=0.4, gt=0, le=1)
    """wsd only: share of the steps in which the rate falls."""


@dataclass(frozen=True)
class FinishEarly:
    """From `step` on the rate falls in a straight line, to end at `last_step`."""

    step: int
    last_step: int


def last_step(steps: int, early: Sequence[FinishEarly] = ()) -> int:
    """The step after which the run is over."""
    return early[-1].last_step if early else steps


def lr_fraction(
    step: int, steps: int, config: ScheduleConfig, early: Sequence[FinishEarly] = ()
) -> float:
    """The rate of `step` (0 is the first) in a run of `steps`, as a fraction of the peak."""
    if not early:
        return _planned(step, steps, config)
    begin = early[-1]
    if step < begin.step:
        return lr_fraction(step, steps, config, early[:-1])
    start = lr_fraction(begin.step, steps, config, early[:-1])
    floor = min(start, config.final_fraction)
    progress = (step - begin.step + 1) / max(begin.last_step - begin.step, 1)
    return start + (floor - start) * min(progress, 1.0)


def _planned(step: int, steps: int, config: ScheduleConfig) -> float:
    warmup_steps = math.ceil(config.warmup_fraction * steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    floor = config.final_fraction
    if config.name == "cosine":
        progress = (step - warmup_steps) / max(steps - 1 - warmup_steps, 1)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    decay_steps = max(1, math.ceil(config.decay_fraction * steps))
    left = steps - 1 - step
    return floor + (1 - floor) * min(1.0, left / decay_steps)
