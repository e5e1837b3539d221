import pytest
from hypothesis import given
from hypothesis import strategies as st

from casallm.train.schedule import FinishEarly, ScheduleConfig, last_step, lr_fraction

COSINE = ScheduleConfig(warmup_fraction=0.1, final_fraction=0.1)
WSD = ScheduleConfig(name="wsd", warmup_fraction=0.1, final_fraction=0.0, decay_fraction=0.2)


def rates(config, steps, early=()):
    return [lr_fraction(step, steps, config, early) for step in range(last_step(steps, early))]


def test_cosine_warms_up_peaks_and_ends_at_its_floor():
    fractions = rates(COSINE, 100)

    assert fractions[:10] == pytest.approx([k / 10 for k in range(1, 11)])
    assert fractions[10] == pytest.approx(1.0)
    assert fractions[-1] == pytest.approx(0.1)
    assert fractions[10:] == sorted(fractions[10:], reverse=True)


def test_cosine_is_half_way_down_in_the_middle():
    config = ScheduleConfig(warmup_fraction=0, final_fraction=0)

    assert lr_fraction(50, 101, config) == pytest.approx(0.5)


def test_wsd_is_flat_until_its_decay():
    fractions = rates(WSD, 100)

    assert set(fractions[10:80]) == {1.0}
    assert fractions[-1] == 0.0
    assert fractions[89] == pytest.approx(0.5)


@pytest.mark.parametrize("config", [COSINE, WSD])
@given(data=st.data(), steps=st.integers(20, 500))
def test_an_early_end_falls_from_where_it_was_to_the_floor(config, data, steps):
    step = data.draw(st.integers(1, steps - 2))
    end = data.draw(st.integers(step + 1, steps - 1))

    before, after = rates(config, steps), rates(config, steps, [FinishEarly(step, end)])

    assert len(after) == end
    assert after[:step] == before[:step]
    assert after[-1] == pytest.approx(min(config.final_fraction, before[step]))
    assert after[step:] == sorted(after[step:], reverse=True)


def test_a_later_early_end_replaces_an_earlier_one_from_its_step_on():
    first, second = FinishEarly(50, 80), FinishEarly(60, 70)

    fractions = rates(COSINE, 100, [first, second])

    assert fractions[:60] == rates(COSINE, 100, [first])[:60]
    assert len(fractions) == 70
    assert fractions[-1] == pytest.approx(0.1)
