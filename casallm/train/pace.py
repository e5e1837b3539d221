"""When the next checkpoint is due: computed from what a save costs and how often runs stop."""

import time
from collections.abc import Sequence

from casallm.estimate.spot import Recovery, best_interval
from casallm.train.checkpoint import CheckpointConfig

MAX_INTERVAL_SECONDS = 1800.0
"""However rare stops are, nobody wants to lose more than half an hour."""

FIRST_INTERVAL_SECONDS = 60.0
"""Before the first save nothing is measured; so early there is little to lose."""

BACKGROUND_COST_FRACTION = 0.05
"""What training loses while files are written and uploaded behind it: the bar for our own code."""


def interval_seconds(save_cost_seconds: float, mtbf_seconds: float, upload_seconds: float) -> float:
    """Seconds between checkpoints that lose the least time, at most half an hour.

    The interval that the estimator counts with; never shorter than an upload takes.
    """
    recovery = Recovery(stall=save_cost_seconds, upload=upload_seconds, restart=0.0)
    return max(
        min(float(best_interval(mtbf_seconds, recovery)), MAX_INTERVAL_SECONDS), upload_seconds
    )


def mtbf_seconds(lifetimes_seconds: Sequence[float], expected_seconds: float) -> float:
    """The mean time between stops, from how long past attempts lived and what was expected.

    The expectation counts like one attempt: it rules at first and fades as attempts are seen.
    """
    return (sum(lifetimes_seconds) + expected_seconds) / (len(lifetimes_seconds) + 1)


class Pace:
    """Decides when to save: by `config`, by the clock, by what past saves and stops have cost."""

    def __init__(
        self, config: CheckpointConfig, start_step: int, lifetimes_seconds: Sequence[float]
    ) -> None:
        self._config = config
        self._mtbf_seconds = mtbf_seconds(lifetimes_seconds, 3600 * config.mtbf_hours)
        self._interval_seconds = FIRST_INTERVAL_SECONDS
        self.saved(start_step)

    def is_due(self, step: int) -> bool:
        """Whether the state after `step` should be saved."""
        if self._config.every_steps is not None:
            return step - self._step >= self._config.every_steps
        interval = self._config.every_seconds or self._interval_seconds
        return time.monotonic() - self._time >= interval

    def saved(self, step: int) -> None:
        """The state after `step` has been staged."""
        self._step = step
        self._time = time.monotonic()

    def measured(self, stall_seconds: float, upload_seconds: float) -> None:
        """A save has stopped training for so long, and was stored for so long behind it."""
        cost = stall_seconds + BACKGROUND_COST_FRACTION * upload_seconds
        self._interval_seconds = interval_seconds(cost, self._mtbf_seconds, upload_seconds)
