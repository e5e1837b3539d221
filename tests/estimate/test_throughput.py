import math
from dataclasses import replace

import pytest

from casallm.errors import ConfigError
from casallm.estimate import throughput
from casallm.estimate.architecture import NAMED_SIZES, count_matmul_params
from casallm.estimate.hardware import GPUS
from casallm.estimate.throughput import Setup, measured, predict, step_time


def setup(**changes) -> Setup:
    usual = Setup(
        config=NAMED_SIZES["350m"],
        context_length=2048,
        hardware=GPUS["A100-80GB"],
        micro_batch_size=16,
        global_batch_size=256,
        gpus_per_node=8,
    )
    return replace(usual, **changes)


def rate(**changes) -> float:
    return step_time(setup(**changes)).tokens_per_second


def test_the_reference_model_runs_near_what_others_measured():
    """llm.c reaches 62 % on an A100 at this size, our own target is 60 %."""
    mfu = throughput.mfu(rate(), setup())

    assert 0.5 < mfu < 0.7


def test_parts_add_up_to_the_step():
    time = step_time(setup())
    parts = (time.matrix, time.attention, time.tail, time.communication, time.optimizer)

    assert time.seconds == pytest.approx(sum(parts))
    assert time.tokens == 256 * 2048


def test_what_ought_to_be_faster_is_faster():
    assert rate(stack="compiled") > rate(stack="eager")
    assert rate(recompute="none") > rate(recompute="selective") > rate(recompute="full")
    assert rate(hardware=GPUS["H100"], precision="fp8") > rate(hardware=GPUS["H100"])
    assert rate(hardware=GPUS["H200"]) > rate(hardware=GPUS["H100"]) > rate()
    assert rate(context_length=1024) > rate() > rate(context_length=4096)
    assert rate(node_bandwidth=200e9, n_nodes=2) > rate(node_bandwidth=5e9, n_nodes=2)
    assert rate(precision="fp32") < rate()


def test_fp8_helps_wide_models_more_and_never_twice():
    def gain(name: str) -> float:
        known = {"config": NAMED_SIZES[name], "hardware": GPUS["H200"], "recompute": "full"}
        return rate(precision="fp8", **known) / rate(**known)

    assert 1 < gain("350m") < gain("6.7b") < throughput.FP8_GAIN


def test_attention_is_at_its_best_with_long_contexts_and_late_kernels():
    def flops(**changes) -> float:
        step = setup(config=NAMED_SIZES["1.3b"], micro_batch_size=1, **changes)
        return step.context_length * step.micro_steps / step_time(step).attention

    assert 2 * flops(context_length=65_536) > flops(context_length=32_768)
    early, late = flops(hardware=GPUS["H100"], stack="eager"), flops(hardware=GPUS["H100"])
    assert late / early > flops() / flops(stack="eager")


@pytest.mark.parametrize(
    ("sharding", "precision", "volume", "times"),
    [
        ("ddp", "bf16", 8, 1),
        ("zero1", "bf16", 6, 1),
        ("zero1", "fp8", 5, 1),
        ("zero1", "fp32", 8, 1),
        ("fsdp", "bf16", 6, 2),
        ("fsdp", "fp8", 4, 2),
    ],
)
def test_bytes_of_a_weight_that_travel_in_a_step_of_two_passes(sharding, precision, volume, times):
    step = setup(hardware=GPUS["H100"], sharding=sharding, precision=precision)
    moved = volume * count_matmul_params(step.config) * 7 / 8
    seconds = throughput.load_constants().exposed * moved / step.hardware.link_bandwidth

    assert step.micro_steps == 2
    assert step_time(step).communication == pytest.approx(times * seconds)


def test_sharing_a_sequence_costs_an_exchange_and_changes_no_work():
    whole = setup(hardware=GPUS["H100"], sharding="model", config=NAMED_SIZES["6.7b"])
    shared = replace(whole, sequence_split=4)
    one, four = step_time(whole), step_time(shared)

    assert shared.pass_tokens * shared.micro_steps == whole.pass_tokens * whole.micro_steps
    assert four.tokens == one.tokens
    assert four.attention == pytest.approx(one.attention)
    assert four.communication > one.communication


def test_deep_pipelines_wait_and_full_batches_hide_it():
    known = {"hardware": GPUS["H100"], "sharding": "model", "config": NAMED_SIZES["13b"]}
    flat = rate(**known, micro_batch_size=1, sequence_split=2)
    deep = rate(**known, micro_batch_size=1, sequence_split=2, stages=4)
    full = rate(**known, micro_batch_size=1, sequence_split=2, stages=4, global_batch_size=4096)

    assert deep < full
    assert deep > 0.9 * flat


def test_more_gpus_are_faster_but_not_more_than_in_proportion():
    one, eight = rate(gpus_per_node=1), rate(gpus_per_node=8)
    sixteen = rate(gpus_per_node=8, n_nodes=2)

    assert 0.9 * 8 * one < eight <= 8 * one
    assert eight < sixteen <= 2 * eight


def test_wider_models_use_a_gpu_better():
    narrow = throughput.mfu(rate(config=NAMED_SIZES["124m"]), setup(config=NAMED_SIZES["124m"]))
    wide = throughput.mfu(rate(config=NAMED_SIZES["6.7b"]), setup(config=NAMED_SIZES["6.7b"]))

    assert wide > narrow


def test_a_tiny_model_waits_for_the_host():
    config = NAMED_SIZES["tiny"]
    small = step_time(setup(config=config, micro_batch_size=1, context_length=128))

    assert small.seconds > config.n_layers * throughput.LAUNCH_SECONDS["compiled"]


def test_the_interval_is_wider_where_less_is_known():
    known, unknown = predict(setup()), predict(setup(hardware=GPUS["L4"]))
    far = predict(setup(n_nodes=16))

    assert known.p10 < known.p50 < known.p90
    assert unknown.sigma > known.sigma
    assert far.sigma > known.sigma
    assert known.p90 / known.p50 < known.p50 / known.p10


def test_casallms_own_rate_is_promised_with_prudence():
    published, own = predict(setup()), predict(setup(), is_own=True)

    assert own.p50 == pytest.approx(throughput.PRUDENCE * published.p50)
    assert own.p90 < published.p90
    assert own.p90 / own.p50 == pytest.approx(own.p50 / own.p10)


def test_on_a_gpu_that_no_run_has_calibrated_less_is_promised():
    b200, h200 = (predict(setup(hardware=GPUS[gpu]), is_own=True) for gpu in ("B200", "H200"))
    published = predict(setup(hardware=GPUS["B200"]))

    assert b200.p50 == pytest.approx(throughput.prudence(GPUS["B200"]) * published.p50)
    assert throughput.prudence(GPUS["B200"]) < throughput.PRUDENCE
    assert 1.4 < b200.p50 / h200.p50 < 1.75


def test_a_measured_rate_replaces_the_prediction():
    own = measured(70_000)

    assert own.p50 == 70_000
    assert own.sigma < predict(setup()).sigma / 4


@pytest.mark.parametrize("nonsense", [0, -1, math.nan, math.inf])
def test_a_measured_rate_that_is_none_is_refused(nonsense: float):
    with pytest.raises(ConfigError, match="must be positive"):
        measured(nonsense)
