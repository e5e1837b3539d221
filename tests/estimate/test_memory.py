import pytest
import torch

from casallm.estimate.architecture import (
    NAMED_SIZES,
    ModelConfig,
    count_matmul_params,
    count_params,
)
from casallm.estimate.hardware import GIB, GPUS
from casallm.estimate.memory import (
    Precision,
    Sharding,
    Shards,
    compiled_block_bytes,
    largest_micro_batch,
    saved_tensors,
    training_memory,
)
from casallm.model.gpt import build_gpt
from casallm.model.loss import TrainingLoss

SHAPES = [
    {"family": "classic"},
    {"family": "classic", "d_ff": 200, "vocab_size": 384},
    {"family": "modern"},
    {"family": "modern", "n_kv_heads": 1, "is_tied": False},
    {"family": "modern", "n_kv_heads": 2, "d_ff": 192, "vocab_size": 256},
]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def hooked_bytes(config: ModelConfig, n_sequences: int, length: int, precision: Precision) -> int:
    """What torch itself saves, each storage once, parameters and buffers left out."""
    module = TrainingLoss(build_gpt(config, length))
    kept = [*module.parameters(), *module.buffers()]
    owned = {tensor.untyped_storage().data_ptr() for tensor in kept}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            saved[storage.data_ptr()] = tensor
        return tensor

    tokens = torch.randint(0, config.vocab_size, (n_sequences, length))
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"),
    ):
        loss = module(tokens, tokens.roll(-1, 1))
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_activations_are_what_torch_saves_to_the_byte(shape: dict, precision: Precision):
    config = ModelConfig(**{"n_layers": 3, "d_model": 64, "n_heads": 4, "vocab_size": 300} | shape)

    for n_sequences, length in ((2, 16), (1, 7)):
        expected = hooked_bytes(config, n_sequences, length, precision)
        assert saved_tensors(config, n_sequences, length, precision).total == expected


def test_a_compiled_block_keeps_less_than_an_uncompiled_one():
    for config in NAMED_SIZES.values():
        eager = saved_tensors(config, 1, 1).blocks / config.n_layers

        assert compiled_block_bytes(config) < eager


@pytest.mark.parametrize("stack", ["compiled", "eager"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_the_largest_micro_batch_fits_and_one_more_does_not(stack, recompute):
    config, gpu = NAMED_SIZES["350m"], GPUS["A100"]
    how = {"stack": stack, "recompute": recompute}

    most = largest_micro_batch(config, 2048, gpu, **how)

    assert most > 0
    assert training_memory(config, most, 2048, **how).total <= gpu.memory_bytes
    assert training_memory(config, most + 1, 2048, **how).total > gpu.memory_bytes


def test_recomputing_and_sharding_save_memory():
    config = NAMED_SIZES["1.3b"]

    def total(**how) -> int:
        return training_memory(config, 4, 2048, **how).total

    assert total(recompute="full") < total(recompute="selective") < total()
    assert total(shards=Shards("fsdp", 8)) < total(shards=Shards("zero1", 8)) < total()
    assert total(stack="compiled") < total(stack="eager")


def test_state_is_sixteen_bytes_a_parameter():
    config = NAMED_SIZES["124m"]
    memory = training_memory(config, 1, 128)

    state = memory.weights + memory.gradients + memory.optimizer

    assert state == 16 * count_params(config)
    assert memory.margin > GIB


@pytest.mark.parametrize(
    ("sharding", "precision", "fixed", "divided"),
    [
        ("ddp", "bf16", 16, 0),
        ("zero1", "bf16", 6, 12),
        ("zero1", "fp8", 6, 12),
        ("zero1", "fp32", 8, 8),
        ("fsdp", "bf16", 0, 16),
    ],
)
def test_state_on_many_gpus_is_what_zero_divides(
    sharding: Sharding, precision: Precision, fixed: int, divided: int
):
    """Of ZeRO-1 as Megatron-Core's guide to its distributed optimizer counts it."""
    config = NAMED_SIZES["124m"]

    for n_gpus in (2, 8, 64):
        shards = Shards(sharding, n_gpus)
        memory = training_memory(config, 1, 128, precision=precision, shards=shards)
        state = memory.weights + memory.gradients + memory.optimizer
        expected = (fixed + divided / n_gpus) * count_params(config)
        assert state == pytest.approx(expected, abs=3)


def test_weights_that_stay_whole_are_not_cast_a_second_time():
    config = NAMED_SIZES["124m"]
    whole, kept = (
        training_memory(config, 1, 128, shards=Shards(sharding, 8)) for sharding in ("ddp", "zero1")
    )

    assert whole.activations - kept.activations == 2 * count_matmul_params(config)


def test_a_model_that_does_not_fit_has_no_micro_batch():
    assert largest_micro_batch(NAMED_SIZES["13b"], 2048, GPUS["A100"]) == 0
