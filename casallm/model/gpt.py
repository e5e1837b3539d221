"""The transformer, in two families, written from PyTorch primitives and read top to bottom.

* classic: GPT-3 (Brown et al. 2020, arXiv 2005.14165) with rotary positions: LayerNorm, tanh-GELU,
  biases everywhere but in the query, key and value projections, tied embeddings. Its weights fit
  transformers' GPT-NeoX with sequential residuals.
* modern: RMSNorm (eps 1e-6), learned QK-norm over the head width, SwiGLU, grouped-query attention,
  no bias. Its weights fit transformers' Qwen3.

Both rotate whole heads, half against half, with theta 10,000 (Su et al. 2021, arXiv 2104.09864,
in GPT-NeoX's arrangement), and normalise before each sub-layer. There is no dropout.

Weights are fp32 and stay so; under bf16 autocast the residual stream is bf16 as well, while norms
and rotations compute in fp32. Shapes are static and nothing depends on values, so that
`torch.compile` takes the whole model as one graph. Query, key and value (gate and up) are matrices
of their own: as one product they were no faster compiled on a CPU, and Muon treats each alone.

Shapes: B batch, T query positions, S cached positions, D model width, H heads (fewer for keys and
values when grouped), K head width, F feed-forward width, V padded vocabulary.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from casallm.estimate.architecture import ModelConfig
from casallm.model.documents import (
    attend_within_documents,
    document_mask,
    has_document_kernel,
)
from casallm.model.kv_cache import CacheRows

ROPE_THETA = 10_000.0
LAYER_NORM_EPS = 1e-5
RMS_NORM_EPS = 1e-6
INIT_STD = 0.02
"""Standard deviation of GPT-2's and GPT-3's matrices, and of every embedding and head here."""


class GPT(nn.Module):
    """A decoder-only transformer of the given shape, for up to `context_length` positions.

    New weights mean nothing until `reset_parameters` or a checkpoint sets them; `build_gpt` does
    it all.
    """

    rope_bits: Tensor

    def __init__(self, config: ModelConfig, context_length: int) -> None:
        super().__init__()
        self.config = config
        self.context_length = context_length
        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.final_norm = _norm(config)
        self.head = (
            None
            if config.is_tied
            else nn.Linear(config.d_model, config.padded_vocab_size, bias=False)
        )
        self.register_buffer("rope_bits", rope_table_bits(config, context_length), persistent=False)

    def forward(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        document_offsets: Tensor | None = None,
        cache: CacheRows | None = None,
    ) -> Tensor:
        """Logits over the padded vocabulary (BTV) for the token after each position.

        Positions count from 0 unless given. With `document_offsets` (see `documents`) a token sees
        only its own document. Rows padded on the right need neither: the future is never seen.
        """
        return self.logits(self.hidden(tokens_BT, positions_BT, document_offsets, cache))

    def hidden(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        document_offsets: Tensor | None = None,
        cache: CacheRows | None = None,
    ) -> Tensor:
        """The normalised residual stream (BTD) behind the last block."""
        mask = None
        x_BTD = _to_compute_type(self.embedding(tokens_BT))
        if document_offsets is not None and not has_document_kernel(x_BTD, self.config.d_head):
            mask, document_offsets = document_mask(document_offsets, *tokens_BT.shape), None
        if cache is not None:
            positions_BT, mask = cache.positions_BT, cache.mask_B1TS
        assert tokens_BT.shape[1] <= self.context_length
        cos, sin = self._rotations(positions_BT, tokens_BT.shape[1])
        lookup = Lookup(cos, sin, mask, cache, document_offsets)
        for block in self.blocks:
            x_BTD = block(x_BTD, lookup)
        if cache is not None:
            cache.commit()
        return self.final_norm(x_BTD)

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """What the head makes of the hidden states: scores over the padded vocabulary (BTV)."""
        return F.linear(hidden_BTD, self.head_weight)

    @property
    def head_weight(self) -> Tensor:
        """The matrix that scores the vocabulary: the embedding's own when tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Set every weight as published, the same from a seed on every device and machine.

        classic (GPT-2, GPT-3): normal with standard deviation 0.02, divided by sqrt(2 n_layers)
        for the projections back into the residual stream. modern: those projections are zero, so
        that each block starts as the identity (Yang et al. 2022, arXiv 2203.03466, appendix D.2),
        and what reads the stream has 1/sqrt(d_model), as in nanochat: 0.28 nats below 0.02 after
        300 steps of the tiny shape. Embedding and head 0.02; norms one; biases zero. (So a wide
        tied model first predicts its own input, with a loss near 0.02 d_model, for some five
        steps; a smaller embedding avoids that and was no better after 30.) Drawn on the CPU in
        the order of the names.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in sorted(self.named_parameters()):
            if parameter.ndim == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            drawn = torch.zeros(parameter.shape, device="cpu")
            std = self._initial_std(name)
            parameter.copy_(drawn.normal_(0.0, std, generator=generator) if std else drawn)

    def _initial_std(self, name: str) -> float:
        is_output = name.endswith((".out.weight", ".down.weight"))
        if self.config.family == "classic":
            return INIT_STD / math.sqrt(2 * self.config.n_layers) if is_output else INIT_STD
        if is_output:
            return 0.0
        return 1 / math.sqrt(self.config.d_model) if name.startswith("blocks.") else INIT_STD

    def _rotations(self, positions_BT: Tensor | None, n_tokens: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of each position's angles, (T or BT) x 1 x K/2."""
        table = self.rope_bits.view(torch.float32)
        table = table[:, :n_tokens] if positions_BT is None else table[:, positions_BT]
        return table[0].unsqueeze(-2), table[1].unsqueeze(-2)


def build_gpt(
    config: ModelConfig,
    context_length: int,
    *,
    seed: int | None = 0,
    device: torch.device | str = "cpu",
) -> GPT:
    """A model on `device`, initialised from `seed`; with None for a checkpoint to fill."""
    with torch.device("meta"):
        model = GPT(config, context_length)
    model.to_empty(device=device)
    model.rope_bits.copy_(rope_table_bits(config, context_length))
    if seed is not None:
        model.reset_parameters(seed)
    return model


class Lookup(NamedTuple):
    """What every block of one forward pass needs to know beyond the residual stream."""

    cos: Tensor
    sin: Tensor
    mask: Tensor | None
    """True where a query may look (B1TS); None: the causal flag alone."""
    cache: CacheRows | None
    document_offsets: Tensor | None = None
    """Where documents begin, each of which attends to itself: instead of a mask."""


class Block(nn.Module):
    """Attention, then the MLP, each added to the stream that it reads through a norm."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = _norm(config)
        self.attention = Attention(config, layer)
        self.mlp_norm = _norm(config)
        self.mlp = ClassicMLP(config) if config.family == "classic" else SwiGLU(config)

    def forward(self, x_BTD: Tensor, lookup: Lookup) -> Tensor:
        """The residual stream with both contributions added."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), lookup)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class Attention(nn.Module):
    """Causal self-attention with rotary positions, grouped heads and, when modern, QK-norm."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.d_head = config.d_head
        self.is_grouped = config.kv_heads != config.n_heads
        d_kv = config.kv_heads * config.d_head
        self.q = nn.Linear(config.d_model, config.d_model, bias=False)
        self.k = nn.Linear(config.d_model, d_kv, bias=False)
        self.v = nn.Linear(config.d_model, d_kv, bias=False)
        self.out = nn.Linear(config.d_model, config.d_model, bias=config.family == "classic")
        is_modern = config.family == "modern"
        self.q_norm = RMSNorm(config.d_head) if is_modern else nn.Identity()
        self.k_norm = RMSNorm(config.d_head) if is_modern else nn.Identity()

    def forward(self, x_BTD: Tensor, lookup: Lookup) -> Tensor:
        """Each position's mixture of the values it may see."""
        q_BTHK = self._heads(self.q(x_BTD))
        k_BTHK = self._heads(self.k(x_BTD))
        v_BHTK = self._heads(self.v(x_BTD)).transpose(1, 2)
        q_BHTK = rotate(self.q_norm(q_BTHK), lookup.cos, lookup.sin).transpose(1, 2)
        k_BHTK = rotate(self.k_norm(k_BTHK), lookup.cos, lookup.sin).transpose(1, 2)
        if lookup.cache is not None:
            k_BHTK, v_BHTK = lookup.cache.update(self.layer, k_BHTK, v_BHTK)
        y_BHTK = self._attend(q_BHTK, k_BHTK, v_BHTK, lookup)
        return self.out(y_BHTK.transpose(1, 2).flatten(2))

    def _attend(self, q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, lookup: Lookup) -> Tensor:
        if lookup.document_offsets is not None:
            return attend_within_documents(q_BHTK, k_BHTK, v_BHTK, lookup.document_offsets)
        return F.scaled_dot_product_attention(
            q_BHTK,
            k_BHTK,
            v_BHTK,
            attn_mask=lookup.mask,
            # Without a mask the keys are as many as the queries, or there is one query, which
            # sees all: the flag counts from the first key and would hide the rest from it.
            is_causal=lookup.mask is None and q_BHTK.shape[2] > 1,
            enable_gqa=self.is_grouped,
        )

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.d_head)


def rotate(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair (i, i + K/2) of a head turned by its position's i-th angle, computed in fp32."""
    first, second = x_BTHK.float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x_BTHK.dtype)


def rope_table_bits(config: ModelConfig, context_length: int) -> Tensor:
    """Cosines and sines of every position's angles (2 x context x K/2), as the bits of fp32.

    As integers, because `.to(torch.bfloat16)` would round a floating-point buffer. Computed in
    fp32 throughout, as other runtimes do, so that ours and theirs agree.
    """
    exponents = torch.arange(0, config.d_head, 2).float() / config.d_head
    angles = torch.outer(torch.arange(context_length).float(), ROPE_THETA**-exponents)
    return torch.stack((angles.cos(), angles.sin())).view(torch.int32)


class ClassicMLP(nn.Module):
    """Two layers with biases around a tanh-approximated GELU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.d_model, config.ff_width)
        self.down = nn.Linear(config.ff_width, config.d_model)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """The stream's next contribution, position by position."""
        return self.down(F.gelu(self.up(x_BTD), approximate="tanh"))


class SwiGLU(nn.Module):
    """A gated MLP without biases (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.d_model, config.ff_width, bias=False)
        self.up = nn.Linear(config.d_model, config.ff_width, bias=False)
        self.down = nn.Linear(config.ff_width, config.d_model, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """The stream's next contribution, position by position."""
        return self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))


class RMSNorm(nn.Module):
    """x over its root mean square, times a learned weight; computed in fp32, returned as x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """`x` normalised over its last axis."""
        weight = self.weight.float()
        return F.rms_norm(x.float(), weight.shape, weight, RMS_NORM_EPS).to(x.dtype)


class LayerNorm(nn.Module):
    """x less its mean, over its deviation, scaled and shifted; computed in fp32, returned as x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """`x` normalised over its last axis."""
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), weight.shape, weight, bias, LAYER_NORM_EPS).to(x.dtype)


def _norm(config: ModelConfig) -> LayerNorm | RMSNorm:
    make: Callable[[int], LayerNorm | RMSNorm]
    make = LayerNorm if config.family == "classic" else RMSNorm
    return make(config.d_model)


def _to_compute_type(x: Tensor) -> Tensor:
    """`x` in bf16 under such an autocast, so that the residual stream is half as wide.

    Under fp16, which overflows at 65,504, the stream stays fp32.
    """
    device_type = x.device.type
    if not torch.is_autocast_enabled(device_type):
        return x
    is_bf16 = torch.get_autocast_dtype(device_type) == torch.bfloat16
    return x.bfloat16() if is_bf16 else x
