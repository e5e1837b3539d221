import pytest

from casallm.errors import ConfigError
from casallm.estimate.architecture import (
    NAMED_SIZES,
    ModelConfig,
    count_params,
    shape_for_params,
)
from casallm.estimate.hardware import GPUS
from casallm.estimate.layout import (
    MAX_BATCH_TOKENS,
    TIGHT,
    Wishes,
    default_batch_tokens,
    fits_ddp,
    most_sequences,
    plan_layout,
    setup_memory,
)
from casallm.estimate.throughput import step_time


def plan(name: str, gpu: str, n_gpus: int = 8, context: int = 2048, n_nodes: int = 1, **wishes):
    return plan_layout(
        NAMED_SIZES[name],
        context,
        GPUS[gpu],
        gpus_per_node=n_gpus,
        n_nodes=n_nodes,
        wishes=Wishes(**wishes),
    )


@pytest.mark.parametrize(
    ("n_params", "tokens"), [(124e6, 2**19), (350e6, 2**19), (1.2e9, 2**20), (7e9, 2**21)]
)
def test_the_batch_grows_with_the_model(n_params: float, tokens: int):
    assert default_batch_tokens(int(n_params)) == tokens


def test_what_is_chosen_fits():
    for name in ("124m", "350m", "1.3b", "6.7b"):
        setup = plan(name, "A100")

        assert setup.micro_batch_size <= most_sequences(setup)
        assert setup.micro_batch_size * setup.n_gpus <= setup.global_batch_size


def test_ddp_is_taken_while_the_model_fits():
    assert plan("1.3b", "A100-80GB").sharding == "ddp"
    assert plan("13b", "A100-80GB").sharding == "fsdp"
    assert not fits_ddp(plan("13b", "A100-80GB"))


BETTER = [
    ("A100", "A100-80GB"),
    ("A100-80GB-PCIE", "A100-80GB"),
    ("H100-PCIE", "H100"),
    ("H100", "H200"),
]


@pytest.mark.parametrize("stack", ["compiled", "eager"])
@pytest.mark.parametrize(("lesser", "better"), BETTER)
def test_a_gpu_with_more_memory_or_faster_links_is_not_slower(lesser, better, stack):
    """But for what it costs to prefer the simpler layout where it has become possible."""
    wishes = Wishes(stack=stack)
    for n_params in (124e6, 1.2e9, 3e9, 7e9, 8e9, 13e9, 30e9, 70e9):
        config = shape_for_params(int(n_params))
        for context, n_nodes in ((1024, 1), (2048, 4), (4096, 1), (8192, 1), (8192, 32)):
            rates = []
            for name in (lesser, better):
                try:
                    setup = plan_layout(
                        config, context, GPUS[name], gpus_per_node=8, n_nodes=n_nodes, wishes=wishes
                    )
                except ConfigError:
                    continue
                rates.append(step_time(setup).tokens_per_second)
            if len(rates) == 2:
                assert rates[1] >= 0.9 * rates[0], f"{n_params:g}, {context}, {n_nodes} nodes"


@pytest.mark.parametrize(("name", "gpu"), [("13b", "H100"), ("175b", "H200"), ("70b", "A100-80GB")])
def test_one_more_machine_does_not_slow_a_job(name: str, gpu: str):
    """GPUs that are too few for another copy of a split model stay idle."""
    config = shape_for_params(70 * 10**9) if name == "70b" else NAMED_SIZES[name]
    before = 0.0
    for n_nodes in range(1, 20):
        try:
            setup = plan_layout(config, 2048, GPUS[gpu], gpus_per_node=8, n_nodes=n_nodes)
        except ConfigError:
            assert not before
            continue
        rate = step_time(setup).tokens_per_second
        assert rate >= 0.95 * before, f"{n_nodes} nodes"
        before = rate


def test_a_split_model_keeps_its_part_of_weights_and_gradients_on_each_gpu():
    config = shape_for_params(70 * 10**9)
    setup = plan_layout(config, 2048, GPUS["H100"], gpus_per_node=8, n_nodes=16)
    n_params, memory = count_params(config), setup_memory(setup)

    assert setup.sharding == "model"
    assert memory.weights == 2 * n_params // setup.parts + 4 * n_params // setup.n_gpus
    assert memory.gradients == 4 * n_params // setup.parts
    assert memory.total <= GPUS["H100"].memory_bytes


def test_nothing_is_packed_too_tightly_where_a_split_is_faster():
    """It was laid out in more memory than there is, at half this rate."""
    config = shape_for_params(70 * 10**9)
    wishes = Wishes(stack="eager")

    setup = plan_layout(config, 512, GPUS["H100"], gpus_per_node=8, n_nodes=2, wishes=wishes)

    assert setup.sequence_split > 1
    assert setup_memory(setup).total <= GPUS["H100"].memory_bytes


def test_models_are_split_where_links_are_slow_or_they_are_large():
    assert plan("6.7b", "H100", n_nodes=4).sharding == "fsdp"
    assert plan("6.7b", "H100-PCIE", n_nodes=4).sharding == "model"
    assert (
        plan_layout(
            shape_for_params(70 * 10**9), 4096, GPUS["H200"], gpus_per_node=8, n_nodes=8
        ).sharding
        == "model"
    )


def test_wishes_are_obeyed():
    setup = plan("350m", "H100", micro_batch_size=6, recompute="full", precision="fp8")

    assert (setup.micro_batch_size, setup.recompute, setup.precision) == (6, "full", "fp8")


@pytest.mark.parametrize("stack", ["compiled", "eager"])
@pytest.mark.parametrize("sharding", ["ddp", "zero1", "fsdp"])
def test_a_sharding_that_is_told_is_laid_out(sharding: str, stack: str):
    setup = plan("1.3b", "H100", n_nodes=2, sharding=sharding, stack=stack)

    assert setup.sharding == sharding
    assert setup.micro_batch_size <= most_sequences(setup)


@pytest.mark.parametrize("stack", ["compiled", "eager"])
def test_nobody_is_taken_to_shard_the_optimizer_alone_unless_told(stack: str):
    for name in ("350m", "1.3b", "6.7b", "13b", "175b"):
        for n_nodes in (1, 16):
            if (name, n_nodes) != ("175b", 1):
                setup = plan(name, "H100", n_nodes=n_nodes, stack=stack)
                assert setup.sharding != "zero1"


def test_a_single_gpu_has_nobody_to_share_with():
    alone = plan("350m", "H100", 1)

    assert all(plan("350m", "H100", 1, sharding=each) == alone for each in ("zero1", "fsdp"))


def test_what_a_program_is_told_to_do_may_be_a_little_too_large():
    """NVIDIA trains Llama 2 70B with two sequences a pass on 64 H100 (its MaxText recipe)."""
    told = {"micro_batch_size": 2, "recompute": "selective", "sharding": "fsdp"}
    config = ModelConfig(
        n_layers=80, d_model=8192, n_heads=64, n_kv_heads=8, d_ff=28_672, vocab_size=32_000
    )
    known = {"gpus_per_node": 8, "n_nodes": 8}

    setup = plan_layout(config, 4096, GPUS["H100"], wishes=Wishes(**told), **known)
    wider = plan_layout(
        config, 4096, GPUS["H100"], wishes=Wishes(**told | {"micro_batch_size": 4}), **known
    )

    assert (setup.micro_batch_size, setup.sequence_split) == (2, 1)
    assert 1 < setup_memory(setup).total / GPUS["H100"].memory_bytes <= TIGHT
    assert wider.sequence_split > 1


def test_an_optimizer_sharded_alone_leaves_long_sequences_to_be_shared():
    """NVIDIA trains Llama 3 8B so on 8 H100, two GPUs to a sequence (its NeMo recipe)."""
    setup = plan("6.7b", "H100", context=16_384, sharding="zero1", recompute="none")

    assert (setup.sharding, setup.sequence_split) == ("zero1", 2)
    assert most_sequences(setup) >= 1


def test_many_gpus_enlarge_the_batch_up_to_what_is_used():
    assert plan("124m", "H100", n_nodes=64).global_batch_size * 2048 >= 512 * 16_384
    assert plan("6.7b", "H100", n_nodes=512).global_batch_size * 2048 == MAX_BATCH_TOKENS


def test_one_gpu_shards_nothing():
    with pytest.raises(ConfigError, match=r"a 12\.8B model .* does not fit 1 x A100 of 42\.4 GB"):
        plan("13b", "A100", 1)


def test_the_tightest_sharded_layout_may_be_a_little_too_large():
    """llm-foundry trained 30B at context 8192 on 8 H100."""
    config = ModelConfig(family="classic", n_layers=48, d_model=7168, n_heads=56, vocab_size=50_432)
    known = {"gpus_per_node": 8, "wishes": Wishes(stack="eager")}

    setup = plan_layout(config, 8192, GPUS["H100"], **known)

    assert (setup.sharding, setup.recompute, setup.micro_batch_size) == ("fsdp", "full", 1)
    assert 1 < setup_memory(setup).total / GPUS["H100"].memory_bytes <= TIGHT
    with pytest.raises(ConfigError, match="does not fit 4 x H100"):
        plan_layout(config, 8192, GPUS["H100"], gpus_per_node=4, wishes=known["wishes"])


@pytest.mark.parametrize("stack", ["compiled", "eager"])
def test_a_sequence_too_long_for_a_gpu_is_shared(stack: str):
    short = plan("6.7b", "H100", context=4096, n_nodes=2, stack=stack)
    long = plan("6.7b", "H100", context=262_144, n_nodes=2, stack=stack)

    assert short.sequence_split == 1
    assert 1 < long.sequence_split <= 16
    assert setup_memory(long).total <= GPUS["H100"].memory_bytes


def test_compiled_programs_split_models_that_need_several_nodes():
    """NVIDIA trains GPT-3 on H100 with 4 GPUs to a product and 8 stages (its NeMo recipes)."""
    compiled = plan("175b", "H100", n_nodes=16)
    eager = plan("175b", "H100", n_nodes=16, stack="eager")

    assert (compiled.sharding, compiled.recompute) == ("model", "none")
    assert (compiled.sequence_split, compiled.stages) == (4, 8)
    assert (eager.sharding, eager.recompute) == ("fsdp", "full")


def test_no_layout_uses_more_gpus_than_there_are():
    for n_nodes in (1, 2, 3, 16, 128):
        setup = plan("13b", "A100", n_nodes=n_nodes, context=8192)

        assert setup.n_gpus % (setup.sequence_split * setup.stages) == 0


def test_a_model_too_large_for_ddp_says_what_ddp_keeps():
    with pytest.raises(ConfigError, match=r"does not fit a single A100 .* keeps all of it on each"):
        plan("13b", "A100", sharding="ddp")


def test_a_micro_batch_that_does_not_fit_gets_the_largest_that_does():
    with pytest.raises(
        ConfigError, match=r"4096 sequences .* the most that fit a GPU by itself are \d+"
    ):
        plan("350m", "A100", micro_batch_size=4096)


def test_fp8_needs_a_gpu_that_has_it():
    with pytest.raises(ConfigError, match="A100 has no fp8"):
        plan("350m", "A100", precision="fp8")


def test_every_size_up_to_a_billion_fits_one_h100():
    for size in (10**6, 10**7, 10**8, 10**9):
        config = shape_for_params(size)

        assert plan_layout(config, 1024, GPUS["H100"], gpus_per_node=1).sharding == "ddp"
