from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from casallm.errors import DataError
from casallm.estimate import spot
from casallm.estimate.spot import (
    Recovery,
    Trace,
    best_interval,
    goodput,
    lives,
    mean_life,
    read_trace,
    replay,
)

QUICK = Recovery(stall=2, upload=30, restart=360)
ASYNC = Recovery(stall=2, upload=60, restart=600)
SYNC = Recovery(stall=72, upload=0, restart=600)

hours = st.floats(0.2, 200)


@pytest.mark.parametrize(
    ("mtbf_hours", "minutes", "share"),
    [(1.36, 7.4, 0.805), (3.2, 11.4, 0.893), (16.7, 26.4, 0.964)],
)
def test_young_and_daly_as_worked_out_for_the_traces(mtbf_hours, minutes, share):
    """faults.md 2.5: 350M, 21 s to save, restart of 10 minutes."""
    saving = Recovery(stall=21, upload=0, restart=600)

    assert best_interval(3600 * mtbf_hours, saving) / 60 == pytest.approx(minutes, rel=0.02)
    assert goodput(3600 * mtbf_hours, saving) == pytest.approx(share, abs=0.002)


@given(mtbf=hours, factor=st.floats(0.2, 5))
def test_no_interval_is_better_than_the_best(mtbf: float, factor: float):
    seconds = 3600 * mtbf
    best = best_interval(seconds, SYNC)

    assert goodput(seconds, SYNC) >= goodput(seconds, SYNC, factor * best) - 1e-12


@given(mtbf=hours, better=st.floats(1, 10))
def test_rarer_preemptions_never_waste_more(mtbf: float, better: float):
    rounding = 1e-12
    assert goodput(3600 * mtbf * better, ASYNC) >= goodput(3600 * mtbf, ASYNC) - rounding


def test_checkpoints_are_never_closer_than_an_upload():
    assert best_interval(600.0, Recovery(stall=0.5, upload=500, restart=60)) == 500


def naive_replay(trace: Trace, recovery: Recovery, interval: float) -> float:
    """Useful seconds by looking at each uninterrupted stretch from outside."""
    useful = 0.0
    stretches = list(lives(trace))
    for i, life in enumerate(stretches):
        is_last = i == len(stretches) - 1 and trace.available[-1] >= trace.nodes
        left = life - recovery.restart
        cycle = interval + recovery.stall
        if is_last:
            useful += max(0, left // cycle * interval + min(interval, left % cycle))
        else:
            useful += max(0, (left - recovery.upload) // cycle) * interval
    return useful


@given(
    ticks=st.lists(st.integers(0, 3), min_size=1, max_size=60).filter(any),
    interval=st.integers(30, 900),
    restart=st.integers(1, 900),
    stall=st.integers(1, 60),
    upload=st.integers(0, 30),
)
def test_the_replay_agrees_with_counting_stretch_by_stretch(
    ticks: list[int], interval: int, restart: int, stall: int, upload: int
):
    trace = Trace("drawn", 300.0, tuple(ticks))
    recovery = Recovery(stall=stall, upload=upload, restart=restart)

    result = replay(trace, recovery, interval)

    assert result.useful == pytest.approx(naive_replay(trace, recovery, interval))
    assert result.paid == 300.0 * sum(count >= trace.nodes for count in ticks)
    assert mean_life(trace) == result.paid / max(1, result.preemptions)


def test_a_machine_that_is_never_taken_trains_all_the_time_but_for_the_start():
    trace = Trace("calm", 60.0, (1,) * 600)

    result = replay(trace, Recovery(stall=0.001, upload=0, restart=600), 3600)

    assert result.preemptions == 0
    assert result.useful == pytest.approx(36_000 - 600, abs=1)


@pytest.mark.parametrize("recovery", [QUICK, ASYNC, SYNC], ids=["quick", "async", "sync"])
def test_goodput_is_within_five_points_of_every_trace(shared_data: Path, recovery: Recovery):
    traces = [read_trace(path) for path in sorted((shared_data / "spot-traces").glob("*.json.gz"))]
    assert len(traces) == 23

    for trace in traces:
        mtbf = mean_life(trace)
        result = replay(trace, recovery, float(best_interval(mtbf, recovery)))
        predicted = float(goodput(mtbf, recovery))
        available = result.paid / result.total

        assert abs(predicted - result.goodput) < 0.05, trace.name
        assert abs(predicted * available - result.progress) < 0.05, trace.name


def test_the_prior_is_what_the_traces_say(shared_data: Path):
    traces = [read_trace(path) for path in (shared_data / "spot-traces").glob("*.json.gz")]

    median, spread = spot.pooled_mtbf(traces)

    assert median == pytest.approx(spot.MTBF_HOURS, rel=0.05)
    assert spread == pytest.approx(spot.MTBF_SPREAD, rel=0.05)


def test_draws_go_through_at_once():
    many = goodput(np.array([3600.0, 36_000.0]), ASYNC)

    assert many.shape == (2,)
    assert many[0] < many[1]


def test_a_file_that_is_no_trace_is_named(tmp_path: Path):
    path = tmp_path / "odd.json"
    path.write_text("{}")

    with pytest.raises(DataError, match=r"odd\.json is not a spot trace"):
        read_trace(path)
