"""Published shapes, parameters and FLOPs, and a sensible shape for every request."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casallm.config import build
from casallm.errors import ConfigError
from casallm.estimate.architecture import (
    NAMED_SIZES,
    ModelConfig,
    count_matmul_params,
    count_params,
    flops_per_token,
    kv_cache_bytes,
    named_size,
    shape_for_params,
)


def classic(n_layers, d_model, n_heads, vocab_size):
    return ModelConfig(
        family="classic",
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        vocab_size=vocab_size,
    )


@pytest.mark.parametrize(
    ("name", "n_params"),
    [("350m", 344_180_736), ("124m", 123_661_824), ("tiny", 4_459_264)],
)
def test_named_sizes_have_exactly_so_many_parameters(name, n_params):
    assert count_params(named_size(name)) == n_params


@pytest.mark.parametrize(
    ("n_layers", "d_model", "n_heads", "published"),
    [(12, 768, 12, 124_439_808), (24, 1024, 16, 354_823_168), (48, 1600, 25, 1_557_611_200)],
    ids=["gpt2", "gpt2-medium", "gpt2-xl"],
)
def test_classic_is_gpt_2_without_learned_positions_and_qkv_biases(
    n_layers, d_model, n_heads, published
):
    config = classic(n_layers, d_model, n_heads, vocab_size=50_257)

    positions, qkv_biases = 1024 * d_model, 3 * d_model * n_layers
    padding = (config.padded_vocab_size - 50_257) * d_model

    assert count_params(config) == published - positions - qkv_biases + padding


@pytest.mark.parametrize(
    ("name", "billions"),
    [("760m", 0.76), ("1.3b", 1.3), ("2.7b", 2.7), ("6.7b", 6.7), ("13b", 13.0), ("175b", 175.0)],
)
def test_gpt_3s_table_is_met_within_its_rounding(name, billions):
    config = named_size(name).model_copy(update={"vocab_size": 50_257})

    positions = 2048 * config.d_model

    # The table has two or three digits.
    assert (count_params(config) + positions) / 1e9 == pytest.approx(billions, rel=0.02)


def test_modern_is_counted_as_qwen3_is():
    # Qwen3-8B, from its model card: 8.2B parameters, 6.95B without embeddings.
    config = ModelConfig(
        n_layers=36,
        d_model=4096,
        n_heads=32,
        n_kv_heads=8,
        d_ff=12_288,
        vocab_size=151_936,
        is_tied=False,
    )

    embeddings = 2 * 151_936 * 4096
    assert count_params(config) == 8_190_735_360
    assert (count_params(config) - embeddings) / 1e9 == pytest.approx(6.95, abs=0.005)


def test_the_reference_needs_2_668_gflop_a_token():
    reference = named_size("350m")

    assert flops_per_token(reference, 2048) / 1e9 == pytest.approx(2.668, abs=0.0005)
    causal = flops_per_token(reference, 2048, "causal")
    assert causal / 1e9 == pytest.approx(2.366, abs=0.0005)
    assert flops_per_token(reference, 2048) - causal == 6 * 24 * 1024 * 2048


@pytest.mark.parametrize(
    ("shape", "context", "tokens_per_second", "mfu", "peak"),
    [
        ((32, 4096, 32), 2048, 10_475, 0.4571, 989e12),
        ((32, 2560, 20), 2048, 23_422, 0.4243, 989e12),
    ],
    ids=["MPT-7b", "MPT-3b"],
)
def test_published_throughput_gives_the_published_utilisation(
    shape, context, tokens_per_second, mfu, peak
):
    # llm-foundry, scripts/train/benchmarking/README.md; its N counts learned positions and norms.
    config = classic(*shape, vocab_size=50_368)

    ours = tokens_per_second * flops_per_token(config, context) / peak

    assert ours == pytest.approx(mfu, rel=0.005)


def test_the_head_is_computed_once_tied_or_not():
    tied = ModelConfig(n_layers=2, d_model=128, n_heads=2, vocab_size=1024)
    untied = tied.model_copy(update={"is_tied": False})

    assert count_params(untied) - count_params(tied) == 1024 * 128
    assert count_matmul_params(untied) == count_matmul_params(tied)
    assert flops_per_token(untied, 256) == flops_per_token(tied, 256)


def test_grouped_heads_shrink_the_cache_and_not_the_scores():
    full = ModelConfig(n_layers=4, d_model=512, n_heads=8, vocab_size=1024)
    grouped = full.model_copy(update={"n_kv_heads": 2})

    assert kv_cache_bytes(full, 100) == 2 * 4 * 512 * 100 * 2
    assert kv_cache_bytes(grouped, 100) * 4 == kv_cache_bytes(full, 100)
    assert kv_cache_bytes(full, 100, bytes_per_value=4) == 2 * kv_cache_bytes(full, 100)
    assert count_params(full) - count_params(grouped) == 4 * 2 * 512 * (512 - 128)


def test_the_vocabulary_is_padded_to_whole_tiles():
    config = named_size("350m")

    assert config.padded_vocab_size == config.vocab_size == 40_960
    assert config.model_copy(update={"vocab_size": 50_263}).padded_vocab_size == 50_304


@given(exponent=st.floats(min_value=6.0, max_value=12.0))
def test_every_request_from_1m_to_1t_gets_a_sensible_shape(exponent):
    n_params = round(10**exponent)

    config = shape_for_params(n_params)

    assert count_params(config) == pytest.approx(n_params, rel=0.03)
    assert config.family == "modern"
    assert config.d_model % 128 == config.ff_width % 128 == 0
    assert config.d_head in (32, 64, 128)
    assert 2 <= config.ff_width / config.d_model <= 4
    assert 12 <= config.d_model / config.n_layers <= 132
    assert config.padded_vocab_size * config.d_model < 0.6 * n_params


@given(n_params=st.integers(50_000_000, 20_000_000_000), vocab_size=st.integers(4_000, 50_000))
def test_a_given_vocabulary_is_kept(n_params, vocab_size):
    config = shape_for_params(n_params, vocab_size)

    assert config.vocab_size == vocab_size
    assert count_params(config) == pytest.approx(n_params, rel=0.03)


def test_names_are_read_in_any_case():
    assert named_size("350M") is NAMED_SIZES["350m"]


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (
            lambda: named_size("350"),
            "there is no size '350', did you mean 350m? (sizes: tiny, 124m, 350m, 350m-modern,"
            " 760m, 1.2b, 1.3b, 2.7b, 6.7b, 13b, 175b)",
        ),
        (
            lambda: shape_for_params(10**30),
            "1000000000000000000T parameters are more than any model has: ask for 1M to 1T",
        ),
        (
            lambda: shape_for_params(1000),
            "1K parameters make no sensible shape: ask for 1M to 1T",
        ),
        (
            lambda: build(ModelConfig, {"n_layers": 2, "d_model": 100, "n_heads": 3}),
            "settings: model.d_model 100 is not a multiple of model.n_heads 3: 2 would divide it",
        ),
        (
            lambda: build(ModelConfig, {"n_layers": 2, "d_model": 6, "n_heads": 2}),
            "settings: heads are 3 wide, but RoPE needs an even width",
        ),
        (
            lambda: build(
                ModelConfig, {"n_layers": 2, "d_model": 64, "n_heads": 4, "n_kv_heads": 3}
            ),
            "settings: model.n_heads 4 is not a multiple of model.n_kv_heads 3: 2 would divide it",
        ),
        (
            lambda: build(
                ModelConfig,
                {"family": "classic", "n_layers": 2, "d_model": 64, "n_heads": 4, "n_kv_heads": 2},
            ),
            "settings: the classic family has neither grouped heads nor an untied head",
        ),
    ],
    ids=["name", "too large", "too small", "width", "odd head", "groups", "classic"],
)
def test_what_has_no_shape_is_refused_in_a_sentence(act, message):
    with pytest.raises(ConfigError) as refusal:
        act()

    assert str(refusal.value) == message


def test_counting_needs_no_torch():
    program = "import casallm.estimate.architecture, sys; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
