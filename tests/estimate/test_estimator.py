import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casallm.errors import ConfigError
from casallm.estimate import inverse
from casallm.estimate.architecture import NAMED_SIZES, ModelConfig, shape_for_params
from casallm.estimate.estimator import Estimate, EstimateRequest, estimate
from casallm.estimate.hardware import GPUS
from casallm.estimate.layout import Wishes
from casallm.estimate.prices import Prices, load_snapshot
from casallm.estimate.scaling import BESIROGLU_2024

NODE = {"hardware": GPUS["A100-80GB"], "n_gpus": 8, "usd_per_gpu_hour": 1.75}


def ask(config: ModelConfig | str | None, prices: Prices | None = None, **changes) -> Estimate:
    named = NAMED_SIZES[config] if isinstance(config, str) else config
    return estimate(EstimateRequest(config=named, prices=prices, **changes))


def loss_of(answer: Estimate) -> float:
    return BESIROGLU_2024.loss(answer.n_params, answer.tokens)


def test_the_recommended_offer_is_the_cheapest_that_ends_in_time(few_prices):
    answer = ask("350m", few_prices)
    usd = [each.bill.usd.p50 for each in answer.offers]

    assert answer.offers[0].name == "aws p4d.24xlarge spot"
    assert usd[0] == min(usd)
    assert usd[1:] == sorted(usd[1:])
    assert "cheapest of" in answer.reason
    assert "without preemptions lambda gpu_1x_a100 costs" in answer.reason


def test_a_deadline_excludes_what_is_too_slow(few_prices):
    answer = ask("350m", few_prices, deadline_hours=4, tokens=10**10)

    assert answer.offers[0].name == "aws p5.48xlarge"
    assert answer.offers[0].bill.hours.p90 <= 4


def test_when_nothing_is_fast_enough_the_fastest_is_named(few_prices):
    answer = ask("350m", few_prices, deadline_hours=0.5, tokens=10**10)

    assert answer.offers[0].name == "aws p5.48xlarge"
    assert answer.reason.startswith("no offer surely ends within 30 min: this is the fastest")
    assert answer.reason.endswith("h; add --nodes")


def test_a_budget_that_the_run_exceeds_is_said(few_prices):
    answer = ask("350m", few_prices, tokens=10**10, budget_usd=20)
    near = ask("350m", few_prices, tokens=10**10, budget_usd=answer.offers[0].bill.usd.p50)

    assert answer.reason.endswith("; it costs more than the budget of $20.00")
    assert "; it may cost more than the budget" in near.reason


def test_without_a_deadline_a_long_run_need_not_be_the_dearest(few_prices):
    answer = ask("1.3b", few_prices, tokens=10**12)

    assert answer.offers[0].name == "aws p4d.24xlarge spot"
    assert "at most 4 times as slow as the fastest it is the cheapest" in answer.reason


def test_money_that_cannot_be_spent_in_time_is_said(few_prices):
    answer = ask(None, few_prices, budget_usd=10**6, deadline_hours=10)

    assert answer.reason.endswith("add --nodes or --deadline")


def test_offers_that_do_not_hold_the_model_are_counted(few_prices):
    answer = ask("1.3b", few_prices)

    assert answer.too_small == 2
    assert all(each.job.setup.sharding == "ddp" for each in answer.offers)


def test_a_machine_with_its_price_needs_no_list():
    answer = ask("1.3b", tokens=26 * 10**9, n_nodes=16, wishes=Wishes(stack="eager"), **NODE)
    (only,) = answer.offers

    assert only.job.usd_per_hour == pytest.approx(128 * 1.75)
    assert only.bill.usd.p50 == pytest.approx(only.bill.hours.p50 * 128 * 1.75, rel=1e-3)
    assert answer.prices.source == "price given"


def test_a_measured_rate_narrows_the_range():
    guessed = ask("350m", **NODE).offers[0].bill.usd
    measured = ask("350m", measured_tokens_per_second=400_000, **NODE).offers[0]

    assert measured.job.rate.p50 == 400_000
    ratio = measured.bill.usd.p90 / measured.bill.usd.p10
    assert ratio < 1.1 < guessed.p90 / guessed.p10


def test_spot_and_on_demand_can_be_asked_for_alone(few_prices):
    assert all(e.job.is_spot for e in ask("350m", few_prices, is_spot=True).offers)
    assert not any(e.job.is_spot for e in ask("350m", few_prices, is_spot=False).offers)


def test_work_is_counted_for_the_context(few_prices):
    answer = ask("350m", few_prices, tokens=10**10)

    assert answer.flops_per_token == pytest.approx(2.668e9, rel=1e-3)
    assert answer.total_flops == answer.flops_per_token * 10**10


@pytest.mark.parametrize("size", ["350m", "1.2b"])
def test_more_machines_with_a_fast_link_are_faster_and_never_more_than_in_proportion(size: str):
    fast = ("p4d.", "p4de.", "p5.48", "p5e.", "p5en.", "p6-b200.")
    snapshot = load_snapshot()
    prices = replace(
        snapshot, offers=tuple(o for o in snapshot.offers if o.instance.startswith(fast))
    )
    rates = []
    for n_nodes in (1, 2, 4, 8):
        offers = ask(size, prices, n_nodes=n_nodes).offers
        rates.append({(e.job.offer.instance, e.job.is_spot): e.job.rate.p50 for e in offers})

    for fewer, more in itertools.pairwise(rates):
        for machine, rate in more.items():
            assert 1 < rate / fewer[machine] <= 2, machine


def test_casallms_own_runs_are_priced_without_recomputation_while_that_fits(few_prices):
    wide = {"context_length": 65_536, "hardware": GPUS["H100"], "n_gpus": 8}
    own = ask("350m", few_prices, **wide).offers[0].job.setup

    assert (own.recompute, own.sharding) == ("none", "ddp")
    needed = ask("1.2b", few_prices, **wide).offers[0].job.setup
    assert needed.recompute != "none"
    with pytest.raises(ConfigError, match="does not fit"):
        ask("1.2b", few_prices, context_length=65_536)


@given(budget=st.floats(0.3, 20_000), more=st.floats(1, 4))
@settings(max_examples=8, deadline=None)
def test_more_budget_never_gives_a_worse_model(budget: float, more: float):
    prices = load_snapshot()

    small = ask(None, prices, budget_usd=budget)
    large = ask(None, prices, budget_usd=budget * more)

    assert loss_of(large) <= loss_of(small) + 1e-12


@pytest.mark.parametrize("config", [None, NAMED_SIZES["350m"]], ids=["any size", "350m"])
def test_the_least_budget_is_enough_and_no_less_is(few_prices, config):
    with pytest.raises(ConfigError) as caught:
        ask(config, few_prices, budget_usd=0.01)
    least = float(str(caught.value).rsplit("--budget ", 1)[1])

    assert ask(config, few_prices, budget_usd=least).offers[0].bill.usd.p90 <= least
    with pytest.raises(ConfigError, match=f"add --budget {least}"):
        ask(config, few_prices, budget_usd=min(0.97 * least, least - 0.011))


def test_the_least_deadline_is_enough_and_no_less_is(few_prices):
    def spend(minutes: float) -> Estimate:
        return ask(None, few_prices, budget_usd=100, deadline_hours=minutes / 60)

    with pytest.raises(ConfigError, match="no model is trained within 5min: nine") as caught:
        spend(5)
    least = int(str(caught.value).rsplit(" ", 1)[1].removesuffix("min"))

    assert spend(least).offers[0].bill.hours.p90 <= least / 60
    with pytest.raises(ConfigError, match=f"add --deadline {least}min"):
        spend(least - 1)


@pytest.mark.parametrize("budget", [3, 30, 300, 3000])
def test_a_budget_holds_in_nine_of_ten_runs_and_is_used(few_prices, budget: float):
    best = ask(None, few_prices, budget_usd=budget).offers[0].bill.usd

    assert best.p90 <= budget
    assert best.p90 >= 0.85 * budget


def test_a_deadline_bounds_what_a_budget_buys(few_prices):
    answer = ask(None, few_prices, budget_usd=1000, deadline_hours=24)

    assert answer.offers[0].bill.hours.p90 <= 24
    assert loss_of(answer) >= loss_of(ask(None, few_prices, budget_usd=1000))


def test_a_budget_for_a_given_size_finds_the_tokens(few_prices):
    answer = ask("350m", few_prices, budget_usd=50)

    assert answer.config == NAMED_SIZES["350m"]
    assert 40 < answer.offers[0].bill.usd.p90 <= 50


def test_no_size_of_the_grid_beats_the_one_found(few_prices):
    """Against trying every size of the grid on every offer."""
    request = EstimateRequest(budget_usd=40, prices=few_prices)
    found = estimate(request)
    losses = []
    for step in range(12, 34):
        try:
            sized = replace(request, config=shape_for_params(inverse.grid_size(step)))
            losses.append(loss_of(estimate(sized)))
        except ConfigError:
            continue

    assert loss_of(found) <= min(losses) + 1e-9


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"config": None}, "no model is named"),
        ({"config": None, "budget_usd": 0.01}, r"a budget of \$0\.010 buys no model"),
        ({"tokens": 10**14}, "more than there are"),
        ({"usd_per_gpu_hour": 2.0}, "needs the machine"),
        ({"measured_tokens_per_second": 5.0}, "belongs to one machine"),
        ({"measured_tokens_per_second": 5.0, "hardware": GPUS["A100"]}, "with its count"),
        ({"context_length": 0}, "must be positive"),
        ({"n_nodes": 0}, "0 nodes train nothing"),
        ({"config": None, "budget_usd": 9.0, "tokens": 10**9}, "finds the tokens itself"),
        (
            {"hardware": GPUS["A100"], "n_gpus": 8, "measured_tokens_per_second": 1e9},
            "times the peak of",
        ),
        ({"cloud": "azur"}, "cloud 'azur'"),
        ({"cloud": "lambda", "is_spot": True}, "no spot price is known"),
        ({"config": NAMED_SIZES["175b"]}, "does not fit"),
        ({"config": NAMED_SIZES["175b"], "budget_usd": 100.0}, "does not fit a single H100"),
    ],
)
def test_nonsense_gets_a_sentence(few_prices, changes: dict, sentence: str):
    request = EstimateRequest(**{"config": NAMED_SIZES["350m"], "prices": few_prices} | changes)

    with pytest.raises(ConfigError, match=sentence):
        estimate(request)


def test_a_single_slow_machine_is_not_called_the_cheapest(few_prices):
    answer = ask("1.3b", few_prices, hardware=GPUS["V100-32GB"], n_gpus=1, usd_per_gpu_hour=1.0)

    assert answer.reason == "it is the machine that was asked for, but may take more than a week"


def test_only_casallms_own_program_is_promised_less(few_prices):
    own = ask("350m", few_prices)
    other = ask("350m", few_prices, is_own=False)

    assert other.offers[0].job.rate.p50 > own.offers[0].job.rate.p50


def test_the_same_request_gives_the_same_cents(few_prices):
    assert ask("350m", few_prices).offers == ask("350m", few_prices).offers


def test_every_named_size_has_an_estimate():
    for name, config in NAMED_SIZES.items():
        if name == "175b":
            continue
        answer = ask(config, load_snapshot(), hardware=GPUS["B200"], n_nodes=2)

        assert math.isfinite(answer.offers[0].bill.usd.p90)
