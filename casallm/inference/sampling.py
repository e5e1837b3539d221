"""From the model's scores to the next token.

The random numbers come from a generator on the CPU, one number a token, whatever the device: the
same seed gives the same text wherever the scores are the same. Shapes: B rows, V real vocabulary.
"""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from casallm.config import Config


class SamplingConfig(Config):
    """How the next token is chosen among the likely ones."""

    temperature: float = Field(default=1.0, ge=0.0)
    """Scores are divided by it; 0 always takes the likeliest token."""
    top_k: int | None = Field(default=None, gt=0)
    """Only this many of the likeliest tokens are considered; empty: all."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Only the likeliest tokens that together reach this probability (Holtzman et al. 2020)."""
    seed: int = Field(default=0, ge=0)
    """The n-th prompt of a batch draws from a generator seeded with this plus n."""


def sample(
    logits_BV: Tensor, sampling: SamplingConfig, generators: Sequence[torch.Generator]
) -> list[int]:
    """One token id a row; row b draws from `generators[b]`, a generator on the CPU."""
    if sampling.temperature == 0.0:
        return logits_BV.argmax(dim=-1).tolist()
    n_kept = min(sampling.top_k or logits_BV.shape[-1], logits_BV.shape[-1])
    scores_BV, ids_BV = logits_BV.float().topk(n_kept, dim=-1)
    probabilities_BV = (scores_BV / sampling.temperature).softmax(dim=-1)
    mass_BV = probabilities_BV.cumsum(dim=-1)
    # A token is kept while those before it fall short of top_p, so the first one always is.
    is_kept_BV = mass_BV - probabilities_BV < sampling.top_p
    total_B1 = (probabilities_BV * is_kept_BV).sum(dim=-1, keepdim=True)
    drawn = [torch.rand(1, generator=generator) for generator in generators]
    points_B1 = torch.stack(drawn).to(logits_BV.device) * total_B1
    chosen_B1 = torch.searchsorted(mass_BV, points_B1, right=True)
    # Rounding may put the point behind the last kept token.
    chosen_B1 = chosen_B1.minimum(is_kept_BV.sum(dim=-1, keepdim=True) - 1)
    return ids_BV.gather(-1, chosen_B1).squeeze(-1).tolist()
