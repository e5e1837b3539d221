import json
import logging
import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from casallm.data.prepare import prepare
from casallm.data.sources import open_source
from casallm.evals import bigram
from casallm.evals.bigram import bigram_loss, dataset_bigram_loss, first_windows

VOCAB = 50
PROSE = "the model reads a page of text and learns what comes next while it waits"


def markov_tokens(n_tokens: int, seed: int, dtype: type = np.uint16) -> np.ndarray:
    """Tokens that follow each other by fixed odds, some of them rare."""
    rng = np.random.default_rng(7)
    odds = rng.dirichlet(np.full(VOCAB, 0.1), size=VOCAB).cumsum(axis=1)
    draws = np.random.default_rng(seed).random(n_tokens)
    tokens = [0]
    for draw in draws[1:]:
        tokens.append(min(int(np.searchsorted(odds[tokens[-1]], draw)), VOCAB - 1))
    return np.array(tokens, dtype)


def naive_nll(train: list[np.ndarray], windows: list[np.ndarray], weights) -> list[float]:
    """The formula with dicts and floats, one prediction after the other."""
    pairs = Counter(pair for tokens in train for pair in pairwise(tokens.tolist()))
    first: Counter[int] = Counter()
    second: Counter[int] = Counter()
    for (v, w), count in pairs.items():
        first[v] += count
        second[w] += count
    total = sum(pairs.values())
    nll = []
    for window in windows:
        for v, w in pairwise(window.tolist()):
            unigram = second[w] / total
            follows = pairs[v, w] / first[v] if first[v] else unigram
            p = weights[0] * follows + weights[1] * unigram + weights[2] / VOCAB
            nll.append(-math.log(p))
    return nll


@pytest.fixture(scope="module")
def shards() -> list[np.ndarray]:
    return [markov_tokens(n, seed) for seed, n in enumerate([9_000, 5_000, 1, 20])]


@pytest.fixture(scope="module")
def windows() -> list[np.ndarray]:
    return list(first_windows([markov_tokens(3_000, 99)], 64, 10_000))


def test_the_loss_is_that_of_a_naive_dictionary(shards, windows):
    result = bigram_loss(shards, windows, VOCAB)

    expected = naive_nll(shards, windows, result.weights)
    assert result.nats_per_token == pytest.approx(np.mean(expected), rel=1e-12)


def test_counting_in_chunks_changes_nothing(shards, windows, monkeypatch):
    whole = bigram_loss(shards, windows, VOCAB)

    monkeypatch.setattr(bigram, "_CHUNK_TOKENS", 4_000)
    chunked = bigram_loss(shards, windows, VOCAB)

    assert chunked.nats_per_token == pytest.approx(whole.nats_per_token, rel=1e-12)


def test_wide_vocabularies_are_counted_like_narrow_ones(shards, windows):
    wide = [tokens.astype(np.uint32) for tokens in shards]

    result = bigram_loss(wide, windows, 100_000)

    terms = naive_nll(shards, windows, (result.weights[0], result.weights[1], 0.0))
    assert result.nats_per_token == pytest.approx(np.mean(terms), abs=1e-3)


def test_the_weights_are_a_distribution_that_no_neighbour_beats(shards, windows):
    counted, held_back = bigram._split(shards, VOCAB)
    weights = np.array(bigram._choose_weights(counted, held_back))
    terms = bigram._terms(counted, held_back.keys)

    def held_back_nll(candidate: np.ndarray) -> float:
        return float(-(held_back.counts * np.log(terms @ candidate)).sum())

    assert weights.sum() == pytest.approx(1.0)
    for i, j in [(0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)]:
        moved = weights.copy()
        moved[i] += 0.01
        moved[j] = max(moved[j] - 0.01, 1e-9)
        assert held_back_nll(weights) <= held_back_nll(moved / moved.sum()) + 0.5


def test_one_pair_in_twenty_is_held_back_and_none_is_lost(shards):
    counted, held_back = bigram._split(shards, VOCAB)

    n_pairs = sum(len(tokens) - 1 for tokens in shards)
    assert counted.counts.sum() + held_back.counts.sum() == n_pairs
    assert held_back.counts.sum() / n_pairs == pytest.approx(0.05, abs=0.01)


def test_it_lies_between_the_true_entropy_and_the_unigram(shards, windows):
    result = bigram_loss(shards, windows, VOCAB)

    unigram = naive_nll(shards, windows, (0.0, 1.0, 1e-9))
    seen = bigram_loss(shards, shards[:1], VOCAB)
    assert seen.nats_per_token < result.nats_per_token < np.mean(unigram)


def test_text_that_repeats_itself_costs_next_to_nothing():
    tokens = np.tile(np.arange(10, dtype=np.uint16), 1_000)

    result = bigram_loss([tokens], [tokens[:101]], 10)

    assert result.nats_per_token < 0.01
    assert result.weights[0] > 0.99


def test_a_token_never_seen_costs_much_but_not_infinity():
    tokens = np.tile(np.arange(10, dtype=np.uint16), 1_000)

    result = bigram_loss([tokens], [np.array([11, 12, 3], np.uint16)], 20)

    assert 2.0 < result.nats_per_token < 20.0


def test_bits_per_byte_leave_special_tokens_out(shards, windows):
    token_bytes = np.arange(VOCAB) % 4  # every fourth id is special

    result = bigram_loss(shards, windows, VOCAB, token_bytes=token_bytes)

    targets = np.concatenate([window[1:] for window in windows]).astype(int)
    nll = np.array(naive_nll(shards, windows, result.weights))
    n_bytes = token_bytes[targets].sum()
    expected = nll[token_bytes[targets] > 0].sum() / math.log(2) / n_bytes
    assert result.bits_per_byte == pytest.approx(expected, rel=1e-12)


def test_more_tokens_than_can_be_counted_are_refused_politely(monkeypatch, caplog, windows):
    monkeypatch.setattr(bigram, "MAX_TOKENS", 1_000)
    caplog.set_level(logging.INFO)

    assert bigram_loss([np.zeros(1_001, np.uint16)], windows, VOCAB) is None
    assert caplog.messages == [
        "no bigram baseline: 1K training tokens are more than the 1K that are counted"
    ]


@pytest.mark.parametrize("n_tokens", [0, 1, 20])
def test_too_few_tokens_have_no_baseline(n_tokens, windows):
    assert bigram_loss([np.zeros(n_tokens, np.uint16)], windows, VOCAB) is None


def test_no_windows_have_no_loss(shards):
    assert bigram_loss(shards, [], VOCAB) is None


@pytest.mark.parametrize("n_tokens", [21, 40, 100, 799, 801])
def test_small_sets_have_a_baseline(n_tokens):
    tokens = markov_tokens(n_tokens, 3)

    result = bigram_loss([tokens], [tokens[:30]], VOCAB)

    assert math.isfinite(result.nats_per_token)


def test_many_short_shards_have_a_baseline():
    shards = [markov_tokens(5, seed) for seed in range(30)]

    result = bigram_loss(shards, shards[:3], VOCAB)

    assert result.nats_per_token == pytest.approx(
        np.mean(naive_nll(shards, shards[:3], result.weights))
    )


def test_windows_share_one_token_and_drop_the_tail_of_each_shard():
    shards = [np.arange(0, 10), np.arange(100, 103), np.arange(200, 209)]

    windows = [window.tolist() for window in first_windows(shards, 4, 3)]

    assert windows == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [200, 201, 202, 203, 204]]


def test_a_data_set_is_scored_on_the_windows_that_the_trainer_validates_on(tmp_path):
    import torch

    from casallm.data.loader import PretrainLoader

    rng = np.random.default_rng(0)
    documents = [" ".join(rng.choice(PROSE.split(), size=60)) for _ in range(300)]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    (tmp_path / "documents.jsonl").write_text(rows)
    source = open_source(str(tmp_path / "documents.jsonl"))
    dataset = prepare(source, tmp_path / "shards", tokenizer=None, vocab_size=280, workers=1)
    loader = PretrainLoader(
        dataset,
        context_length=32,
        global_batch_size=4,
        micro_batch_size=4,
        rank=0,
        world_size=1,
        seed=1,
        device=torch.device("cpu"),
    )
    windows = [
        np.append(inputs.numpy(), targets[-1].item())
        for batch in loader.validation(10)
        for inputs, targets in zip(batch.inputs_BT, batch.targets_BT, strict=True)
        if targets[0] >= 0
    ]
    loader.close()

    result = dataset_bigram_loss(dataset, context_length=32, n_windows=10)

    train = [dataset.shard("train", k) for k in range(len(dataset.splits["train"].shards))]
    vocab_size = dataset.manifest.tokenizer.vocab_size
    by_hand = bigram_loss(train, windows, vocab_size, token_bytes=dataset.tokenizer().token_bytes())
    assert len(windows) == 10
    assert result == by_hand
    assert 0 < result.bits_per_byte < 8
