import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casallm.config import build
from casallm.errors import ConfigError
from casallm.train.budget import BudgetConfig, Purse, plan_early_end


def purse(**config):
    return Purse(
        usd_before=1.0, billed_since=1000.0, run_started=500.0, config=BudgetConfig(**config)
    )


def test_dollars_count_from_boot_and_include_earlier_attempts():
    assert purse(usd_per_hour=10).usd_so_far(1000 + 1800) == pytest.approx(6.0)


def test_without_a_price_there_are_no_dollars_and_no_limit():
    assert purse().usd_so_far(2000) is None
    assert purse().seconds_left(2000) == math.inf


def test_a_budget_on_a_machine_of_unknown_price_is_refused():
    with pytest.raises(ConfigError, match=r"^settings: budget.usd is 5, but what this machine"):
        build(BudgetConfig, {"usd": "5"})


def test_the_nearer_of_budget_and_deadline_counts():
    assert purse(usd=6, usd_per_hour=10).seconds_left(1000) == pytest.approx(1800)
    both = purse(usd=6, usd_per_hour=10, deadline_hours=0.25)
    assert both.seconds_left(1000) == pytest.approx(400)


def test_nothing_is_decided_while_every_step_fits():
    assert plan_early_end(10, 100, seconds_left=1000, seconds_per_step=1) is None


def test_the_decay_begins_when_only_its_share_is_left():
    plans = [
        plan_early_end(step, 1000, seconds_left=520 - step, seconds_per_step=1)
        for step in range(500)
    ]

    begin = next(step for step, plan in enumerate(plans) if plan)
    assert 380 <= begin <= 410
    assert 490 <= plans[begin] <= 500


@given(
    st.integers(0, 10_000),
    st.integers(1, 10_000),
    st.floats(0, 1e6),
    st.floats(1e-3, 1e3),
)
def test_an_early_end_is_always_ahead_and_affordable(step, more, seconds_left, seconds_per_step):
    end = plan_early_end(
        step, step + more, seconds_left=seconds_left, seconds_per_step=seconds_per_step
    )

    if end is not None:
        assert step < end <= step + more
        assert end == step + 1 or (end - step) * seconds_per_step <= seconds_left
