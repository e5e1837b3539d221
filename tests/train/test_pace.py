import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from casallm.estimate.spot import Recovery, goodput
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

    assert seconds / 60 == pytest.approx(minutes, rel=0.06)


@given(st.floats(0.1, 100), st.floats(3600, 1e5))
def test_no_other_interval_loses_less(cost: float, mtbf: float):
    recovery = Recovery(stall=cost, upload=0.0, restart=0.0)
    best = interval_seconds(cost, mtbf, upload_seconds=0)
    assume(best < 1800)

    for other in (best * 1.05, best / 1.05):
        assert goodput(mtbf, recovery, best) > goodput(mtbf, recovery, other)


def test_the_interval_is_never_shorter_than_an_upload_nor_longer_than_half_an_hour():
    assert interval_seconds(0.01, 3600, upload_seconds=120) == 120
    assert interval_seconds(10, 10**9, upload_seconds=0) == 1800


def test_the_expected_time_between_stops_fades_as_stops_are_seen():
    assert mtbf_seconds([], 86400) == 86400
    assert mtbf_seconds([3600] * 9, 86400) == pytest.approx((9 * 3600 + 86400) / 10)


def test_checkpoints_by_steps():
    pace = Pace(CheckpointConfig(every_steps=10), start_step=25, lifetimes_seconds=[])

    assert next(step for step in range(25, 40) if pace.is_due(step)) == 35
    pace.saved(37)
    assert not pace.is_due(46)
    assert pace.is_due(47)


def test_checkpoints_by_time(monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    monkeypatch.setattr("casallm.train.pace.time.monotonic", lambda: now)
    fixed = Pace(CheckpointConfig(every_seconds=30), start_step=0, lifetimes_seconds=[])
    computed = Pace(CheckpointConfig(mtbf_hours=1.5), start_step=0, lifetimes_seconds=[1800])

    now += 31
    assert (fixed.is_due(1), computed.is_due(1)) == (True, False)
    now += 30
    assert computed.is_due(1)
    computed.saved(1)
    computed.measured(stall_seconds=1.0, upload_seconds=20.0)
    now += 115
    assert not computed.is_due(2)
    now += 6
    assert computed.is_due(2)
