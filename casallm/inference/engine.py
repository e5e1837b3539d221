"""A model with a cache: token ids in, token ids out, several conversations at once.

Two verbs do the work: `prefill` makes a slot hold the given tokens, `decode` adds one token to each
of several slots. A slot keeps what it holds, so that the next message of a conversation computes
only what is new. The engine never sees text. Shapes: B rows, V real vocabulary.
"""

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

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
        self._check_fits(len(tokens))
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
            self._check_fits(len(self._held[slot]), 1)
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
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {max_new_tokens}: ask for at least one new token")
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
        waiting = deque(enumerate(prompts))
        replies: dict[int, _Reply] = {}
        while waiting or replies:
            for slot in range(self.n_slots):
                if waiting and slot not in replies:
                    index, prompt = waiting.popleft()
                    generator = torch.Generator().manual_seed(sampling.seed + index)
                    scores_V = self.prefill(slot, prompt)
                    replies[slot] = _Reply(index, max_new_tokens, generator, scores_V)
            chosen = _choose(replies, sampling)
            for slot, token in chosen.items():
                reply = replies[slot]
                if token not in stop_ids:
                    yield reply.index, token
                reply.n_left -= 1
                if token in stop_ids or reply.n_left == 0:
                    del replies[slot]
            self._continue({slot: t for slot, t in chosen.items() if slot in replies}, replies)

    def _continue(self, next_tokens: dict[int, int], replies: dict[int, "_Reply"]) -> None:
        """Decode the tokens just made, and keep the scores that follow them."""
        if next_tokens:
            for slot, scores_V in zip(next_tokens, self.decode(next_tokens), strict=True):
                replies[slot].scores_V = scores_V

    def _forward(self, slots: list[int], tokens: list[list[int]]) -> Tensor:
        """Run new tokens of `slots` through the model; the scores (BV) after the last of each."""
        tokens_BT = torch.tensor(tokens, device=self._device)
        rows = self._cache.rows(slots, tokens_BT.shape[1])
        hidden_BTD = self.model.hidden(tokens_BT, cache=rows)
        for slot, new in zip(slots, tokens, strict=True):
            self._held[slot] += new
        logits_BV = self.model.logits(hidden_BTD[:, -1])
        return logits_BV[:, : self.model.config.vocab_size]

    def _check_fits(self, n_tokens: int, n_new: int = 0) -> None:
        if n_tokens == 0:
            raise ConfigError("the prompt is empty: begin it with the tokenizer's <|bos|>")
        if n_tokens + n_new > self.context_length:
            asked = f" and {n_new:,} new ones" if n_new else ""
            raise ConfigError(
                f"{n_tokens:,} tokens{asked} do not fit into the context of"
                f" {self.context_length:,}: shorten the prompt or ask for fewer new tokens"
            )


@dataclass
class _Reply:
    """What a slot is busy with."""

    index: int
    """Which prompt it answers."""
    n_left: int
    """Tokens that may still be made."""
    generator: torch.Generator
    scores_V: Tensor
    """Of the token to be chosen next."""


def _choose(replies: Mapping[int, _Reply], sampling: SamplingConfig) -> dict[int, int]:
    """The next token of each busy slot, slots in ascending order."""
    slots = sorted(replies)
    scores_BV = torch.stack([replies[slot].scores_V for slot in slots])
    tokens = sample(scores_BV, sampling, [replies[slot].generator for slot in slots])
    return dict(zip(slots, tokens, strict=True))


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(first), len(second)))
