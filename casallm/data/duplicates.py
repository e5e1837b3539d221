"""Exact and near duplicates among conversations, found as they come by.

Exact: equal after Unicode and white space are normalised and case is folded. Near: the sets of
three-word shingles of two whole conversations overlap by 70 % (Jaccard). Candidates are found by
MinHash in bands (Broder 1997; Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, 3.4):
16 bands of 4 rows find a pair at 0.7 with probability 0.988 and one at 0.8 with 0.9998, and every
candidate is verified on the shingles themselves, so that nothing is dropped by chance.
Conversations below 12 words are compared exactly only: "What is 2 + 2?" and "What is 2 + 3?" are
not the same question.
"""

import hashlib
import re
import unicodedata
import zlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from casallm.data.conversation import Message

NEAR_JACCARD = 0.7
SHINGLE_WORDS = 3
MIN_WORDS = 12
N_BANDS, BAND_ROWS = 16, 4

Shingles = NDArray[np.uint64]

_WORD = re.compile(r"\w+")


class DuplicateFilter:
    """Remembers every conversation that it was shown, and recognises one that comes again."""

    def __init__(self) -> None:
        self._exact: set[bytes] = set()
        self._shingles: list[Shingles] = []
        self._bands: dict[bytes, list[int]] = {}
        self._multipliers, self._offsets = _hash_family(N_BANDS * BAND_ROWS)

    def check(self, messages: Sequence[Message]) -> Literal["duplicate", "near_duplicate"] | None:
        """What `messages` repeats of earlier ones, or None; a new conversation is remembered."""
        text = _normalised(messages)
        digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()
        if digest in self._exact:
            return "duplicate"
        self._exact.add(digest)
        words = _WORD.findall(text)
        if len(words) < MIN_WORDS:
            return None
        shingles = _shingles(words)
        keys = self._band_keys(shingles)
        candidates = {each for key in keys for each in self._bands.get(key, ())}
        if any(_jaccard(shingles, self._shingles[each]) >= NEAR_JACCARD for each in candidates):
            return "near_duplicate"
        for key in keys:
            self._bands.setdefault(key, []).append(len(self._shingles))
        self._shingles.append(shingles)
        return None

    def _band_keys(self, shingles: Shingles) -> list[bytes]:
        """One key a band: its number and the minima of its rows."""
        hashed = shingles[:, None] * self._multipliers + self._offsets
        minima = (hashed >> np.uint64(32)).min(axis=0).astype(np.uint32)
        rows = minima.reshape(N_BANDS, BAND_ROWS)
        return [bytes([band]) + row.tobytes() for band, row in enumerate(rows)]


def _normalised(messages: Sequence[Message]) -> str:
    parts = [f"{message.role}: {message.content}" for message in messages]
    return " ".join(unicodedata.normalize("NFKC", "\n".join(parts)).casefold().split())


def _shingles(words: Sequence[str]) -> Shingles:
    """The distinct runs of three words as numbers, sorted."""
    codes = np.array(
        [zlib.crc32(word.encode(errors="surrogatepass")) for word in words], dtype=np.uint64
    )
    n_shingles = len(codes) - SHINGLE_WORDS + 1
    mixed = np.zeros(n_shingles, dtype=np.uint64)
    for place in range(SHINGLE_WORDS):
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + codes[place : place + n_shingles]
    return np.unique(mixed ^ (mixed >> np.uint64(29)))


def _jaccard(first: Shingles, second: Shingles) -> float:
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / (len(first) + len(second) - shared)


def _hash_family(n_functions: int) -> tuple[Shingles, Shingles]:
    """Multipliers (odd) and offsets of multiply-shift hashing (Dietzfelbinger et al. 1997)."""
    random = np.random.Generator(np.random.PCG64(0))
    multipliers = random.integers(0, 2**63, n_functions, dtype=np.uint64) * np.uint64(2)
    offsets = random.integers(0, 2**63, n_functions, dtype=np.uint64)
    return multipliers + np.uint64(1), offsets
