import pytest

from casallm.errors import ConfigError
from casallm.estimate.hardware import GIB, GPUS, gpu_named, hardware_of_device, mfu, parse_gpu


@pytest.mark.parametrize(
    ("device", "gib", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", 39.5, "A100"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "A100-80GB"),
        ("NVIDIA H100 80GB HBM3", 79.6, "H100"),
        ("NVIDIA H200", 139.8, "H200"),
        ("NVIDIA A10G", 22, "A10G"),
        ("NVIDIA A10", 22, "A10"),
        ("NVIDIA L4", 22, "L4"),
        ("NVIDIA L40S", 44, "L40S"),
        ("Tesla V100-SXM2-16GB", 16, "V100"),
        ("Tesla V100-SXM2-32GB", 32, "V100-32GB"),
        ("NVIDIA GeForce RTX 4090", 23, "RTX4090"),
        ("Tesla T4", 15, "T4"),
    ],
)
def test_a_device_is_recognised_by_what_torch_calls_it(device: str, gib: float, name: str):
    found = hardware_of_device(device, int(gib * GIB))

    assert found is not None
    assert found.name == name


def test_an_unknown_device_is_none():
    assert hardware_of_device("AMD Instinct MI300X", 192 * GIB) is None


@pytest.mark.parametrize("alias", ["a100-40gb", "A100-40GB", "A100"])
def test_a_gpu_has_its_common_names(alias: str):
    assert gpu_named(alias) is GPUS["A100"]


def test_an_unknown_gpu_gets_the_nearest_name():
    with pytest.raises(ConfigError, match="no GPU 'H1000', did you mean H100"):
        parse_gpu("H1000:8")


@pytest.mark.parametrize("text", ["A100:0", "A100:x", "A100:-1", "A100:"])
def test_a_count_that_is_none_is_refused(text: str):
    with pytest.raises(ConfigError, match="write it as A100:8"):
        parse_gpu(text)


def test_no_gpu_sustains_more_than_its_peak():
    for gpu in GPUS.values():
        assert 0 < gpu.sustained_fraction < 1
        assert 0 < gpu.attention_fraction <= 1


def test_mfu_of_the_reference_model_on_an_a100():
    """facts: 50,000 tokens/s at 2.668 GFLOP a token are 42.8 %."""
    assert mfu(50_000, 2.668e9, GPUS["A100"], 1) == pytest.approx(0.428, abs=5e-4)
