"""A model with a cache: token ids in, token ids out, several conversations at once.

Two verbs do the work: `prefill` makes a slot hold the given tokens, `decode` adds one token to each
of several slots. A slot keeps what it holds, so that the next message of a conversation computes
only what is new. The engine never sees text. Shapes: B rows, V real vocabulary.
"""

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from casallm.errors import ConfigError
from casallm.inference.sampling import SamplingConfig, sample
from casallm.model.gpt import GPT
from casallm.model.kv_cache import KVCache

PREFILL_CHUNK = 512
"""Prompt tokens of one forward pass: bounds the memory, and how long others wait."""


class Engine:
    """Generates with `model` in up to `n_slots` conversations of `context_length` tokens."""

    def __init__(self, model: GPT, n_slots: int = 1, context_length: int | None = None) -> None:
        self.model = model
        self.n_slots = n_slots
        self.context_length = context_length or model.context_length
        assert self.context_length <= model.context_length
        weight = model.embedding.weight
        self._device = weight.device
        self._cache = KVCache(
            model.config, n_slots, self.context_length, dtype=weight.dtype, device=weight.device
        )
        self._held: list[list[int]] = [[] for _ in range(n_slots)]

    def held_tokens(self, slot: int) -> list[int]:
        """The tokens whose keys and values `slot` keeps."""
        return list(self._held[slot])

    @torch.inference_mode()
    def prefill(self, slot: int, tokens: Sequence[int]) -> Tensor:
        """Make `slot` hold exactly `tokens`; returns the scores (V) of the token after them.

        What the slot already holds from the beginning is kept; the last token is always computed.
        """
        self._check_fits(len(tokens), 0)
        held = self._held[slot]
        n_kept = min(_common_prefix(held, tokens), len(tokens) - 1)
        self._cache.truncate(slot, n_kept)
        del held[n_kept:]
        for start in range(n_kept, len(tokens), PREFILL_CHUNK):
            chunk = list(tokens[start : start + PREFILL_CHUNK])
            scores_BV = self._forward([slot], [chunk])
        return scores_BV[0]

    @torch.inference_mode()
    def decode(self, next_tokens: Mapping[int, int]) -> Tensor:
        """Add `{slot: token}`; returns the scores (BV) after each, in that order."""
        slots = list(next_tokens)
        for slot in slots:
            self._check_fits(len(self._held[slot]) + 1, 0)
        return self._forward(slots, [[next_tokens[slot]] for slot in slots])

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: SamplingConfig | None = None,
        stop_ids: Collection[int] = (),
    ) -> list[list[int]]:
        """The continuation of each prompt, without the stop id that ended it."""
        continuations: list[list[int]] = [[] for _ in prompts]
        for index, token in self.stream(prompts, max_new_tokens, sampling, stop_ids):
            continuations[index].append(token)
        return continuations

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: SamplingConfig | None = None,
        stop_ids: Collection[int] = (),
    ) -> Iterator[tuple[int, int]]:
        """Pairs (index of the prompt, next token) as they are made; uses every slot.

        Prompts beyond the number of slots start as others end. What one prompt gets does not
        depend on its company.
        """
        for prompt in prompts:
            self._check_fits(len(prompt), max_new_tokens)
        return self._stream(prompts, max_new_tokens, sampling or SamplingConfig(), stop_ids)

    def _stream(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: SamplingConfig,
        stop_ids: Collection[int],
    ) -> Iterator[tuple[int, int]]:
        generators = [torch.Generator().manual_seed(sampling.seed + n) for n in range(len(prompts))]
        waiting = deque(range(len(prompts) if max_new_tokens > 0 else 0))
        running: dict[int, tuple[int, int]] = {}  # slot: (index of the prompt, tokens made)
        scores: dict[int, Tensor] = {}
        while waiting or running:
            for slot in range(self.n_slots):
                if waiting and slot not in running:
                    running[slot] = (waiting.popleft(), 0)
                    scores[slot] = self.prefill(slot, prompts[running[slot][0]])
            slots = sorted(running)
            chosen = sample(
                torch.stack([scores[slot] for slot in slots]),
                sampling,
                [generators[running[slot][0]] for slot in slots],
            )
            going = {}
            for slot, token in zip(slots, chosen, strict=True):
                index, n_made = running.pop(slot)
                if token in stop_ids:
                    continue
                yield index, token
                if n_made + 1 < max_new_tokens:
                    running[slot] = (index, n_made + 1)
                    going[slot] = token
            if going:
                scores = dict(zip(going, self.decode(going), strict=True))

    def _forward(self, slots: list[int], tokens: list[list[int]]) -> Tensor:
        """Run new tokens of `slots` through the model; the scores (BV) after the last of each."""
        tokens_BT = torch.tensor(tokens, device=self._device)
        rows = self._cache.rows(slots, tokens_BT.shape[1])
        hidden_BTD = self.model.hidden(tokens_BT, cache=rows)
        for slot, new in zip(slots, tokens, strict=True):
            self._held[slot] += new
        logits_BV = self.model.logits(hidden_BTD[:, -1])
        return logits_BV[:, : self.model.config.vocab_size]

    def _check_fits(self, n_tokens: int, n_new: int) -> None:
        if n_tokens == 0:
            raise ConfigError("the prompt is empty: begin it with the tokenizer's bos_id")
        if n_tokens + n_new > self.context_length:
            raise ConfigError(
                f"{n_tokens} tokens and {n_new} new ones do not fit into the context of"
                f" {self.context_length}: shorten the prompt or ask for fewer new tokens"
            )


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(first), len(second)))
