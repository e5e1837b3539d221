"""Validation loss, bits per byte, and samples, while a model is being trained."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from casallm.data.loader import Batch
from casallm.data.tokenizer import Tokenizer
from casallm.inference.engine import Engine
from casallm.inference.sampling import SamplingConfig
from casallm.model.gpt import GPT
from casallm.model.loss import token_losses
from casallm.train.distributed import World, sum_over_ranks
from casallm.train.metrics import bits_per_byte

SAMPLE_TOKENS = 64
SAMPLE_TEMPERATURE = 0.8


@dataclass(frozen=True)
class Prompt:
    """What a model is to go on from: as people read it, and as the model does."""

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Validation:
    """Mean loss in nats a target, and bits a byte over the targets that are text.

    Not a number where nothing is held out.
    """

    loss: float
    bits_per_byte: float


@torch.no_grad()
def validate(
    world: World, model: GPT, batches: Iterator[Batch], token_bytes_V: torch.Tensor
) -> Validation:
    """The model's loss on held-out batches, shared out over the ranks.

    Bits per byte are the summed negative log-likelihoods of the targets that are text (special
    tokens have no bytes) over ln 2 and the bytes of those targets: comparable across tokenizers.
    """
    totals = torch.zeros(4, dtype=torch.float64, device=world.device)
    for batch in batches:
        losses_BT = token_losses(
            model, batch.inputs_BT, batch.targets_BT, batch.positions_BT, batch.document_offsets
        )
        is_target_BT = batch.targets_BT >= 0
        bytes_BT = token_bytes_V[batch.targets_BT.clamp(min=0)] * is_target_BT
        is_text_BT = bytes_BT > 0
        totals += torch.stack(
            [
                losses_BT.sum(dtype=torch.float64),
                is_target_BT.sum().double(),
                (losses_BT * is_text_BT).sum(dtype=torch.float64),
                bytes_BT.sum().double(),
            ]
        )
    nll, n_targets, text_nll, n_bytes = sum_over_ranks(world, totals).tolist()
    return Validation(
        nll / n_targets if n_targets else math.nan, bits_per_byte(text_nll, int(n_bytes))
    )


def longest_prompt(context_length: int) -> int:
    """The tokens that a prompt may have where its continuation is to fit too."""
    return max(context_length - SAMPLE_TOKENS, context_length // 2)


def generate_samples(
    model: GPT, tokenizer: Tokenizer, prompts: Sequence[Prompt], *, context_length: int, seed: int
) -> list[str]:
    """One continuation of each prompt, the same draw at every call with the same weights.

    No prompt is longer than `longest_prompt`.
    """
    engine = Engine(model, n_slots=len(prompts), context_length=context_length)
    generated = engine.generate(
        [prompt.ids for prompt in prompts],
        max_new_tokens=min(SAMPLE_TOKENS, context_length - longest_prompt(context_length)),
        sampling=SamplingConfig(temperature=SAMPLE_TEMPERATURE, seed=seed),
        stop_ids=[tokenizer.bos_id, tokenizer.end_id],
    )
    return [tokenizer.decode(new) for new in generated]
