"""One rank among others: who it is, its device, and the few collectives that training needs.

torchrun says who a rank is through the environment. One rank alone joins no group, so every
collective here is then the identity. Flags travel on a gloo group of their own, so that asking
"does anybody want to stop?" never waits for a GPU.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from casallm.errors import TrainingError

T = TypeVar("T")

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Longer than any save, evaluation or compilation that one rank does while others wait."""


@dataclass(frozen=True)
class World:
    """The ranks of this generation, seen from one of them."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    flags: "dist.ProcessGroup | None"

    @property
    def is_leader(self) -> bool:
        """Whether this rank writes, speaks and decides for all."""
        return self.rank == 0


def join_world(device_kind: str) -> World:
    """This rank's World after all ranks have met; `device_kind` is cuda or cpu."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cpu")
    if device_kind == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if size == 1:
        return World(rank, size, local_rank, device, None)
    backend = "nccl" if device_kind == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=device if device_kind == "cuda" else None,
    )
    flags = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
    return World(rank, size, local_rank, device, flags)


def meet(world: World) -> None:
    """Wait until all ranks have come this far, and with them what they sent each other."""
    if world.size > 1:
        dist.barrier(group=world.flags)


def sum_over_ranks(world: World, values: torch.Tensor) -> torch.Tensor:
    """`values` summed over the ranks, in place, on the ranks' device."""
    if world.size > 1:
        dist.all_reduce(values)
    return values


def broadcast_tensors(world: World, tensors: Iterable[torch.Tensor]) -> None:
    """Rank 0's values into every rank's `tensors`, one at a time, in the order given."""
    if world.size > 1:
        for tensor in tensors:
            buffer = tensor.to(world.device)
            dist.broadcast(buffer, src=0)
            if buffer is not tensor:
                tensor.copy_(buffer)


def broadcast_object(world: World, value: T) -> T:
    """Rank 0's `value` on every rank; small, picklable, between processes of one start."""
    if world.size == 1:
        return value
    box: list[T] = [value]
    dist.broadcast_object_list(box, src=0, group=world.flags)
    return box[0]


def agree(world: World, is_true: bool) -> bool:
    """Whether `is_true` holds on every rank."""
    vote = torch.tensor([int(is_true)])
    if world.size > 1:
        dist.all_reduce(vote, op=dist.ReduceOp.MIN, group=world.flags)
    return bool(vote.item())


class FlagExchange:
    """The largest of every rank's flags, one step late, without waiting in between.

    `swap(flags)` starts the exchange of this step's flags and returns the outcome of the last
    one, so every rank sees the same flags at the same step.
    """

    def __init__(self, world: World, n_flags: int) -> None:
        self._world = world
        self._pending: tuple[torch.Tensor, dist.Work | None] | None = None
        self._none = [0] * n_flags

    def swap(self, flags: list[int]) -> list[int]:
        """The agreed flags of the step before; zeros at the first step."""
        agreed = self._collect()
        values = torch.tensor(flags, dtype=torch.int64)
        work = None
        if self._world.size > 1:
            work = dist.all_reduce(
                values, op=dist.ReduceOp.MAX, group=self._world.flags, async_op=True
            )
        self._pending = (values, work)
        return agreed

    def _collect(self) -> list[int]:
        if self._pending is None:
            return self._none
        values, work = self._pending
        if work is not None and not work.wait():
            raise TrainingError("a rank left the exchange of flags: see its last words above")
        return [int(value) for value in values]
