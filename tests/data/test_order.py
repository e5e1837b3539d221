import hashlib
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casallm.data.order import GROUP_SIZE, Order, Window, permute

COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(sum)
SEEDS = st.integers(0, 2**63)
KEYS = st.lists(st.integers(0, 2**64 - 1), min_size=6, max_size=6)


def naive_permute(item: int, n: int, keys: list[int]) -> int:
    """The bijection of the module's docstring in plain integers."""
    a = next(a for a in range(1, n + 2) if a * a >= n)
    b = -(-n // a)
    while True:
        left, right = divmod(item, b)
        for i, key in enumerate(keys):
            z = ((right if i % 2 == 0 else left) + key) % 2**64
            z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
            z ^= z >> 31
            if i % 2 == 0:
                left = (left + z % a) % a
            else:
                right = (right + z % b) % b
        item = left * b + right
        if item < n:
            return item


def naive_epoch(counts: list[int], seed: int, epoch: int, group_size: int) -> list[Window]:
    """One epoch written out as a list, by the words of the module's docstring."""

    def hashed(what: str, number: int) -> bytes:
        return hashlib.blake2b(f"{seed}/{epoch}/{what}/{number}".encode(), digest_size=48).digest()

    shards = sorted(range(len(counts)), key=lambda shard: hashed("shard", shard))
    windows = []
    for group, start in enumerate(range(0, len(shards), group_size)):
        inside = [
            Window(epoch, shard, index)
            for shard in shards[start : start + group_size]
            for index in range(counts[shard])
        ]
        digest = hashed("group", group)
        keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(6)]
        windows += [inside[naive_permute(i, len(inside), keys)] for i in range(len(inside))]
    return windows


@settings(max_examples=30)
@given(COUNTS, SEEDS, st.integers(1, 9))
def test_two_epochs_are_the_lists_that_the_definition_gives(counts, seed, group_size):
    order = Order(counts, seed, group_size=group_size)

    located = [order.locate(position) for position in range(2 * order.n_windows)]

    expected = [w for epoch in (0, 1) for w in naive_epoch(counts, seed, epoch, group_size)]
    assert located == expected


@given(COUNTS, SEEDS, st.integers(1, 9), st.integers(0, 3))
def test_every_window_comes_exactly_once_an_epoch(counts, seed, group_size, epoch):
    order = Order(counts, seed, group_size=group_size)
    positions = np.arange(epoch * order.n_windows, (epoch + 1) * order.n_windows)

    epochs, shards, indices = order.locate_all(positions)

    seen = sorted(zip(shards.tolist(), indices.tolist(), strict=True))
    assert seen == [(shard, i) for shard, count in enumerate(counts) for i in range(count)]
    assert set(epochs.tolist()) == {epoch}


@given(COUNTS, SEEDS, st.data())
def test_a_position_does_not_depend_on_what_is_asked_with_it(counts, seed, data):
    order = Order(counts, seed)
    positions = data.draw(st.lists(st.integers(0, 10 * order.n_windows), min_size=1))

    together = zip(*order.locate_all(np.array(positions)), strict=True)

    assert [Window(*map(int, each)) for each in together] == [order.locate(p) for p in positions]


@given(st.integers(1, 3000), KEYS)
def test_the_permutation_is_a_bijection(n, keys):
    assert sorted(permute(np.arange(n), n, keys).tolist()) == list(range(n))


@given(st.integers(10**6, 10**15), KEYS)
def test_the_permutation_of_a_huge_range_stays_inside_it_and_never_collides(n, keys):
    some = np.linspace(0, n - 1, 1000, dtype=np.int64)

    moved = permute(some, n, keys)

    assert moved.min() >= 0
    assert moved.max() < n
    assert len(np.unique(moved)) == len(np.unique(some))


def test_neighbours_are_scattered():
    order = Order([10_000], seed=1)

    _, _, indices = order.locate_all(np.arange(10_000))

    assert np.mean(np.abs(np.diff(indices)) < 100) < 0.03  # 0.02 by chance
    assert abs(np.corrcoef(indices, np.arange(10_000))[0, 1]) < 0.05


def test_another_epoch_and_another_seed_are_another_order():
    order, other = Order([50] * 20, seed=1), Order([50] * 20, seed=2)

    first = [order.locate(i).shard for i in range(1000)]

    assert first != [order.locate(1000 + i).shard for i in range(1000)]
    assert first != [other.locate(i).shard for i in range(1000)]


def test_only_one_group_of_shards_is_in_use_at_a_time():
    order = Order([25] * 40, seed=3)

    _, shards, _ = order.locate_all(np.arange(order.n_windows))

    for start in range(0, order.n_windows, 25 * GROUP_SIZE):
        assert len(set(shards[start : start + 25 * GROUP_SIZE].tolist())) == GROUP_SIZE


@given(COUNTS, st.integers(0, 99), st.integers(0, 3), st.data())
def test_the_shards_from_a_position_on_are_told_before_they_are_read(counts, seed, ahead, data):
    order = Order(counts, seed, group_size=3)
    first = data.draw(st.integers(0, 3 * order.n_windows))
    last = first + data.draw(st.integers(0, order.n_windows))

    told = order.shards_from(first, last, ahead=ahead)

    read = {order.locate(position).shard for position in range(first, last + 1)}
    assert read <= set(told)
    assert len(set(told)) == len(told)


def test_the_order_of_a_seed_never_changes():
    """A run that is continued by a newer version must meet the windows it expects."""
    order = Order([100, 50, 200, 10, 3], seed=1234, group_size=2)

    found = [order.locate(i) for i in (0, 1, 200, 362, 363, 10**12)]

    assert found == GOLDEN


GOLDEN = [
    Window(0, 0, 36),
    Window(0, 0, 69),
    Window(0, 2, 21),
    Window(0, 3, 9),
    Window(1, 2, 122),
    Window(2754820936, 2, 153),
]


def test_the_cost_of_a_position_does_not_grow_with_the_windows():
    started = time.perf_counter()
    order = Order([10**9 // 64] * 64, seed=1)

    order.locate_all(np.arange(10**8, 10**8 + 1000))

    assert time.perf_counter() - started < 1.0  # 3 ms on an idle core


def test_nothing_to_read_is_refused():
    with pytest.raises(ValueError, match="no windows"):
        Order([0, 0], seed=1).locate(0)
