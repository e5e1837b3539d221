import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from casallm.data.loader import IGNORED, PretrainLoader
from casallm.data.order import Order
from casallm.errors import DataError

T = 32


@pytest.fixture
def open_loader(prepared):
    """Opens loaders that are closed when the test ends."""
    loaders = []

    def build(**changes):
        settings = {
            "context_length": T,
            "global_batch_size": 10,
            "micro_batch_size": 4,
            "rank": 0,
            "world_size": 1,
            "seed": 7,
            "device": torch.device("cpu"),
        }
        loaders.append(PretrainLoader(prepared, **settings | changes))
        return loaders[-1]

    yield build
    for loader in loaders:
        loader.close()


def naive_windows(dataset, first, count, split="train"):
    """The windows from position `first` on, read one by one."""
    order = Order(dataset.window_counts("train", T), seed=7)
    rows = []
    for position in range(first, first + count):
        window = order.locate(position)
        path = dataset.directory / dataset.splits[split].shards[window.shard].name
        rows.append(np.load(path)[window.index * T : window.index * T + T + 1].tolist())
    return rows


def rows_of(batches):
    """Inputs with the last target appended, of every row that counts."""
    rows = []
    for batch in batches:
        for inputs, targets in zip(batch.inputs_BT, batch.targets_BT, strict=True):
            if targets[0] != IGNORED:
                assert inputs[1:].tolist() == targets[:-1].tolist()
                rows.append([*inputs.tolist(), int(targets[-1])])
    return rows


def test_a_step_reads_the_windows_of_the_order(prepared, open_loader):
    loader = open_loader()

    for step in (0, 1, 2, 7, 3):
        assert rows_of(loader.batches(step)) == naive_windows(prepared, 10 * step, 10)


def test_batches_have_the_promised_shapes(open_loader):
    for batch in open_loader().batches(0):
        assert batch.inputs_BT.shape == batch.targets_BT.shape == (4, T)
        assert batch.inputs_BT.dtype == batch.targets_BT.dtype == torch.int64
        assert batch.inputs_BT.is_contiguous()
        assert batch.targets_BT.is_contiguous()
        assert batch.inputs_BT.min() >= 0
        assert batch.n_targets_global == 10 * T
        assert batch.positions_BT is None
        assert batch.document_offsets is None


def test_one_and_three_ranks_consume_the_same_sequences_in_the_same_order(open_loader):
    alone = open_loader()
    ranks = [open_loader(rank=rank, world_size=3) for rank in range(3)]

    for step in range(5):
        shares = [rows_of(rank.batches(step)) for rank in ranks]
        merged = [row for each in itertools.zip_longest(*shares) for row in each if row]
        assert merged == rows_of(alone.batches(step))


@settings(max_examples=30)
@given(
    st.integers(1, 20), st.integers(1, 7), st.integers(1, 6), st.integers(0, 50), st.integers(0, 30)
)
def test_every_rank_takes_as_many_batches_of_the_same_shape(
    prepared, global_size, micro_size, world_size, step, skipped
):
    everything = []
    for rank in range(world_size):
        loader = PretrainLoader(
            prepared,
            context_length=T,
            global_batch_size=global_size,
            micro_batch_size=micro_size,
            rank=rank,
            world_size=world_size,
            seed=7,
            device=torch.device("cpu"),
        )
        batches = list(loader.batches(step, skipped))
        loader.close()
        assert [b.inputs_BT.shape for b in batches] == [(micro_size, T)] * len(batches)
        assert len(batches) == math.ceil(math.ceil(global_size / world_size) / micro_size)
        everything += rows_of(batches)
    expected = naive_windows(prepared, step * global_size + skipped, global_size)
    assert sorted(everything) == sorted(expected)


def test_what_is_read_ahead_is_what_is_read_when_asked(open_loader):
    ahead, fresh = open_loader(), open_loader()
    list(ahead.batches(4))

    followed = rows_of(ahead.batches(5))

    assert followed == rows_of(fresh.batches(5))


def test_skipped_windows_shift_the_step(prepared, open_loader):
    loader = open_loader()
    list(loader.batches(1))

    assert rows_of(loader.batches(2, skipped=13)) == naive_windows(prepared, 33, 10)
    assert rows_of(loader.batches(3, skipped=13)) == naive_windows(prepared, 43, 10)


def test_an_epoch_reads_every_window_once(prepared, open_loader):
    loader = open_loader(global_batch_size=7)
    n_windows = loader.sequences_per_epoch

    steps = range(-(-n_windows // 7))
    rows = [row for step in steps for row in rows_of(loader.batches(step))][:n_windows]

    ids = np.load(prepared.directory / prepared.splits["train"].shards[0].name)
    expected = [ids[i * T : i * T + T + 1].tolist() for i in range(n_windows)]
    assert n_windows == prepared.window_counts("train", T)[0]
    assert sorted(rows) == sorted(expected)


STRETCHES = st.lists(
    st.tuples(st.integers(1, 12), st.integers(0, 3), st.integers(1, 4), st.integers(1, 5)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=5)
@given(STRETCHES, st.integers(40, 90), st.integers(0, 2**40))
def test_an_epoch_reads_every_window_once_whatever_interrupts_it(
    many_shards, stretches, global_size, seed
):
    """A stretch: steps done, those of them that are lost, ranks, sequences of a micro-batch."""
    counts = many_shards.window_counts("train", T)
    n_steps, step, rows = -(-sum(counts) // global_size), 0, []
    for done, lost, world_size, micro_size in [*stretches, (n_steps, 0, 2, 8)]:
        loaders = [
            PretrainLoader(
                many_shards,
                context_length=T,
                global_batch_size=global_size,
                micro_batch_size=micro_size,
                rank=rank,
                world_size=world_size,
                seed=seed,
                device=torch.device("cpu"),
            )
            for rank in range(world_size)
        ]
        last = min(step + done, n_steps)
        for each in range(step, last):
            shares = [rows_of(loader.batches(each)) for loader in loaders]
            merged = [row for rank in itertools.zip_longest(*shares) for row in rank if row]
            rows[each * global_size :] = merged
        step = max(0, last - lost)
        for loader in loaders:
            loader.close()
    rows = rows[: sum(counts)]

    expected = []
    for number, count in enumerate(counts):
        ids = many_shards.shard("train", number)
        expected += [ids[i * T : i * T + T + 1].tolist() for i in range(count)]
    assert sorted(rows) == sorted(expected)


@pytest.mark.parametrize(("n_sequences", "world_size"), [(1, 1), (9, 2), (10, 3), (10**6, 4)])
def test_validation_reads_the_first_held_out_windows(
    prepared, open_loader, n_sequences, world_size
):
    ids = np.load(prepared.directory / prepared.splits["val"].shards[0].name)
    n_windows = min(n_sequences, (len(ids) - 1) // T)

    shares = [
        list(open_loader(rank=rank, world_size=world_size).validation(n_sequences))
        for rank in range(world_size)
    ]

    assert len({len(batches) for batches in shares}) == 1
    assert {batch.n_targets_global for share in shares for batch in share} == {n_windows * T}
    rows = [row for share in shares for row in rows_of(share)]
    assert sorted(rows) == sorted(ids[i * T : i * T + T + 1].tolist() for i in range(n_windows))


def test_a_corpus_too_small_for_the_context_is_one_sentence(prepared, open_loader):
    tokens = prepared.splits["train"].shards[0].tokens

    with pytest.raises(DataError) as caught:
        open_loader(context_length=tokens)

    assert str(caught.value) == (
        f"{prepared.directory} has {tokens:,} tokens to train on in its longest shard, too few for"
        f" one window of {tokens:,}: add text, or set train.context_length below {tokens:,}"
    )


def test_a_held_out_part_too_small_for_the_context_is_one_sentence(prepared, open_loader):
    tokens = prepared.splits["val"].shards[0].tokens

    with pytest.raises(DataError, match=f"has {tokens:,} tokens held out in its longest shard"):
        open_loader(context_length=tokens + 1)


@pytest.mark.gpu
def test_batches_arrive_on_the_gpu(prepared, open_loader):
    loader = open_loader(device=torch.device("cuda"))

    found = [rows_of(loader.batches(step)) for step in (0, 1)]

    assert found == [naive_windows(prepared, 10 * step, 10) for step in (0, 1)]
    assert next(loader.batches(2)).inputs_BT.is_cuda
