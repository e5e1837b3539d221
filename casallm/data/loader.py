"""Batches of windows for one rank, prepared ahead of the training step that asks for them.

Sequence i of a run is the window that `order.Order` puts at position i: the state of the loader is
one integer, and which rank reads a sequence never changes which sequence comes when. Legend of the
shape suffixes: B sequences of a micro-batch, T positions.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from casallm.data.manifest import SPLITS, Split
from casallm.data.order import Order
from casallm.data.shards import Dataset
from casallm.errors import DataError

IGNORED = -1
"""A target that counts for nothing."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch on its device; targets of IGNORED are left out of the loss."""

    inputs_BT: torch.Tensor
    """int64 ids."""
    targets_BT: torch.Tensor
    """int64: the id that follows each input, or IGNORED."""
    positions_BT: torch.Tensor | None
    """Positions inside a document, where rows are packed; None: 0 to T - 1."""
    document_offsets: torch.Tensor | None
    """int32: where each document begins in the flattened rows, and B * T to the end of the tensor;
    None: each row is one."""
    n_targets_global: int
    """Targets that count, of the whole global batch on all ranks."""


class PretrainLoader:
    """This rank's share of every global batch of windows, and of the validation windows."""

    def __init__(
        self,
        dataset: Dataset,
        *,
        context_length: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self._dataset = dataset
        self._context_length = context_length
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._rank, self._world_size = rank, world_size
        self._device = device
        self._order = Order(dataset.window_counts("train", context_length), seed)
        self.sequences_per_epoch = self._order.n_windows
        for split in SPLITS:
            if not sum(dataset.window_counts(split, context_length)):
                raise DataError(_too_small(dataset, split, context_length))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._ahead: tuple[int, Future[list[torch.Tensor]]] | None = None

    def batches(self, step: int, skipped: int = 0) -> Iterator[Batch]:
        """This rank's micro-batches of an optimizer step, in order; the next step's are begun.

        The step's sequences start at step * global_batch_size + `skipped`. Every rank gets the
        same number of micro-batches of the same shape, filled up with rows that count for nothing.
        """
        first = step * self._global_batch_size + skipped
        if self._ahead is not None and self._ahead[0] == first:
            rows = self._ahead[1].result()
        else:
            rows = self._read_step(first)
        following = first + self._global_batch_size
        self._ahead = (following, self._thread.submit(self._read_step, following))
        n_targets = self._global_batch_size * self._context_length
        yield from (self._to_batch(tokens_BT, n_targets) for tokens_BT in rows)

    def validation(self, n_sequences: int) -> Iterator[Batch]:
        """The first `n_sequences` held-out windows (all, if fewer), shared out over the ranks."""
        counts = self._dataset.window_counts("val", self._context_length)
        n_sequences = min(n_sequences, sum(counts))
        starts = np.cumsum([0, *counts])
        windows = np.arange(self._rank, n_sequences, self._world_size)
        shards = np.searchsorted(starts, windows, side="right") - 1
        indices = windows - starts[shards]
        n_targets = n_sequences * self._context_length
        for micro_batch in self._micro_batches(n_sequences):
            rows = self._read("val", shards[micro_batch], indices[micro_batch])
            yield self._to_batch(rows, n_targets)

    def close(self) -> None:
        """Ends what reads ahead."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._dataset.close()

    def _read_step(self, first: int) -> list[torch.Tensor]:
        last = first + self._global_batch_size
        self._dataset.expect("train", self._order.shards_from(first, last - 1))
        positions = np.arange(first + self._rank, last, self._world_size, dtype=np.int64)
        _, shards, indices = self._order.locate_all(positions)
        return [
            self._read("train", shards[micro_batch], indices[micro_batch])
            for micro_batch in self._micro_batches(self._global_batch_size)
        ]

    def _micro_batches(self, n_sequences: int) -> list[slice]:
        """This rank's rows in each micro-batch, as many for every rank; the last may be short."""
        most_rows = -(-n_sequences // self._world_size)
        size = self._micro_batch_size
        return [slice(start, start + size) for start in range(0, most_rows, size)]

    def _read(
        self, split: Split, shards: npt.NDArray[np.int64], indices: npt.NDArray[np.int64]
    ) -> torch.Tensor:
        """The T + 1 ids of each window; rows that are missing from a micro-batch hold IGNORED."""
        width = self._context_length
        rows = np.full((self._micro_batch_size, width + 1), IGNORED, dtype=np.int64)
        for row, shard, index in zip(rows, shards.tolist(), indices.tolist(), strict=False):
            start = index * width
            row[:] = self._dataset.shard(split, shard)[start : start + width + 1]
        tokens_BT = torch.from_numpy(rows)
        return tokens_BT.pin_memory() if self._device.type == "cuda" else tokens_BT

    def _to_batch(self, tokens_BT: torch.Tensor, n_targets_global: int) -> Batch:
        tokens_BT = tokens_BT.to(self._device, non_blocking=True)
        return Batch(
            inputs_BT=tokens_BT[:, :-1].clamp(min=0),
            targets_BT=tokens_BT[:, 1:].contiguous(),
            positions_BT=None,
            document_offsets=None,
            n_targets_global=n_targets_global,
        )


def _too_small(dataset: Dataset, split: Split, context_length: int) -> str:
    record = dataset.splits[split]
    longest = max((shard.tokens for shard in record.shards), default=0)
    part = "to train on" if split == "train" else "held out"
    return (
        f"{dataset.directory} has {longest:,} tokens {part} in its longest shard, too few for one"
        f" window of {context_length:,}: add text, or set train.context_length below {longest:,}"
    )
