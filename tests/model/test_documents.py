"""Attention within documents, held against a mask over whole rows."""

import pytest
import torch
import torch.nn.functional as F

from casallm.model.documents import attend_within_documents

LENGTHS = ((5, 1, 7, 3), (16,), (1, 15))


def drawn(n_heads: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x_BTHK = torch.randn(len(LENGTHS), 16, n_heads, 8, dtype=torch.float64, generator=generator)
    return x_BTHK.transpose(1, 2).requires_grad_()


def document_ids() -> torch.Tensor:
    rows = [torch.repeat_interleave(torch.arange(len(n)), torch.tensor(n)) for n in LENGTHS]
    return torch.stack(rows)


def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    mask = (ids[:, :, None] == ids[:, None, :]) & torch.ones(16, 16, dtype=torch.bool).tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], enable_gqa=True)


@pytest.mark.parametrize("n_key_heads", [4, 2, 1])
def test_attention_and_its_gradients_equal_those_behind_a_mask(n_key_heads):
    q, k, v = drawn(4, 0), drawn(n_key_heads, 1), drawn(n_key_heads, 2)
    weights = drawn(4, 3).detach()

    found = attend_within_documents(q, k, v, document_ids())
    expected = masked(q, k, v, document_ids())

    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, (q, k, v), weights),
        torch.autograd.grad(expected, (q, k, v), weights),
    )


def test_the_operator_keeps_what_torch_compile_asks_of_it():
    inputs = [drawn(4, seed).detach().requires_grad_() for seed in range(3)]

    checks = torch.library.opcheck(
        torch.ops.casallm.attend_within_documents.default, (*inputs, document_ids())
    )

    assert set(checks.values()) == {"SUCCESS"}
