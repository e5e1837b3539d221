"""Attention within the documents of packed rows: no mask, and no work across documents.

Where documents begin is told as offsets into the flattened rows (int32), ended and padded with
B * T. On a GPU, in half precision, FlashAttention's variable-length kernel takes all documents in
one launch (Dao 2023, arXiv 2307.08691). A CPU, whose kernel would score every pair of a row behind
a mask, takes each document as a call of its own with the causal flag alone; as one custom operator,
so that `torch.compile`, for which nothing may depend on values, keeps the model one graph. Full
precision on a GPU, an older one, and heads of odd widths have neither and use the mask.

Shapes: B batch, H heads, T positions, K head width.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

_VARLEN_CAPABILITY, _VARLEN_HEAD_WIDTHS = (8, 0), range(8, 257, 8)
"""Of the GPU (Ampere and newer) and of a head: what the kernel takes."""

_CAUSAL = (-1, 0)
"""FlashAttention's window: all keys to the left, none to the right."""


def attend_within_documents(
    q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, document_offsets: Tensor
) -> Tensor:
    """Causal attention (BHTK) of each document by itself; heads may be grouped."""
    repeats = q_BHTK.shape[1] // k_BHTK.shape[1]
    if repeats > 1:
        k_BHTK, v_BHTK = (each.repeat_interleave(repeats, dim=1) for each in (k_BHTK, v_BHTK))
    if q_BHTK.is_cpu:
        return _attend(q_BHTK, k_BHTK, v_BHTK, document_offsets)[0]
    return attend_varlen(q_BHTK, k_BHTK, v_BHTK, document_offsets)


def has_document_kernel(x: Tensor, d_head: int) -> bool:
    """Whether documents are attended to without a mask where `x` is and in its type."""
    if x.is_cpu:
        return True
    is_half = x.dtype in (torch.bfloat16, torch.float16)
    return is_half and d_head in _VARLEN_HEAD_WIDTHS and _capability(x.device) >= _VARLEN_CAPABILITY


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def attend_varlen(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, offsets: Tensor) -> Tensor:
    """The same by the variable-length kernel, which wants (B * T, H, K) in half precision."""
    n_rows, _, width, _ = q_BHTK.shape
    q, k, v = (each.transpose(1, 2).flatten(0, 1) for each in (q_BHTK, k_BHTK, v_BHTK))
    mixed = varlen_attn(q, k, v, offsets, offsets, width, width, window_size=_CAUSAL)
    assert isinstance(mixed, Tensor)  # the log-sums are not asked for
    return mixed.view(n_rows, width, *mixed.shape[1:]).transpose(1, 2)


def document_mask(document_offsets: Tensor, n_rows: int, width: int) -> Tensor:
    """True where the key is of the query's document and not after it (B1TS)."""
    places = torch.arange(n_rows * width, device=document_offsets.device)
    ids_BT = torch.searchsorted(document_offsets, places, right=True).view(n_rows, width)
    causal_TS = torch.ones(width, width, dtype=torch.bool, device=places.device).tril()
    same_BTS = ids_BT[:, :, None] == ids_BT[:, None, :]
    return (same_BTS & causal_TS)[:, None]


@torch.library.custom_op("casallm::attend_within_documents", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """The mixtures (BHTK) and the log-sums of the scores (BHT), which the gradient needs."""
    outputs, log_sums = _like_outputs(q, k, v, offsets)
    for row, run in _runs(offsets, q.shape[2]):
        output, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[row, :, run], k[row, :, run], v[row, :, run], 0.0, True
        )
        outputs[row, :, run], log_sums[row, :, run] = output, log_sum
    return outputs, log_sums


@_attend.register_fake
def _like_outputs(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    score_type = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=score_type)


@torch.library.custom_op("casallm::attend_within_documents_backward", mutates_args=())
def _attend_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    outputs: Tensor,
    log_sums: Tensor,
    offsets: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, which have one shape."""
    gradients = _like_gradients(gradient, q)
    for row, run in _runs(offsets, q.shape[2]):
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(each[row, :, run] for each in (gradient, q, k, v, outputs, log_sums)), 0.0, True
        )
        for whole, part in zip(gradients, parts, strict=True):
            whole[row, :, run] = part
    return gradients


@_attend_backward.register_fake
def _like_gradients(gradient: Tensor, q: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def _remember(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, offsets = inputs
    ctx.save_for_backward(q, k, v, *output, offsets)


def _gradients(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*_attend_backward(gradient, *ctx.saved_tensors), None)


_attend.register_autograd(_gradients, setup_context=_remember)


def _runs(offsets: Tensor, width: int) -> Iterator[tuple[slice, slice]]:
    """Where each document stands: its row and its positions."""
    for start, stop in itertools.pairwise(offsets.tolist()):
        if start < stop:
            row = start // width
            yield slice(row, row + 1), slice(start - row * width, stop - row * width)
