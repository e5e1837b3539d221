"""When the next checkpoint is due: computed from what a save costs and how often runs stop."""

import math
import time

from casallm.train.checkpoint import CheckpointConfig

MAX_INTERVAL_SECONDS = 1800.0
"""However rare stops are, nobody wants to lose more than half an hour."""

FIRST_INTERVAL_SECONDS = 60.0
"""Before the first save nothing is measured; so early there is little to lose."""

BACKGROUND_COST_FRACTION = 0.05
"""What training loses while files are written and uploaded behind it: the bar for our own code."""


def interval_seconds(save_cost_seconds: float, mtbf_seconds: float, upload_seconds: float) -> float:
    """Seconds between checkpoints that lose the least time, at most half an hour.

    Young's formula, sqrt(2 C M): C is what a save costs training, M the mean time between stops;
    within a few percent of the optimum while C is far below M (Daly 2006, section 3). Never
    shorter than an upload takes: the next one could not begin.
    """
    best = math.sqrt(2 * save_cost_seconds * mtbf_seconds)
    return max(min(best, MAX_INTERVAL_SECONDS), upload_seconds)


def mtbf_seconds(uptimes_seconds: list[float], expected_seconds: float) -> float:
    """The mean time between stops, from how long past attempts lived and what was expected.

    The expectation counts like one attempt: it rules at first and fades as attempts are seen.
    """
    return (sum(uptimes_seconds) + expected_seconds) / (len(uptimes_seconds) + 1)


class Pace:
    """Decides when to save, by `config`, by the clock and by what past saves have cost."""

    def __init__(self, config: CheckpointConfig, start_step: int) -> None:
        self._config = config
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
        self._interval_seconds = interval_seconds(
            cost, self._config.mtbf_hours * 3600, upload_seconds
        )
