"""Cached passes against uncached ones: in chunks, one by one, in company, and after forgetting."""

import pytest
import torch

from casallm.model.kv_cache import KVCache

TOLERANCE = 1e-5
"""fp32: sums of the same few products in another order."""


def feed(model, cache, slots, tokens_BT):
    return model(tokens_BT, cache=cache.rows(slots, tokens_BT.shape[1]))


@pytest.fixture
def cache(config):
    return KVCache(config, n_slots=4, context_length=48)


@torch.no_grad()
@pytest.mark.parametrize("chunks", [(40,), (16, 16, 8), (1, 30, 9), (7, *[1] * 33)], ids=str)
def test_any_split_of_the_tokens_gives_the_uncached_logits(model, cache, tokens_BT, chunks):
    expected = model(tokens_BT)

    pieces = [feed(model, cache, (0, 1, 2), chunk) for chunk in tokens_BT.split(chunks, dim=1)]

    assert (torch.cat(pieces, dim=1) - expected).abs().max() < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("slots", [(0, 1, 2), (3, 0, 2)], ids=["adjacent", "scattered"])
def test_slots_of_different_lengths_decode_together_as_alone(model, cache, tokens_BT, slots):
    starts = (3, 20, 11)
    for slot, row, start in zip(slots, tokens_BT, starts, strict=True):
        feed(model, cache, (slot,), row[None, :start])
    expected = model(tokens_BT)

    for n in range(15):
        next_B1 = torch.stack(
            [row[s + n : s + n + 1] for row, s in zip(tokens_BT, starts, strict=True)]
        )
        logits_B1V = feed(model, cache, slots, next_B1)

        for b, start in enumerate(starts):
            assert (logits_B1V[b, 0] - expected[b, start + n]).abs().max() < TOLERANCE
    assert [cache.lengths[slot] for slot in slots] == [18, 35, 26]


@torch.no_grad()
def test_chunks_of_different_conversations_run_together(model, cache, tokens_BT):
    feed(model, cache, (0,), tokens_BT[:1, :9])
    feed(model, cache, (1,), tokens_BT[1:2, :2])

    logits_BTV = feed(model, cache, (0, 1), torch.stack((tokens_BT[0, 9:20], tokens_BT[1, 2:13])))

    expected = model(tokens_BT)
    assert (logits_BTV[0] - expected[0, 9:20]).abs().max() < TOLERANCE
    assert (logits_BTV[1] - expected[1, 2:13]).abs().max() < TOLERANCE


@torch.no_grad()
def test_what_was_truncated_is_never_seen_again(model, cache, tokens_BT):
    feed(model, cache, (2,), tokens_BT[:1])
    cache.truncate(2, 10)

    logits_BTV = feed(model, cache, (2,), tokens_BT[1:2, 10:])

    joined = torch.cat((tokens_BT[:1, :10], tokens_BT[1:2, 10:]), dim=1)
    assert (logits_BTV - model(joined)[:, 10:]).abs().max() < TOLERANCE


@torch.no_grad()
def test_a_failed_pass_leaves_the_conversation_as_it_was(model, cache, tokens_BT):
    feed(model, cache, (0,), tokens_BT[:1, :10])

    with pytest.raises(IndexError):
        feed(model, cache, (0,), torch.full((1, 5), 10_000))
    logits_BTV = feed(model, cache, (0,), tokens_BT[:1, 10:])

    assert (logits_BTV - model(tokens_BT[:1])[:, 10:]).abs().max() < TOLERANCE


def test_the_cache_takes_the_bytes_that_were_counted(config):
    from casallm.estimate.architecture import kv_cache_bytes

    cache = KVCache(config, n_slots=3, context_length=48, dtype=torch.bfloat16)

    assert cache.k_LNHSK.nbytes + cache.v_LNHSK.nbytes == 3 * kv_cache_bytes(config, 48)
