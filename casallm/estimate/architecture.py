"""Shapes of the two model families and everything that can be counted from them.

Parameters, matrix weights, training FLOPs and cache bytes follow from a `ModelConfig` alone;
`tests/model/test_gpt.py` holds them against instantiated models to the last parameter. Sizes
are those of GPT-3's Table 2.1 (Brown et al. 2020, arXiv 2005.14165) where they are consistent:
1.3B has 16 heads of 128 and 13B is 5,120 wide.
"""

import math
from collections.abc import Iterator
from typing import Literal

from pydantic import Field, model_validator

from casallm.config import Config, nearest
from casallm.errors import ConfigError
from casallm.units import format_count

Convention = Literal["standard", "causal"]

VOCAB_MULTIPLE = 128
"""Embedding and head are padded to this many rows: tensor cores like whole tiles."""

DEFAULT_VOCAB_SIZE = 40_960
"""The reference vocabulary: trained, six special tokens included."""

MOST_PARAMS = 10**12
"""The largest size that gets a shape."""

TIED_BELOW = 1_000_000_000
"""`shape_for_params` ties embedding and head below this size, as Qwen3 does."""


class ModelConfig(Config):
    """The shape of one model; GPT-3's names, then those that came later."""

    family: Literal["classic", "modern"] = "modern"
    """classic: GPT-3 with RoPE, exports as GPT-NeoX. modern: exports as Qwen3."""
    n_layers: int = Field(gt=0)
    """Transformer blocks."""
    d_model: int = Field(gt=0)
    """Width of the residual stream."""
    n_heads: int = Field(gt=0)
    """Query heads; their width is d_model / n_heads."""
    n_kv_heads: int | None = Field(default=None, gt=0)
    """Key and value heads of grouped-query attention (modern only); empty: as many as n_heads."""
    d_ff: int | None = Field(default=None, gt=0)
    """Width of the MLP; empty: 4 d_model (classic), 8/3 d_model to the next 128 (modern)."""
    vocab_size: int = Field(default=DEFAULT_VOCAB_SIZE, gt=0)
    """Real token ids, special tokens included; the matrices are padded beyond it."""
    is_tied: bool = True
    """Whether the output head is the embedding matrix."""

    @model_validator(mode="after")
    def _consistent(self) -> "ModelConfig":
        if self.d_model % 2:
            raise ValueError(
                f"model.d_model {self.d_model} is odd, but the halves of each head rotate in pairs:"
                f" take {self.d_model + 1}"
            )
        if self.d_model % self.n_heads:
            raise ValueError(
                f"model.d_model {self.d_model} is not a multiple of model.n_heads {self.n_heads}:"
                f" {_nearest_divisor(self.d_model // 2, self.n_heads)} would divide it"
            )
        if self.d_head % 2:
            raise ValueError(f"heads are {self.d_head} wide, but RoPE needs an even width")
        if self.n_heads % self.kv_heads:
            raise ValueError(
                f"model.n_heads {self.n_heads} is not a multiple of model.n_kv_heads"
                f" {self.kv_heads}: {_nearest_divisor(self.n_heads, self.kv_heads)} would divide it"
            )
        if self.family == "classic" and (self.kv_heads != self.n_heads or not self.is_tied):
            raise ValueError("the classic family has neither grouped heads nor an untied head")
        return self

    @property
    def d_head(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def ff_width(self) -> int:
        """Width of the MLP's hidden layer."""
        if self.d_ff is not None:
            return self.d_ff
        return 4 * self.d_model if self.family == "classic" else _swiglu_width(self.d_model)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and the head."""
        return math.ceil(self.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def _nearest_divisor(number: int, wanted: int) -> int:
    for distance in range(min(wanted, 10_000)):
        for near in (wanted - distance, wanted + distance):
            if number % near == 0:
                return near
    return 1


def _swiglu_width(d_model: int) -> int:
    """8/3 of the width, so that three matrices hold what two of 4x did (Shazeer 2020)."""
    return math.ceil(8 * d_model / 3 / 128) * 128


def _classic(n_layers: int, d_model: int, n_heads: int, vocab_size: int) -> ModelConfig:
    return ModelConfig(
        family="classic",
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        vocab_size=vocab_size,
    )


NAMED_SIZES: dict[str, ModelConfig] = {
    "tiny": ModelConfig(n_layers=4, d_model=256, n_heads=4, vocab_size=4096),
    "124m": _classic(12, 768, 12, 50_304),
    "350m": _classic(24, 1024, 16, DEFAULT_VOCAB_SIZE),
    "350m-modern": ModelConfig(n_layers=24, d_model=1024, n_heads=8),
    "760m": _classic(24, 1536, 16, DEFAULT_VOCAB_SIZE),
    "1.2b": ModelConfig(n_layers=24, d_model=1920, n_heads=15, is_tied=False),
    "1.3b": _classic(24, 2048, 16, DEFAULT_VOCAB_SIZE),
    "2.7b": _classic(32, 2560, 32, DEFAULT_VOCAB_SIZE),
    "6.7b": _classic(32, 4096, 32, DEFAULT_VOCAB_SIZE),
    "13b": _classic(40, 5120, 40, DEFAULT_VOCAB_SIZE),
    "175b": _classic(96, 12288, 96, DEFAULT_VOCAB_SIZE),
}


def named_size(name: str) -> ModelConfig:
    """The shape called `name`; ConfigError with the nearest name if there is none."""
    if name.lower() not in NAMED_SIZES:
        hint = nearest(name, NAMED_SIZES)
        raise ConfigError(f"there is no size {name!r}{hint} (sizes: {', '.join(NAMED_SIZES)})")
    return NAMED_SIZES[name.lower()]


def count_params(config: ModelConfig) -> int:
    """Every weight and bias of the model, vocabulary padding included, tied ones once."""
    embedding = config.padded_vocab_size * config.d_model
    heads = embedding if config.is_tied else 2 * embedding
    return heads + config.n_layers * _block_params(config) + _norm_params(config)


def count_matmul_params(config: ModelConfig) -> int:
    """Weights used in a matrix product: the head once, tied or not; no embedding lookup."""
    head = config.padded_vocab_size * config.d_model
    return head + config.n_layers * _block_matmul_params(config)


def flops_per_token(
    config: ModelConfig, context_length: int, convention: Convention = "standard"
) -> int:
    """Training FLOPs (forward and backward) of one token at full context.

    6 per matrix weight: a multiply and an add, once forward and twice backward. Attention scores
    and their product with the values cost 12 n_layers d_attn context (PaLM, Chowdhery et al. 2022,
    appendix B: *standard*), or half of it where the masked half is not counted (*causal*).
    Left out: norms, activations, softmax, RoPE, optimizer; together under 1 % above 100M.
    """
    d_attn = config.n_heads * config.d_head
    factor = 12 if convention == "standard" else 6
    return 6 * count_matmul_params(config) + factor * config.n_layers * d_attn * context_length


def kv_cache_bytes(config: ModelConfig, n_tokens: int, bytes_per_value: int = 2) -> int:
    """Bytes of keys and values kept for `n_tokens` of one conversation, all layers."""
    per_token = 2 * config.n_layers * config.kv_heads * config.d_head
    return per_token * n_tokens * bytes_per_value


def shape_for_params(n_params: int, vocab_size: int | None = None) -> ModelConfig:
    """The modern shape nearest in proportion to good practice, within 3 % of `n_params`.

    Widths are multiples of 128. Depth follows width as in GPT-3's table, where width over depth
    rises from about 50 at 125M to 128 at 13B. `vocab_size` shrinks with small models unless given,
    so that the embedding stays below about a third of the parameters.
    """
    if n_params > MOST_PARAMS:
        raise ConfigError(
            f"{format_count(n_params)} parameters are more than any model has: ask for 1M to 1T"
        )
    vocabs = [vocab_size] if vocab_size else _vocabs_for_params(n_params)
    shapes: list[ModelConfig] = []
    for vocab in vocabs:
        shapes += (c for c in _candidates(n_params, vocab) if _error(c, n_params) <= 0.03)
        best = min(shapes, key=lambda shape: _awkwardness(shape, n_params), default=None)
        if best is not None and (_awkwardness(best, n_params) < 0.8 or vocab == vocabs[-1]):
            return best
    at_vocab = f" with a vocabulary of {vocab_size:,}" if vocab_size else ""
    raise ConfigError(
        f"{format_count(n_params)} parameters make no sensible shape{at_vocab}: ask for 1M to 1T"
    )


def _vocabs_for_params(n_params: int) -> list[int]:
    """Vocabularies to try, the preferred one first; small models need the finer steps.

    A width of 128 or 256 leaves few depths: another vocabulary may give better proportions.
    """
    finer = sorted(range(1_024, 6_145, 256), key=lambda size: abs(size - 4_096))
    for preferred in (DEFAULT_VOCAB_SIZE, 16_384, 8_192):
        if preferred * math.sqrt(n_params / 200) < n_params / 3:
            return [preferred, *finer]
    return finer


def _candidates(n_params: int, vocab_size: int) -> Iterator[ModelConfig]:
    is_tied = n_params < TIED_BELOW
    for d_model in range(128, 32_768 + 1, 128):
        # A block has at least ten squares of the width, and no model rounds to one block.
        if d_model * vocab_size + 15 * d_model**2 > n_params:
            return
        for d_ff in (_swiglu_width(d_model) + 128 * k for k in range(-2, 3)):
            if not 2 * d_model <= d_ff <= 4 * d_model:
                continue
            one = _modern(1, d_model, d_ff, vocab_size, is_tied=is_tied)
            fixed = count_params(one) - _block_params(one)
            n_layers = round((n_params - fixed) / _block_params(one))
            if n_layers >= 2:
                yield _modern(n_layers, d_model, d_ff, vocab_size, is_tied=is_tied)


def _modern(
    n_layers: int, d_model: int, d_ff: int, vocab_size: int, *, is_tied: bool
) -> ModelConfig:
    d_head = 128 if d_model >= 512 else 64 if d_model >= 256 else 32
    return ModelConfig(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=d_model // d_head,
        d_ff=None if d_ff == _swiglu_width(d_model) else d_ff,
        vocab_size=vocab_size,
        is_tied=is_tied,
    )


def _error(config: ModelConfig, n_params: int) -> float:
    return abs(count_params(config) / n_params - 1)


def _awkwardness(config: ModelConfig, n_params: int) -> float:
    """How far a shape is from usual proportions; one unit is about a factor of e in aspect."""
    aspect = min(max(64 * (n_params / 350e6) ** 0.2, 32), 128)
    depth_to_width = math.log(config.d_model / config.n_layers / aspect)
    mlp = math.log(config.ff_width / _swiglu_width(config.d_model))
    return abs(depth_to_width) + 2 * abs(mlp) + 5 * _error(config, n_params)


def _block_matmul_params(config: ModelConfig) -> int:
    attention = 2 * config.d_model * config.d_head * (config.n_heads + config.kv_heads)
    matrices = 2 if config.family == "classic" else 3
    return attention + matrices * config.d_model * config.ff_width


def _block_params(config: ModelConfig) -> int:
    small = 2 * _norm_params(config)
    if config.family == "classic":
        small += config.d_model + config.ff_width + config.d_model
    else:
        small += 2 * config.d_head
    return _block_matmul_params(config) + small


def _norm_params(config: ModelConfig) -> int:
    return 2 * config.d_model if config.family == "classic" else config.d_model
