"""Keys and values of past tokens, so that each is computed once: a static cache with slots.

One slot holds one conversation. The tensors are allocated once for all slots and the whole
context; `lengths` says how much of each slot is real. What lies beyond it is stale or zero, and
is never attended to. The cache knows nothing of tokens, text or sampling.

Shapes: L layers, N slots, B rows of one forward pass, T new positions, S cached positions, H key
and value heads, K head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from casallm.estimate.architecture import ModelConfig


class KVCache:
    """Keys and values of `n_slots` conversations of up to `context_length` tokens each."""

    def __init__(
        self,
        config: ModelConfig,
        n_slots: int,
        context_length: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (config.n_layers, n_slots, config.kv_heads, context_length, config.d_head)
        self.k_LNHSK = torch.zeros(shape, dtype=dtype, device=device)
        self.v_LNHSK = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = [0] * n_slots

    @property
    def context_length(self) -> int:
        """Tokens that fit into one slot."""
        return self.k_LNHSK.shape[3]

    def truncate(self, slot: int, length: int) -> None:
        """Forget all but the first `length` tokens of `slot`."""
        assert 0 <= length <= self.lengths[slot]
        self.lengths[slot] = length

    def rows(self, slots: Sequence[int], n_tokens: int) -> "CacheRows":
        """Room for the next `n_tokens` of each of `slots`, in that order, for one forward pass.

        The lengths grow when the pass is over (`CacheRows.commit`): one that fails leaves the
        conversations as they were.
        """
        starts = [self.lengths[slot] for slot in slots]
        end = max(starts) + n_tokens
        assert end <= self.context_length
        assert len(set(slots)) == len(slots)
        device = self.k_LNHSK.device
        slots_B = torch.tensor(slots, device=device)
        positions_BT = torch.tensor(starts, device=device)[:, None] + torch.arange(
            n_tokens, device=device
        )
        is_plain = len(set(starts)) == 1 and (n_tokens == 1 or end == n_tokens)
        seen_BTS = torch.arange(end, device=device) <= positions_BT[..., None]
        is_adjacent = list(slots) == list(range(slots[0], slots[0] + len(slots)))
        return CacheRows(
            cache=self,
            slots=tuple(slots),
            slots_B=slots_B,
            index=slice(slots[0], slots[0] + len(slots)) if is_adjacent else slots_B,
            positions_BT=positions_BT,
            mask_B1TS=None if is_plain else seen_BTS[:, None],
            end=end,
        )


@dataclass(frozen=True)
class CacheRows:
    """The part of a cache that one forward pass writes and reads: a row for each of `slots`."""

    cache: KVCache
    slots: tuple[int, ...]
    slots_B: Tensor
    """The same, where the cache is."""
    index: slice | Tensor
    """The slots to read: a slice where they are adjacent, which copies nothing."""
    positions_BT: Tensor
    """Where the new tokens stand in their conversations."""
    mask_B1TS: Tensor | None
    """True where a new token may look; None where the causal flag alone says it."""
    end: int
    """Cached positions read: those of the longest row, new tokens included."""

    def update(self, layer: int, k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values of `layer`; returns all of them, old and new (BHSK)."""
        return (
            self._write_and_read(self.cache.k_LNHSK[layer], k_BHTK),
            self._write_and_read(self.cache.v_LNHSK[layer], v_BHTK),
        )

    def commit(self) -> None:
        """Count the new tokens as held, now that every layer has stored them."""
        for slot in self.slots:
            self.cache.lengths[slot] += self.positions_BT.shape[1]

    def _write_and_read(self, kept_NHSK: Tensor, new_BHTK: Tensor) -> Tensor:
        # Two index tensors with a slice between them put their axes first: (B, T, H, K).
        new_BTHK = new_BHTK.transpose(1, 2).to(kept_NHSK.dtype)
        kept_NHSK[self.slots_B[:, None], :, self.positions_BT] = new_BTHK
        return kept_NHSK[self.index, :, : self.end]
