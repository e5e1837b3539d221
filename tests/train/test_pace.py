import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casallm.train.checkpoint import CheckpointConfig
from casallm.train.pace import Pace, interval_seconds, mtbf_seconds


@pytest.mark.parametrize(
    ("cost", "mtbf_hours", "minutes"),
    [
        (21, 1.36, 7.4),
        (21, 3.2, 11.4),
        (21, 16.7, 26.4),
        (2, 1.36, 2.3),
        (2, 3.2, 3.6),
        (2, 16.7, 8.2),
    ],
)
def test_the_interval_is_that_of_youngs_formula(cost: float, mtbf_hours: float, minutes: float):
    # the table of the real spot traces: cost of a save, hours between preemptions, best interval
    seconds = interval_seconds(cost, mtbf_hours * 3600, upload_seconds=0)

    assert seconds / 60 == pytest.approx(minutes, rel=0.03)


@given(st.floats(1e-3, 1e3), st.floats(60, 1e6))
def test_no_other_interval_loses_less(cost: float, mtbf: float):
    def lost(interval: float) -> float:
        return cost / interval + interval / (2 * mtbf)

    best = math.sqrt(2 * cost * mtbf)

    assert interval_seconds(cost, mtbf, 0) == min(best, 1800)
    assert lost(best) <= min(lost(best * 1.01), lost(best / 1.01))


def test_the_interval_is_never_shorter_than_an_upload_nor_longer_than_half_an_hour():
    assert interval_seconds(0.01, 3600, upload_seconds=120) == 120
    assert interval_seconds(10, 10**9, upload_seconds=0) == 1800


def test_the_expected_time_between_stops_fades_as_stops_are_seen():
    assert mtbf_seconds([], 86400) == 86400
    assert mtbf_seconds([3600] * 9, 86400) == pytest.approx((9 * 3600 + 86400) / 10)


def test_checkpoints_by_steps(monkeypatch: pytest.MonkeyPatch):
    pace = Pace(CheckpointConfig(every_steps=10), start_step=25)

    assert next(step for step in range(25, 40) if pace.is_due(step)) == 35
    pace.saved(37)
    assert not pace.is_due(46)
    assert pace.is_due(47)


def test_checkpoints_by_time(monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    monkeypatch.setattr("casallm.train.pace.time.monotonic", lambda: now)
    fixed = Pace(CheckpointConfig(every_seconds=30), start_step=0)
    computed = Pace(CheckpointConfig(mtbf_hours=1), start_step=0)

    now += 31
    assert (fixed.is_due(1), computed.is_due(1)) == (True, False)
    now += 30
    assert computed.is_due(1)
    computed.saved(1)
    computed.measured(stall_seconds=1.0, upload_seconds=20.0)
    now += 119
    assert not computed.is_due(2)
    now += 2
    assert computed.is_due(2)
