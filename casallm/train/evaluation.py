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

SAMPLE_TOKENS = 64
SAMPLE_TEMPERATURE = 0.8
PROMPT_TOKENS = 12


@dataclass(frozen=True)
class Validation:
    """Mean loss in nats a target, and bits a byte over the targets that are text."""

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
            model, batch.inputs_BT, batch.targets_BT, batch.positions_BT, batch.document_ids_BT
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
    return Validation(nll / max(n_targets, 1), text_nll / math.log(2) / max(n_bytes, 1))


def generate_samples(
    model: GPT, tokenizer: Tokenizer, prompts: Sequence[str], *, context_length: int, seed: int
) -> list[str]:
    """One continuation of each prompt, the same draw at every call with the same weights."""
    engine = Engine(model, n_slots=len(prompts), context_length=context_length)
    most = max(context_length - SAMPLE_TOKENS, context_length // 2)
    ids = [[tokenizer.bos_id, *tokenizer.encode(prompt)][:most] for prompt in prompts]
    generated = engine.generate(
        ids,
        max_new_tokens=min(SAMPLE_TOKENS, context_length - most),
        sampling=SamplingConfig(temperature=SAMPLE_TEMPERATURE, seed=seed),
        stop_ids=[tokenizer.bos_id],
    )
    return [tokenizer.decode(new) for new in generated]
