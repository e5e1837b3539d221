"""Attention within documents, held against a mask over whole rows."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import varlen

from casallm.model.documents import attend_varlen, attend_within_documents, document_mask

WIDTH = 16
LENGTHS = ((5, 1, 7, 3), (16,), (1, 15))


def drawn(n_heads: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x_BTHK = torch.randn(len(LENGTHS), WIDTH, n_heads, 8, dtype=torch.float64, generator=generator)
    return x_BTHK.transpose(1, 2).requires_grad_()


def offsets(n_padding: int = 3) -> torch.Tensor:
    lengths = torch.tensor([0, *itertools.chain(*LENGTHS)] + [0] * n_padding)
    return lengths.cumsum(0).to(torch.int32)


def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    ids = torch.zeros(len(LENGTHS), WIDTH)
    for row, lengths in zip(ids, LENGTHS, strict=True):
        row[:] = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = (ids[:, :, None] == ids[:, None, :]) & torch.ones(WIDTH, WIDTH, dtype=torch.bool).tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], enable_gqa=True)


@pytest.mark.parametrize("n_key_heads", [4, 2, 1])
def test_attention_and_its_gradients_equal_those_behind_a_mask(n_key_heads):
    q, k, v = drawn(4, 0), drawn(n_key_heads, 1), drawn(n_key_heads, 2)
    weights = drawn(4, 3).detach()

    found = attend_within_documents(q, k, v, offsets())
    expected = masked(q, k, v)

    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, (q, k, v), weights),
        torch.autograd.grad(expected, (q, k, v), weights),
    )


def test_the_mask_of_the_offsets_is_that_of_the_documents():
    q, k, v = (drawn(4, seed) for seed in range(3))

    mask = document_mask(offsets(), len(LENGTHS), WIDTH)

    torch.testing.assert_close(
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask), masked(q, k, v)
    )


def test_the_operator_keeps_what_torch_compile_asks_of_it():
    inputs = [drawn(4, seed).detach().requires_grad_() for seed in range(3)]

    checks = torch.library.opcheck(
        torch.ops.casallm.attend_within_documents.default, (*inputs, offsets())
    )

    assert set(checks.values()) == {"SUCCESS"}


def by_document(offsets: torch.Tensor, *tensors: torch.Tensor):
    """The parts (1HSK) of tensors (B * T, H, K), document by document."""
    for start, stop in itertools.pairwise(offsets.tolist()):
        if start < stop:
            yield [each[start:stop].transpose(0, 1)[None] for each in tensors]


def kernel(q, k, v, cu_q, cu_k, max_q, max_k, is_causal, scale, window, *_):
    """What torch's variable-length operator calls on a GPU, one document after the other."""
    assert (cu_q.dtype, max_q, is_causal, window) == (torch.int32, WIDTH, True, [-1, 0])
    parts = [
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*each, 0.0, True)
        for each in by_document(cu_q, q, k, v)
    ]
    out = torch.cat([part[0].transpose(0, 1) for part, _ in parts])
    log_sums = torch.cat([part[0] for _, part in parts], dim=-1)
    return out, log_sums, torch.zeros(2, dtype=torch.uint64)


def kernel_backward(gradient, q, k, v, out, log_sums, cu_q, *_):
    """Its gradients."""
    columns = (log_sums.T[:, :, None],)
    parts = [
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *each[:-1], each[-1][..., 0], 0.0, True
        )
        for each in by_document(cu_q, gradient, q, k, v, out, *columns)
    ]
    return tuple(
        torch.cat([part[0].transpose(0, 1) for part in own]) for own in zip(*parts, strict=True)
    )


@pytest.fixture
def kernels_on_cpu():
    """torch's variable-length operator, which has a kernel for GPUs alone, with one for CPUs."""
    varlen._varlen_attn.register_kernel("cpu")(kernel)
    varlen._varlen_attn_backward.register_kernel("cpu")(kernel_backward)


@pytest.mark.parametrize("compile_it", [False, True])
def test_rows_reach_the_variable_length_operator_as_it_wants_them(kernels_on_cpu, compile_it):
    q, k, v = (drawn(4, seed) for seed in range(3))
    weights = drawn(4, 3).detach()
    attend = attend_varlen
    if compile_it:
        attend = torch.compile(attend, fullgraph=True, backend="aot_eager")

    found, expected = attend(q, k, v, offsets()), masked(q, k, v)

    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, (q, k, v), weights),
        torch.autograd.grad(expected, (q, k, v), weights),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("n_key_heads", [4, 1])
def test_the_variable_length_kernel_agrees_with_the_mask(n_key_heads):
    q, k, v = (drawn(n, seed).detach() for seed, n in enumerate((4, n_key_heads, n_key_heads)))
    half = [each.cuda().bfloat16().requires_grad_() for each in (q, k, v)]
    full = [each.detach().double().cpu().requires_grad_() for each in half]
    weights = drawn(4, 3).detach()

    found = torch.compile(attend_within_documents, fullgraph=True)(*half, offsets().cuda())
    expected = masked(*full)

    # bf16 keeps 8 bits
    close = {"atol": 3e-2, "rtol": 3e-2}
    torch.testing.assert_close(found.cpu().double(), expected, **close)
    gradients = torch.autograd.grad(found, half, weights.cuda().bfloat16())
    for mine, own in zip(gradients, torch.autograd.grad(expected, full, weights), strict=True):
        torch.testing.assert_close(mine.cpu().double(), own, **close)
