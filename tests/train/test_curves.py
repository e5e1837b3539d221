import numpy as np
import pytest

from casallm.train.curves import (
    MAX_POINTS,
    Curve,
    curve_of,
    frame,
    is_smoothed,
    smoothed,
    spread,
    thinned,
)


def curve(values) -> Curve:
    y = np.asarray(values, np.float64)
    return Curve(np.arange(len(y), dtype=np.float64), y)


def test_lines_without_the_number_are_left_out():
    lines = [{"tokens": 1, "loss": 2.0}, {"tokens": 2, "loss": None}, {"tokens": 3, "lr": 1.0}]

    found = curve_of(lines, "loss")

    assert (found.x.tolist(), found.y.tolist()) == ([1.0], [2.0])


def test_no_lines_are_an_empty_curve():
    assert len(curve_of([], "loss")) == 0


def test_smoothing_is_the_mean_of_the_neighbours():
    values = np.random.default_rng(0).normal(size=300)

    mean = smoothed(curve(values)).y

    naive = [np.mean(values[max(0, i - 3) : i + 4]) for i in range(300)]  # 2 % of 300, centred
    assert mean == pytest.approx(naive)


def test_smoothing_a_short_curve_changes_nothing():
    short = curve(range(99))

    assert smoothed(short).y.tolist() == short.y.tolist()
    assert not is_smoothed(short)
    assert is_smoothed(curve(range(100)))


def test_a_long_curve_is_thinned_to_means_that_keep_its_mean():
    long = curve(np.random.default_rng(0).random(MAX_POINTS * 100))

    thin = thinned(long)

    assert len(thin) == MAX_POINTS
    assert thin.y.mean() == pytest.approx(long.y.mean())


def test_a_short_curve_is_not_thinned():
    short = curve([1.0, 2.0])

    assert thinned(short) is short


def test_thinning_hides_no_peak_from_the_band():
    values = np.zeros(50_000)
    values[31_415], values[9_265] = 7.0, -3.0

    band = spread(curve(values))

    assert (band.high.max(), band.low.min()) == (7.0, -3.0)


def test_a_frame_leaves_the_steep_beginning_out():
    values = np.concatenate([np.linspace(10, 4, 10), np.linspace(4, 3, 190)])

    low, high = frame(curve(values))

    assert 2.9 < low < 3.0
    assert 4.0 < high < 6.0


def test_a_frame_holds_what_it_is_told_to_hold():
    low, high = frame(curve([3.0, 3.0, 3.0]), others=[4.1, 2.0])

    assert low < 2.0
    assert high > 4.1


@pytest.mark.parametrize("value", [0.0, 2.5, -1.0])
def test_a_flat_curve_has_a_frame_around_it(value):
    low, high = frame(curve([value, value]))

    assert low < value < high
