"""What nobody means gets a sentence; what grows beyond reason in the bill does not."""

import pytest

from casallm.errors import ConfigError
from casallm.estimate.answer import notes, to_json
from casallm.estimate.architecture import NAMED_SIZES, shape_for_params
from casallm.estimate.estimator import EstimateRequest, estimate
from casallm.estimate.hardware import GPUS, parse_gpu
from casallm.estimate.layout import Wishes
from casallm.estimate.plot import plot
from casallm.units import parse_hours, parse_usd

MACHINE = {"hardware": GPUS["H100"], "n_gpus": 8, "usd_per_gpu_hour": 2.0}


@pytest.mark.parametrize("text", ["A100:²", "A100:0", "A100:-1", "A100:"])
def test_a_count_of_gpus_is_a_number(text: str):
    with pytest.raises(ConfigError, match="is not NAME:COUNT"):
        parse_gpu(text)


def test_more_gpus_than_a_machine_has_are_several_machines():
    with pytest.raises(ConfigError, match=r"--gpu A100:8 --nodes 4"):
        parse_gpu("A100:1000")


def test_slips_of_the_keyboard_are_named():
    with pytest.raises(ConfigError, match="more money than there is"):
        parse_usd("1e300", what="--price-per-gpu-hour")
    with pytest.raises(ConfigError, match="more than a century"):
        parse_hours("1e308d", what="--deadline")
    with pytest.raises(ConfigError, match=r"more than anybody has had: 10,000 at most"):
        estimate(EstimateRequest(config=NAMED_SIZES["124m"], n_nodes=10**12, **MACHINE))


def test_a_measured_rate_is_of_one_model(tmp_path):
    measured = {"measured_tokens_per_second": 5e5, **MACHINE}

    with pytest.raises(ConfigError, match="a measured rate belongs to one model"):
        estimate(EstimateRequest(budget_usd=100, **measured))
    answer = estimate(EstimateRequest(config=NAMED_SIZES["350m"], **measured))
    with pytest.raises(ConfigError, match="a measured rate is of one model"):
        plot(answer, tmp_path / "cost.png")


def test_a_machine_with_a_price_is_nowhere():
    with pytest.raises(ConfigError, match="leave out --cloud and --region"):
        estimate(EstimateRequest(config=NAMED_SIZES["124m"], region="mars", **MACHINE))


def test_without_fp8_those_that_have_it_are_named():
    wishes = Wishes(precision="fp8")
    machine = {**MACHINE, "hardware": GPUS["A100"]}

    with pytest.raises(ConfigError, match=r"one of L4, L40S, RTX4090, H100-PCIE, H100, H200, B200"):
        estimate(EstimateRequest(config=NAMED_SIZES["124m"], wishes=wishes, **machine))


def test_the_law_says_nothing_below_a_token_a_parameter():
    request = EstimateRequest(config=NAMED_SIZES["124m"], tokens=1, **MACHINE)

    assert to_json(estimate(request))["expected_loss"] is None


def test_what_make_cannot_run_is_not_recommended_to_it(few_prices):
    ours, others = (
        notes(estimate(EstimateRequest(config=NAMED_SIZES["350m"], prices=few_prices, wishes=each)))
        for each in (Wishes(), Wishes(sharding="fsdp"))
    )

    assert not any("make pretrain CLOUD=aws" in note for note in others)
    assert any("another program" in note for note in others)
    assert not any("another program" in note for note in ours)


def test_each_gpu_saves_its_part_of_what_is_sharded():
    """608 s of stall were counted for 405B on 1,024 GPUs: a quarter of the bill."""
    request = EstimateRequest(
        config=shape_for_params(405 * 10**9), tokens=10**12, n_nodes=128, is_own=False, **MACHINE
    )

    bill = to_json(estimate(request))["offers"][0]["items"]

    assert bill["checkpoints"] < 0.01 * bill["training"]


def test_long_contexts_are_not_evaluated_on_more_tokens():
    short, long = (
        to_json(
            estimate(
                EstimateRequest(
                    config=NAMED_SIZES["350m"], context_length=context, tokens=10**10, **MACHINE
                )
            )
        )["offers"][0]["items"]["evaluation"]
        for context in (2048, 65_536)
    )

    assert long < 30 * short
