"""Batches of packed conversations for one rank: several in a row, none split, none repeated.

Conversations are packed by best-fit decreasing (Johnson 1974): the longest first, each into the
fullest row that still has room. Which lengths share a row follows from the lengths alone, so that
every epoch has the same number of rows; an epoch's seed decides which conversations of a length
stand in its places, and the order of the rows. Every epoch therefore sees each conversation
exactly once, and any row of any epoch is computed on its own: the state of the loader is one
integer. Behind the last epoch there are empty rows, with which the last step is filled up.

In a row each conversation starts at position 0 and is a document of its own, as is the padding
behind the last one; attention stays within documents, so nothing leaks. The last token of a
conversation is a target only. Shapes: B rows of a micro-batch, T positions.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from casallm.data.loader import IGNORED, Batch
from casallm.data.mixture import Mixture, Sample
from casallm.errors import DataError

Indices = npt.NDArray[np.int64]


class Packing:
    """Which conversations, of these lengths, share which row of `capacity` positions."""

    def __init__(self, lengths: Sequence[int], capacity: int) -> None:
        self._lengths = np.array(lengths, dtype=np.int64)
        rows = pack_best_fit(lengths, capacity)
        self.n_rows = len(rows)
        self.fill_fraction = sum(lengths) / max(1, self.n_rows * capacity)
        self._sizes = [len(row) for row in rows]
        self._ends = np.cumsum(self._sizes, dtype=np.int64)
        slots = np.array([each for row in rows for each in row], dtype=np.int64)
        self._slots_by_length = np.argsort(self._lengths[slots], kind="stable")

    def most_in(self, n_rows: int) -> int:
        """The most conversations that so many rows in a row hold, of one epoch or across two."""
        return sum(sorted([*self._sizes, *self._sizes], reverse=True)[:n_rows])

    def rows(self, seed: int, epoch: int) -> list[Indices]:
        """The conversations in each row of an epoch: all of them, each once."""
        random = np.random.Generator(np.random.PCG64([seed, epoch]))
        by_length = np.lexsort((random.permutation(len(self._lengths)), self._lengths))
        placed = np.empty_like(by_length)
        placed[self._slots_by_length] = by_length
        rows = np.split(placed, self._ends[:-1]) if self.n_rows else []
        return [rows[each] for each in random.permutation(self.n_rows).tolist()]


def pack_best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of indices into `lengths`, none longer than `capacity` together, by best-fit decreasing.

    Rows are found by the room that they have left: a bit for each amount that some row has.
    """
    rows: list[list[int]] = []
    rows_by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0
    for index in sorted(range(len(lengths)), key=lambda each: -lengths[each]):
        length = lengths[index]
        if not 0 < length <= capacity:
            raise ValueError(f"a conversation of {length} tokens does not fit into {capacity}")
        fitting = rooms >> length
        room = length + (fitting & -fitting).bit_length() - 1 if fitting else capacity
        row = rows_by_room[room].pop() if fitting else len(rows)
        if not fitting:
            rows.append([])
        elif not rows_by_room[room]:
            rooms &= ~(1 << room)
        rows[row].append(index)
        rows_by_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return rows


@dataclass(frozen=True)
class PackedRows:
    """The tensors of one micro-batch: int64 (BT), and the offsets of its documents, int32."""

    inputs: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor
    document_offsets: torch.Tensor


class SftLoader:
    """This rank's share of every global batch of packed rows, and of the held-out ones."""

    def __init__(
        self,
        mixture: Mixture,
        *,
        epochs: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self._mixture = mixture
        self._width = mixture.context_length
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._rank, self._world_size = rank, world_size
        self._seed, self._device = seed, device
        self._packing = _packing_of(mixture.train, self._width)
        self._n_offsets = micro_batch_size + self._packing.most_in(micro_batch_size) + 1
        self.sequences_per_epoch = self._packing.n_rows
        self.fill_fraction = self._packing.fill_fraction
        self._n_rows = epochs * self._packing.n_rows
        self.n_steps = -(-self._n_rows // global_batch_size)
        self.validation_sources = tuple(
            dict.fromkeys(sample.source for sample in mixture.validation)
        )
        self._rows_of_epoch = lru_cache(maxsize=2)(self._packing.rows)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sft-loader")
        self._ahead: tuple[int, Future[tuple[list[PackedRows], int]]] | None = None

    def batches(self, step: int, skipped: int = 0) -> Iterator[Batch]:
        """This rank's micro-batches of an optimizer step, in order; the next step's are begun.

        The step's rows start at step * global_batch_size + `skipped`; those behind the last epoch
        are empty. Every rank gets the same number of micro-batches of the same shape.
        """
        first = step * self._global_batch_size + skipped
        if self._ahead is not None and self._ahead[0] == first:
            micro_batches, n_targets = self._ahead[1].result()
        else:
            micro_batches, n_targets = self._read_step(first)
        following = first + self._global_batch_size
        self._ahead = (following, self._thread.submit(self._read_step, following))
        yield from (self._to_batch(rows, n_targets) for rows in micro_batches)

    def validation(self, n_sequences: int, source: str | None = None) -> Iterator[Batch]:
        """The first held-out rows, of one source or of all, shared out over the ranks."""
        samples = [each for each in self._mixture.validation if source in (None, each.source)]
        rows = _packing_of(samples, self._width).rows(0, 0)[:n_sequences]
        n_targets = sum(_n_targets(samples[each]) for row in rows for each in row)
        for micro_batch in self._share([[samples[each] for each in row] for row in rows]):
            yield self._to_batch(self._build(micro_batch), n_targets)

    def close(self) -> None:
        """Ends the thread that reads ahead."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _read_step(self, first: int) -> tuple[list[PackedRows], int]:
        """This rank's micro-batches of the rows from `first`, and the targets of all ranks."""
        rows = [self._row(first + place) for place in range(self._global_batch_size)]
        n_targets = sum(_n_targets(sample) for row in rows for sample in row)
        return [self._build(micro_batch) for micro_batch in self._share(rows)], n_targets

    def _row(self, position: int) -> list[Sample]:
        """The conversations in row `position` of the run; none behind the last epoch."""
        if position >= self._n_rows:
            return []
        epoch, place = divmod(position, self._packing.n_rows)
        return [self._mixture.train[each] for each in self._rows_of_epoch(self._seed, epoch)[place]]

    def _share(self, rows: list[list[Sample]]) -> Iterator[list[list[Sample]]]:
        """This rank's rows by micro-batch, as many for every rank; the last may be short."""
        own = rows[self._rank :: self._world_size]
        most = -(-len(rows) // self._world_size)
        size = self._micro_batch_size
        return (own[start : start + size] for start in range(0, most, size))

    def _build(self, rows: list[list[Sample]]) -> PackedRows:
        """The tensors of a micro-batch; rows that are missing hold padding alone."""
        shape = (3, self._micro_batch_size, self._width)
        values = np.zeros(shape, dtype=np.int64)
        inputs, targets, positions = values
        inputs[:], targets[:], positions[:] = self._mixture.pad_id, IGNORED, np.arange(self._width)
        starts = set(range(0, inputs.size, self._width))
        for b, row in enumerate(rows):
            start = 0
            for sample in row:
                stop = start + len(sample.ids) - 1
                ids = sample.ids.astype(np.int64)
                inputs[b, start:stop] = ids[:-1]
                targets[b, start:stop] = np.where(sample.is_target[1:], ids[1:], IGNORED)
                positions[b, start:stop] = np.arange(stop - start)
                starts.add(b * self._width + stop)
                start = stop
            positions[b, start:] = np.arange(self._width - start)
        tensors = [*torch.from_numpy(values), self._offsets(starts)]
        if self._device.type == "cuda":
            tensors = [tensor.pin_memory() for tensor in tensors]
        return PackedRows(*tensors)

    def _offsets(self, starts: set[int]) -> torch.Tensor:
        """`starts` and the end, as many for every batch: a compiled model sees one shape."""
        n_positions = self._micro_batch_size * self._width
        offsets = np.full(max(self._n_offsets, len(starts) + 1), n_positions, dtype=np.int32)
        offsets[: len(starts)] = sorted(starts)
        return torch.from_numpy(offsets)

    def _to_batch(self, rows: PackedRows, n_targets_global: int) -> Batch:
        def to_device(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(self._device, non_blocking=True)

        return Batch(
            inputs_BT=to_device(rows.inputs),
            targets_BT=to_device(rows.targets),
            positions_BT=to_device(rows.positions),
            document_offsets=to_device(rows.document_offsets),
            n_targets_global=n_targets_global,
        )


def _packing_of(samples: Sequence[Sample], width: int) -> Packing:
    lengths = [len(sample.ids) - 1 for sample in samples]
    if lengths and max(lengths) > width:
        raise DataError(
            f"a conversation of {max(lengths) + 1:,} tokens does not fit into rows of {width:,}:"
            " build the mixture again for this context length"
        )
    return Packing(lengths, width)


def _n_targets(sample: Sample) -> int:
    return int(np.count_nonzero(sample.is_target[1:]))
