"""The loss of an interpolated bigram model: what a language model has to beat to be one.

    p(w | v) = a c(v, w) / c(v)  +  b c(w) / n  +  g / V        (Jelinek & Mercer 1980)

c counts the training tokens; after a token that was never seen the bigram term is the unigram's.
The weights a, b, g are those that make tokens held back from counting likeliest (EM); then the
held-back tokens are counted too. Evaluated on the very windows that the trainer validates on, so
that the two losses stand side by side. Numpy alone; a bigram is one integer, and counting is
sorting: about 0.1 s for a million tokens.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from casallm.data.shards import Dataset
from casallm.units import format_count

log = logging.getLogger(__name__)

MAX_TOKENS = 200_000_000
"""More are not counted: it would take minutes and gigabytes."""

HELD_BACK_EVERY = 20
"""Every 20th block of training tokens chooses the weights: 5 %."""

_BLOCK_TOKENS = 8_192
_CHUNK_TOKENS = 16_000_000
_EM_ROUNDS = 100
_EM_TOLERANCE = 1e-6

Tokens = NDArray[np.unsignedinteger[Any]]
Keys = NDArray[np.unsignedinteger[Any]]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class BigramLoss:
    """How well the bigram model predicts the validation windows."""

    nats_per_token: float
    """Mean over all targets, as `val_loss`."""
    bits_per_byte: float | None
    """Over the targets that are text, as `val_bpb`; None where bytes are not known."""
    weights: tuple[float, float, float]
    """Of bigram, unigram and uniform."""
    n_train_tokens: int


def bigram_loss(
    train: Sequence[Tokens],
    windows: Iterable[Tokens],
    vocab_size: int,
    *,
    token_bytes: NDArray[np.integer[Any]] | None = None,
) -> BigramLoss | None:
    """The bigram model of `train`'s tokens on `windows`; None if there are too many or no tokens.

    Each window is a context and its targets: n + 1 consecutive tokens, n predictions.
    `token_bytes` holds the bytes of each id, 0 for special tokens.
    """
    n_tokens = sum(len(tokens) for tokens in train)
    if _are_too_many(n_tokens):
        return None
    pairs = [_pair_keys(window, vocab_size) for window in windows]
    n_pairs = sum(max(len(tokens) - 1, 0) for tokens in train)
    if not pairs or n_pairs < HELD_BACK_EVERY:
        return None
    counted, held_back = _split(train, vocab_size)
    weights = _choose_weights(counted, held_back)
    model = _merge(counted, held_back)
    keys = np.concatenate(pairs)
    nll = -np.log(_terms(model, keys) @ np.array(weights))
    bits = _bits_per_byte(nll, keys % vocab_size, token_bytes) if token_bytes is not None else None
    return BigramLoss(float(nll.mean()), bits, weights, n_tokens)


def dataset_bigram_loss(
    dataset: Dataset, *, context_length: int, n_windows: int
) -> BigramLoss | None:
    """The bigram model of a data set's training tokens on its first held-out windows."""
    if _are_too_many(dataset.splits["train"].tokens):
        return None
    train = [dataset.shard("train", k) for k in range(len(dataset.splits["train"].shards))]
    held_out = (dataset.shard("val", k) for k in range(len(dataset.splits["val"].shards)))
    return bigram_loss(
        train,
        first_windows(held_out, context_length, n_windows),
        dataset.manifest.tokenizer.vocab_size,
        token_bytes=dataset.tokenizer().token_bytes(),
    )


def first_windows(
    shards: Iterable[Tokens], context_length: int, n_windows: int
) -> Iterator[Tokens]:
    """The first `n_windows` windows of the shards in order, as the trainer validates on them."""
    left = n_windows
    for tokens in shards:
        in_shard = min(left, (len(tokens) - 1) // context_length)
        for index in range(in_shard):
            start = index * context_length
            yield tokens[start : start + context_length + 1]
        left -= in_shard
        if not left:
            return


def _are_too_many(n_tokens: int) -> bool:
    if n_tokens > MAX_TOKENS:
        log.info(
            "no bigram baseline: %s training tokens are more than the %s that are counted",
            format_count(n_tokens),
            format_count(MAX_TOKENS),
        )
    return n_tokens > MAX_TOKENS


@dataclass(frozen=True)
class _Counts:
    """How often each pair of tokens stood side by side: distinct keys, ascending."""

    keys: Keys
    """first * vocab_size + second."""
    counts: NDArray[np.int64]
    vocab_size: int

    def firsts(self) -> Floats:
        """c(v): how often each token was a context."""
        first = (self.keys // self.vocab_size).astype(np.int64)
        return np.bincount(first, self.counts, self.vocab_size).astype(np.float64)

    def seconds(self) -> Floats:
        """c(w): how often each token was a target."""
        second = (self.keys % self.vocab_size).astype(np.int64)
        return np.bincount(second, self.counts, self.vocab_size).astype(np.float64)

    def of(self, keys: Keys) -> Floats:
        """c(v, w) of each of `keys`."""
        places = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[places] == keys, self.counts[places], 0).astype(np.float64)


def _split(train: Sequence[Tokens], vocab_size: int) -> tuple[_Counts, _Counts]:
    """The pairs that are counted, and those held back: every 20th block, everywhere alike."""
    n_tokens = sum(len(tokens) for tokens in train)
    block = max(1, min(_BLOCK_TOKENS, n_tokens // (4 * HELD_BACK_EVERY)))
    period = block * HELD_BACK_EVERY
    counted: list[_Counts] = []
    held_back: list[_Counts] = []
    n_pairs = 0
    for tokens in train:
        for start in range(0, len(tokens), _CHUNK_TOKENS):
            keys = _pair_keys(tokens[start : start + _CHUNK_TOKENS + 1], vocab_size)
            is_held_back = np.arange(n_pairs, n_pairs + len(keys)) % period >= period - block
            counted.append(_count(keys[~is_held_back], vocab_size))
            held_back.append(_count(keys[is_held_back], vocab_size))
            n_pairs += len(keys)
    return _merge(*counted), _merge(*held_back)


def _pair_keys(tokens: Tokens, vocab_size: int) -> Keys:
    """One integer for each pair of neighbours; half the width is half the time to sort."""
    if vocab_size**2 <= 2**32:
        narrow = np.asarray(tokens).astype(np.uint32)
        return narrow[:-1] * np.uint32(vocab_size) + narrow[1:]
    wide = np.asarray(tokens).astype(np.uint64)
    return wide[:-1] * np.uint64(vocab_size) + wide[1:]


def _count(keys: Keys, vocab_size: int) -> _Counts:
    distinct, counts = np.unique(keys, return_counts=True)
    return _Counts(distinct, counts.astype(np.int64), vocab_size)


def _merge(*parts: _Counts) -> _Counts:
    """The sum of several counts."""
    keys = np.concatenate([part.keys for part in parts])
    counts = np.concatenate([part.counts for part in parts])
    order = np.argsort(keys, kind="stable")  # runs in order already: merging, not sorting
    keys, counts = keys[order], counts[order]
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    starts = starts[: len(keys)]
    return _Counts(keys[starts], np.add.reduceat(counts, starts), parts[0].vocab_size)


def _terms(model: _Counts, keys: Keys) -> Floats:
    """The three probabilities of each pair, one row a pair."""
    first = (keys // model.vocab_size).astype(np.int64)
    second = (keys % model.vocab_size).astype(np.int64)
    unigram = (model.seconds() / model.counts.sum())[second]
    contexts = model.firsts()[first]
    bigram = np.where(contexts > 0, model.of(keys) / np.maximum(contexts, 1), unigram)
    uniform = np.full(len(keys), 1 / model.vocab_size)
    return np.stack([bigram, unigram, uniform], axis=1)


def _choose_weights(counted: _Counts, held_back: _Counts) -> tuple[float, float, float]:
    """The weights that make the held-back pairs likeliest: EM from equal ones (Jelinek 1980)."""
    terms = _terms(counted, held_back.keys)
    times = held_back.counts / held_back.counts.sum()
    weights = np.full(3, 1 / 3)
    for _ in range(_EM_ROUNDS):
        joint = terms * weights
        new = times @ (joint / joint.sum(axis=1, keepdims=True))
        is_settled = np.abs(new - weights).max() < _EM_TOLERANCE
        weights = new
        if is_settled:
            break
    weights = np.maximum(weights, 1e-6)  # a token that was never seen must not cost infinity
    weights /= weights.sum()
    return float(weights[0]), float(weights[1]), float(weights[2])


def _bits_per_byte(
    nll: Floats, targets: Keys, token_bytes: NDArray[np.integer[Any]]
) -> float | None:
    bytes_of = token_bytes[targets.astype(np.int64)]
    n_bytes = int(bytes_of.sum())
    return float(nll[bytes_of > 0].sum()) / (math.log(2) * n_bytes) if n_bytes else None
