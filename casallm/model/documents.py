"""Attention within the documents of packed rows, for a CPU: no mask and no work across documents.

A mask tensor makes the CPU's kernel score every pair of a row, also those that it then discards.
Here each document is a call of its own with the causal flag alone. As one custom operator, so that
`torch.compile`, for which nothing may depend on values, keeps the model one graph.

Shapes: B batch, H heads, T positions, K head width.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def attend_within_documents(
    q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, document_ids_BT: Tensor
) -> Tensor:
    """Causal attention (BHTK) of each run of one id in a row by itself; heads may be grouped."""
    repeats = q_BHTK.shape[1] // k_BHTK.shape[1]
    if repeats > 1:
        k_BHTK, v_BHTK = (each.repeat_interleave(repeats, dim=1) for each in (k_BHTK, v_BHTK))
    return _attend(q_BHTK, k_BHTK, v_BHTK, document_ids_BT)[0]


@torch.library.custom_op("casallm::attend_within_documents", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The mixtures (BHTK) and the log-sums of the scores (BHT), which the gradient needs."""
    outputs, log_sums = _like_outputs(q, k, v, document_ids)
    for row, run in _runs(document_ids):
        output, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[row, :, run], k[row, :, run], v[row, :, run], 0.0, True
        )
        outputs[row, :, run], log_sums[row, :, run] = output, log_sum
    return outputs, log_sums


@_attend.register_fake
def _like_outputs(q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor) -> tuple[Tensor, Tensor]:
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
    document_ids: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, which have one shape."""
    gradients = _like_gradients(gradient, q)
    for row, run in _runs(document_ids):
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
    q, k, v, document_ids = inputs
    ctx.save_for_backward(q, k, v, *output, document_ids)


def _gradients(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*_attend_backward(gradient, *ctx.saved_tensors), None)


_attend.register_autograd(_gradients, setup_context=_remember)


def _runs(document_ids: Tensor) -> Iterator[tuple[slice, slice]]:
    """Where each document stands: its row and its positions."""
    n_tokens = document_ids.shape[1]
    is_new = document_ids[:, 1:] != document_ids[:, :-1]
    for row, changes in enumerate(is_new):
        bounds = [0, *(changes.nonzero().flatten() + 1).tolist(), n_tokens]
        for start, stop in itertools.pairwise(bounds):
            yield slice(row, row + 1), slice(start, stop)
