"""Packed batches: nothing lost, nothing twice, nothing leaks, and rows that are full."""

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from casallm.data.mixture import Mixture, Sample
from casallm.data.packing import Packing, SftLoader, pack_best_fit
from casallm.data.recipe import IdentityConfig
from casallm.errors import DataError
from casallm.estimate.architecture import ModelConfig
from casallm.model.gpt import build_gpt
from casallm.model.loss import TrainingLoss

CPU = torch.device("cpu")
PAD = 99
WIDTH = 32


def make_mixture(n=40, *, width=WIDTH, held_out=6, seed=0):
    """Conversations of 3 to `width` + 1 tokens, the second half of each learned."""
    random = np.random.default_rng(seed)

    def sample(row):
        ids = random.integers(0, 90, int(random.integers(3, width + 2))).astype(np.uint16)
        return Sample(f"s{row % 2}", row, ids, np.arange(len(ids)) >= len(ids) // 2)

    samples = tuple(sample(row) for row in range(n + held_out))
    return Mixture(
        train=samples[:n],
        validation=samples[n:],
        reports=(),
        identity=IdentityConfig(),
        tokenizer_fingerprint="",
        context_length=width,
        pad_id=PAD,
        fingerprint="",
    )


def make_loader(mixture, *, rank=0, world_size=1, epochs=3, batch=4, micro=2, seed=7):
    return SftLoader(
        mixture,
        epochs=epochs,
        global_batch_size=batch,
        micro_batch_size=micro,
        rank=rank,
        world_size=world_size,
        seed=seed,
        device=CPU,
    )


def documents(batches):
    """The (inputs, targets) of every packed conversation with a target, in order."""
    found = []
    for batch in batches:
        inputs, targets = batch.inputs_BT.flatten(), batch.targets_BT.flatten()
        for start, stop in itertools.pairwise(batch.document_offsets.tolist()):
            if (targets[start:stop] >= 0).any():
                found.append(
                    (tuple(inputs[start:stop].tolist()), tuple(targets[start:stop].tolist()))
                )
    return found


def expected(sample):
    inputs = tuple(sample.ids[:-1].tolist())
    learned = sample.is_target[1:].tolist()
    targets = tuple(t if m else -1 for t, m in zip(sample.ids[1:].tolist(), learned, strict=True))
    return inputs, targets


def all_batches(loader):
    return [batch for step in range(loader.n_steps) for batch in loader.batches(step)]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 50))
def test_every_conversation_is_packed_once_and_no_row_overflows(lengths, capacity):
    rows = pack_best_fit(lengths, capacity)

    assert sorted(each for row in rows for each in row) == list(range(len(lengths)))
    assert all(sum(lengths[each] for each in row) <= capacity for row in rows)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=40), st.integers(20, 40))
def test_the_fast_packing_is_best_fit_decreasing(lengths, capacity):
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - length)
        else:
            rooms.append(capacity - length)

    rows = pack_best_fit(lengths, capacity)

    assert sorted(rooms) == sorted(capacity - sum(lengths[i] for i in row) for row in rows)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.integers(0, 5))
def test_every_epoch_has_the_same_number_of_rows_and_every_conversation_once(lengths, epoch):
    packing = Packing(lengths, 20)

    rows = packing.rows(3, epoch)

    assert len(rows) == packing.n_rows
    assert sorted(np.concatenate(rows).tolist()) == list(range(len(lengths)))
    assert all(sum(lengths[each] for each in row) <= 20 for row in rows)


def test_epochs_and_seeds_differ_and_repeat_themselves():
    packing = Packing([5, 7, 9, 5, 7, 9, 5, 7, 9, 11] * 5, 20)

    def order(seed, epoch):
        return [row.tolist() for row in packing.rows(seed, epoch)]

    assert order(0, 0) == order(0, 0)
    assert len({str(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}) == 6


@pytest.mark.parametrize(("world_size", "batch", "micro"), [(1, 4, 2), (2, 6, 2), (3, 5, 1)])
def test_each_conversation_is_seen_exactly_once_an_epoch(world_size, batch, micro):
    mixture = make_mixture()
    seen = []
    for rank in range(world_size):
        loader = make_loader(mixture, rank=rank, world_size=world_size, batch=batch, micro=micro)
        seen += documents(all_batches(loader))
        loader.close()

    assert sorted(seen) == sorted(3 * [expected(sample) for sample in mixture.train])


def test_the_steps_before_an_epochs_end_hold_that_epoch_alone():
    mixture = make_mixture()
    loader = make_loader(mixture, batch=1, micro=1)
    n = loader.sequences_per_epoch

    first = documents(batch for step in range(n) for batch in loader.batches(step))

    assert sorted(first) == sorted(expected(sample) for sample in mixture.train)
    loader.close()


def test_any_step_is_read_without_those_before_it():
    loader, fresh = make_loader(make_mixture()), make_loader(make_mixture())

    in_order = [documents(loader.batches(step)) for step in range(loader.n_steps)]

    for step in reversed(range(loader.n_steps)):
        assert documents(fresh.batches(step)) == in_order[step]
    loader.close()
    fresh.close()


def test_skipped_rows_shift_the_steps():
    loader = make_loader(make_mixture(), batch=4)

    assert documents(loader.batches(0, skipped=4)) == documents(loader.batches(1))
    loader.close()


def test_targets_are_counted_over_all_ranks():
    mixture = make_mixture()
    loaders = [make_loader(mixture, rank=rank, world_size=3, batch=5) for rank in range(3)]

    for step in range(loaders[0].n_steps):
        batches = [list(loader.batches(step)) for loader in loaders]
        counted = sum(int((b.targets_BT >= 0).sum()) for share in batches for b in share)
        assert {b.n_targets_global for share in batches for b in share} == {counted}
    for loader in loaders:
        loader.close()


def test_every_rank_gets_as_many_batches_of_one_static_shape():
    loaders = [make_loader(make_mixture(), rank=r, world_size=3, batch=5) for r in range(3)]

    shapes = {
        (step, rank): [tuple(batch.inputs_BT.shape) for batch in loader.batches(step)]
        for rank, loader in enumerate(loaders)
        for step in range(loader.n_steps)
    }

    assert {str(each) for each in shapes.values()} == {str([(2, WIDTH)])}
    for loader in loaders:
        loader.close()


def test_positions_restart_and_padding_is_a_document_of_its_own():
    loader = make_loader(make_mixture())

    for batch in all_batches(loader):
        offsets = batch.document_offsets.tolist()
        counted = [
            place for start, stop in itertools.pairwise(offsets) for place in range(stop - start)
        ]
        assert batch.positions_BT.flatten().tolist() == counted
        assert set(range(0, batch.inputs_BT.numel(), WIDTH)) <= set(offsets)
        is_padding = batch.inputs_BT == PAD
        assert (batch.targets_BT[is_padding] == -1).all()
        is_padding = is_padding.flatten().tolist()
        for start, stop in itertools.pairwise(offsets):
            assert len(set(is_padding[start:stop])) <= 1
    loader.close()


def test_every_batch_has_as_many_offsets_so_that_a_model_is_compiled_once():
    loader = make_loader(make_mixture())

    assert len({len(batch.document_offsets) for batch in all_batches(loader)}) == 1
    loader.close()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = ModelConfig(n_layers=2, d_model=32, n_heads=2, vocab_size=100)
    model = build_gpt(config, WIDTH)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_logits_of_a_packed_conversation_equal_those_alone(model):
    mixture = make_mixture(12)
    by_inputs, seen = {expected(sample)[0] for sample in mixture.train}, set()
    loader = make_loader(mixture, epochs=1)

    for batch in all_batches(loader):
        packed = model(batch.inputs_BT, batch.positions_BT, batch.document_offsets).flatten(0, 1)
        for start, stop in itertools.pairwise(batch.document_offsets.tolist()):
            inputs = batch.inputs_BT.flatten()[start:stop]
            if tuple(inputs.tolist()) in by_inputs:
                seen.add(tuple(inputs.tolist()))
                alone = model(inputs[None])[0]
                # fp32 sums in another order
                torch.testing.assert_close(packed[start:stop], alone, atol=2e-5, rtol=1e-4)
    assert seen == set(by_inputs)
    loader.close()


def test_the_loss_of_packed_batches_is_the_sum_over_conversations_alone(model):
    mixture = make_mixture(12)
    loss = TrainingLoss(model)
    loader = make_loader(mixture, epochs=1)

    packed = sum(
        loss(b.inputs_BT, b.targets_BT, b.positions_BT, b.document_offsets).item()
        for b in all_batches(loader)
    )

    pairs = [expected(sample) for sample in mixture.train]
    alone = sum(loss(torch.tensor([x]), torch.tensor([y])).item() for x, y in pairs)
    assert packed == pytest.approx(alone, rel=1e-5)
    loader.close()


def test_validation_is_the_held_out_conversations_by_source():
    mixture = make_mixture()
    loader = make_loader(mixture)

    everything = documents(loader.validation(100))
    one = documents(loader.validation(100, "s1"))

    assert loader.validation_sources == ("s0", "s1")
    assert sorted(everything) == sorted(expected(sample) for sample in mixture.validation)
    assert sorted(one) == sorted(expected(s) for s in mixture.validation if s.source == "s1")
    loader.close()


def test_validation_is_shared_out_over_ranks_and_counts_all_targets():
    mixture = make_mixture()
    loaders = [make_loader(mixture, rank=rank, world_size=2) for rank in range(2)]

    shares = [list(loader.validation(100)) for loader in loaders]

    found = [each for share in shares for each in documents(share)]
    assert sorted(found) == sorted(expected(sample) for sample in mixture.validation)
    assert len({len(share) for share in shares}) == 1
    n_targets = sum(int(sample.is_target[1:].sum()) for sample in mixture.validation)
    assert {batch.n_targets_global for share in shares for batch in share} == {n_targets}
    for loader in loaders:
        loader.close()


def test_rows_behind_the_last_epoch_are_empty():
    loader = make_loader(make_mixture(), epochs=1, batch=64, micro=64)

    [batch] = loader.batches(0)

    assert loader.n_steps == 1
    assert (batch.inputs_BT[loader.sequences_per_epoch :] == PAD).all()
    loader.close()


def test_rows_of_mixed_lengths_are_97_percent_full():
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(5, 0.9, 3000), 8, 1024).astype(int).tolist()

    assert Packing(lengths, 1024).fill_fraction > 0.99


def test_a_conversation_longer_than_a_row_is_refused_in_one_sentence():
    mixture = make_mixture(5)
    object.__setattr__(mixture, "context_length", 2)

    with pytest.raises(DataError, match=r"does not fit into rows of 2: build the mixture again"):
        make_loader(mixture)


@pytest.mark.gpu
@pytest.mark.parametrize("compile_it", [False, True])
def test_a_gpu_has_the_loss_and_the_gradients_of_the_cpu(model, compile_it):
    loader = make_loader(make_mixture(12), epochs=1)
    batch = next(iter(loader.batches(0)))
    inputs = (batch.inputs_BT, batch.targets_BT, batch.positions_BT, batch.document_offsets)
    here, there = TrainingLoss(model), TrainingLoss(copy.deepcopy(model).cuda())
    module = torch.compile(there) if compile_it else there

    expected = here(*inputs)
    expected.backward()
    with torch.autocast("cuda", torch.bfloat16):
        found = module(*(each.cuda() for each in inputs))
    found.backward()

    # bf16 keeps 8 bits
    assert found.item() == pytest.approx(expected.item(), rel=0.02)
    for mine, own in zip(there.parameters(), here.parameters(), strict=True):
        scale = own.grad.abs().max().item()
        torch.testing.assert_close(mine.grad.cpu(), own.grad, atol=0.05 * scale, rtol=0.05)
    here.zero_grad()
    loader.close()
