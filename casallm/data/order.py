"""The order in which windows are read: a pure function of the seed and the position.

A shard of n tokens holds (n - 1) // context_length windows. Every epoch visits each window of
every shard once: the shards are permuted by the hash of (seed, epoch, shard); 8 consecutive ones
of that permutation are a group; the windows inside a group are permuted together by a keyed
bijection. So any position is found alone, in time logarithmic in the shards, with memory
proportional to the shards, and only one group of shards is in use at a time.

The bijection on n items is a Feistel network over the a x b rectangle that just holds them
(a = ceil(sqrt n), b = ceil(n / a)): two numbers take turns in being shifted by a hash of the
other, modulo their own side. A position outside the n items, of which there are fewer than a, is
sent through again until it falls inside (cycle-walking; Black and Rogaway 2002).
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

GROUP_SIZE = 8
_ROUNDS = 6

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Window:
    """One window: number `index` of shard number `shard`, visited in `epoch`."""

    epoch: int
    shard: int
    index: int


@dataclass(frozen=True)
class _Epoch:
    """The permuted shards of one epoch and the windows before each of them and of each group."""

    shards: npt.NDArray[np.int64]
    starts: Positions
    group_starts: Positions


class Order:
    """Where each position of an endless run over the shards' windows lies."""

    def __init__(
        self, window_counts: Sequence[int], seed: int, *, group_size: int = GROUP_SIZE
    ) -> None:
        self._counts = np.asarray(window_counts, dtype=np.int64)
        self._seed = seed
        self._group_size = group_size
        self.n_windows = int(self._counts.sum())
        """Windows in an epoch."""
        self._epoch = lru_cache(maxsize=4)(self._permute_shards)

    def locate(self, position: int) -> Window:
        """The window that is read at `position`, counted from the start of the run."""
        epochs, shards, indices = self.locate_all(np.array([position], dtype=np.int64))
        return Window(int(epochs[0]), int(shards[0]), int(indices[0]))

    def locate_all(self, positions: Positions) -> tuple[Positions, Positions, Positions]:
        """Epoch, shard and index of the windows at many positions."""
        if not self.n_windows:
            raise ValueError("there are no windows to read")
        epochs, inside = np.divmod(positions, self.n_windows)
        shards, indices = np.empty_like(inside), np.empty_like(inside)
        for epoch in np.unique(epochs):
            at = epochs == epoch
            shards[at], indices[at] = self._locate_in_epoch(int(epoch), inside[at])
        return epochs, shards, indices

    def shards_from(self, position: int, last: int, *, ahead: int = 2) -> list[int]:
        """The shards in use from `position` to `last`, then those of the next `ahead` groups."""
        epoch, inside = divmod(position, self.n_windows)
        last_epoch, last_inside = divmod(last, self.n_windows)
        group, last_group = self._group(epoch, inside), self._group(last_epoch, last_inside)
        found: dict[int, None] = {}
        while ahead >= 0:
            order = self._epoch(epoch)
            start = group * self._group_size
            found.update(dict.fromkeys(order.shards[start : start + self._group_size].tolist()))
            ahead -= (epoch, group) >= (last_epoch, last_group)
            group += 1
            if group == len(order.group_starts) - 1:
                epoch, group = epoch + 1, 0
        return list(found)

    def _group(self, epoch: int, inside: int) -> int:
        return int(np.searchsorted(self._epoch(epoch).group_starts, inside, side="right")) - 1

    def _locate_in_epoch(self, epoch: int, inside: Positions) -> tuple[Positions, Positions]:
        order = self._epoch(epoch)
        groups = np.searchsorted(order.group_starts, inside, side="right") - 1
        permuted = np.empty_like(inside)
        for group in np.unique(groups):
            at = groups == group
            start, stop = order.group_starts[group : group + 2]
            keys = _keys(self._seed, epoch, int(group))
            permuted[at] = start + permute(inside[at] - start, int(stop - start), keys)
        slots = np.searchsorted(order.starts, permuted, side="right") - 1
        return order.shards[slots], permuted - order.starts[slots]

    def _permute_shards(self, epoch: int) -> _Epoch:
        hashes = [_hash(self._seed, epoch, shard, "shard") for shard in range(len(self._counts))]
        shards = np.array(sorted(range(len(hashes)), key=hashes.__getitem__), dtype=np.int64)
        starts = np.concatenate([[0], np.cumsum(self._counts[shards])])
        ends = starts[-1:]
        return _Epoch(shards, starts, np.concatenate([starts[: -1 : self._group_size], ends]))


def permute(items: Positions, n: int, keys: Sequence[int]) -> Positions:
    """Each of `items`, all below `n`, under the bijection on range(n) that `keys` choose."""
    sides = _sides(n)
    moved = items.astype(np.uint64)
    outside = np.ones(len(moved), dtype=bool)
    while outside.any():
        moved[outside] = _feistel(moved[outside], sides, keys)
        outside = moved >= n
    return moved.astype(np.int64)


def _sides(n: int) -> tuple[int, int]:
    a = max(1, math.isqrt(max(0, n - 1)) + 1)
    return a, max(1, -(-n // a))


def _feistel(
    items: npt.NDArray[np.uint64], sides: tuple[int, int], keys: Sequence[int]
) -> npt.NDArray[np.uint64]:
    a, b = np.uint64(sides[0]), np.uint64(sides[1])
    left, right = items // b, items % b
    for i, key in enumerate(keys):
        if i % 2 == 0:
            left = (left + _mix(right, key) % a) % a
        else:
            right = (right + _mix(left, key) % b) % b
    return left * b + right


def _mix(values: npt.NDArray[np.uint64], key: int) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014) over value + key."""
    z = values + np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _keys(seed: int, epoch: int, group: int) -> list[int]:
    digest = _hash(seed, epoch, group, "group")
    return [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS)]


def _hash(seed: int, epoch: int, number: int, what: str) -> bytes:
    return hashlib.blake2b(f"{seed}/{epoch}/{what}/{number}".encode(), digest_size=48).digest()
