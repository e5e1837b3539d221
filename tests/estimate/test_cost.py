"""Property tests of the bill, and its figures."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casallm.estimate.architecture import NAMED_SIZES
from casallm.estimate.cost import (
    Interval,
    compare_with_paid,
    middle_of,
    price_job,
    usd_so_far,
    usd_to_finish,
)
from casallm.estimate.hardware import GPUS
from casallm.estimate.job import Job
from casallm.estimate.layout import plan_layout
from casallm.estimate.prices import GIVEN, Offer
from casallm.estimate.throughput import Throughput, predict

P4D = Offer("aws", "us-east-1", "", "p4d.24xlarge", GPUS["A100"], 8, 21.96, 6.29)
LAMBDA = replace(P4D, cloud="lambda", instance="gpu_8x_a100", on_demand=15.92, spot=None)
SETUP = plan_layout(NAMED_SIZES["350m"], 2048, GPUS["A100"], gpus_per_node=8)

tokens = st.integers(10**8, 10**12)


def job(n_tokens: int = 10**10, *, is_spot: bool = True, **changes) -> Job:
    return replace(Job(P4D, is_spot, SETUP, predict(SETUP), n_tokens), **changes)


def items(bill) -> dict[str, float]:
    return {item.name: item.usd for item in bill.items}


@given(n_tokens=tokens, is_spot=st.booleans())
@settings(max_examples=30)
def test_twice_the_tokens_is_twice_the_training_line(n_tokens: int, is_spot: bool):
    once = items(price_job(job(n_tokens, is_spot=is_spot)))["training"]
    twice = items(price_job(job(2 * n_tokens, is_spot=is_spot)))["training"]

    assert twice == pytest.approx(2 * once, abs=0.0151)


@given(mtbf=st.floats(0.2, 100), rarer=st.floats(1, 10))
@settings(max_examples=30)
def test_more_preemption_is_never_cheaper_or_faster(mtbf: float, rarer: float):
    often, rarely = price_job(job(mtbf_hours=mtbf)), price_job(job(mtbf_hours=mtbf * rarer))

    half_cents = 0.005 * len(often.items)
    assert often.usd.p50 >= rarely.usd.p50 - half_cents
    assert often.hours.p50 >= rarely.hours.p50 * (1 - 1e-12)
    often_hours, often_usd = middle_of(job(mtbf_hours=mtbf))
    rarely_hours, rarely_usd = middle_of(job(mtbf_hours=mtbf * rarer))
    assert often_hours >= rarely_hours * (1 - 1e-12)
    assert often_usd >= rarely_usd * (1 - 1e-12)


@given(n_tokens=tokens, is_spot=st.booleans(), offer=st.sampled_from([P4D, LAMBDA]))
@settings(max_examples=30)
def test_items_sum_to_the_total_to_the_cent(n_tokens: int, is_spot: bool, offer: Offer):
    bill = price_job(job(n_tokens, is_spot=is_spot and offer.spot is not None, offer=offer))

    assert round(sum(item.usd for item in bill.items), 2) == bill.usd.p50
    assert bill.usd.p10 <= bill.usd.p50 <= bill.usd.p90
    assert bill.hours.p10 <= bill.hours.p50 <= bill.hours.p90


def test_the_same_inputs_give_the_same_cents():
    assert price_job(job()) == price_job(job())


def test_every_item_says_where_it_comes_from():
    for item in price_job(job()).items:
        assert item.usd >= 0
        assert any(sign in item.source for sign in ("x $", "tokens/s", "every", "restarts")), item


def test_on_demand_has_no_preemptions_and_no_controller():
    bill = price_job(job(is_spot=False))

    assert not {"preemptions", "controller"} & items(bill).keys()
    assert bill.preemptions == 0
    assert bill.goodput > 0.99


def test_a_bucket_in_another_cloud_costs_egress():
    assert "egress" not in items(price_job(job(is_spot=False)))
    away = items(price_job(job(is_spot=False, offer=LAMBDA)))

    assert away["egress"] == pytest.approx(10**10 * 2 / 1e9 * 0.09, abs=0.01)
    assert "disk" not in away


def test_a_given_price_pays_for_hours_alone():
    machine = replace(P4D, cloud=GIVEN)
    bill = price_job(job(is_spot=False, offer=machine))

    assert items(bill).keys() == {"training", "startup", "evaluation", "checkpoints"}
    assert bill.usd.p50 == pytest.approx(bill.hours.p50 * 21.96, abs=0.05)


def test_the_reference_run_on_a_p4d():
    """10B tokens of 344M at 70,000 tokens/s a GPU and $21.96/h are 4.96 h and $108.9."""
    bill = price_job(job(is_spot=False, rate=Throughput(560_000, 0.0)))

    assert items(bill)["training"] == pytest.approx(108.93, abs=0.02)


def test_a_run_that_is_nearly_sure_has_a_narrow_range():
    sure = price_job(job(is_spot=False, rate=Throughput(560_000, 0.02))).usd
    vague = price_job(job(is_spot=False)).usd

    assert sure.p90 / sure.p10 < 1.07 < vague.p90 / vague.p10


def test_dollars_of_a_running_job():
    assert usd_so_far(1800, 21.96) == pytest.approx(10.98)
    assert usd_so_far(1800, 21.96, usd_before=5) == pytest.approx(15.98)
    assert usd_to_finish(1800, 21.96) == pytest.approx(10.98)


def test_paid_against_predicted_is_one_sentence():
    predicted = Interval(80, 100, 120)

    assert compare_with_paid(predicted, 110) == (
        "paid $110, predicted $100 ($80.00 to $120): +10%, inside the 80 % interval"
    )
    assert "-50%, outside" in compare_with_paid(predicted, 50)
