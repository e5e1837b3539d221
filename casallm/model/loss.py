"""Next-token cross-entropy: what training differentiates and what validation reports.

Targets below zero are ignored. The padding of the vocabulary takes no part in the softmax. Scores
come in the type of the model's products and are reduced in fp32. Compiled, the fp32 copy and the
log-probabilities exist only inside the kernels and the gradient overwrites the scores: one tensor
of that size in all, so that chunking the head would save little (torch's own
`linear_cross_entropy` was no faster on a CPU, and its chunked form breaks the graph).

Shapes: B batch, T positions, D model width, V padded vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from casallm.model.gpt import GPT

IGNORED = -1
"""The target of a position that is not to be learned."""


class TrainingLoss(nn.Module):
    """A model with its loss: the one module that DDP wraps and `torch.compile` takes."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        inputs_BT: Tensor,
        targets_BT: Tensor,
        positions_BT: Tensor | None = None,
        document_offsets: Tensor | None = None,
    ) -> Tensor:
        """The sum of the negative log-likelihoods of the targets that are not ignored, in fp32."""
        hidden_BTD = self.model.hidden(inputs_BT, positions_BT, document_offsets)
        return _cross_entropy(self.model, hidden_BTD, targets_BT, reduction="sum")


def token_losses(
    model: GPT,
    inputs_BT: Tensor,
    targets_BT: Tensor,
    positions_BT: Tensor | None = None,
    document_offsets: Tensor | None = None,
) -> Tensor:
    """Each target's negative log-likelihood in fp32 (BT), zero where the target is ignored.

    The head takes one sequence at a time: without compilation the scores of a whole batch, with
    their fp32 copies, would need more memory than training does.
    """
    hidden_BTD = model.hidden(inputs_BT, positions_BT, document_offsets)
    rows = zip(hidden_BTD, targets_BT, strict=True)
    return torch.stack(
        [_cross_entropy(model, hidden, targets, reduction="none") for hidden, targets in rows]
    )


def _cross_entropy(model: GPT, hidden: Tensor, targets: Tensor, *, reduction: str) -> Tensor:
    logits = model.logits(hidden)
    if model.config.padded_vocab_size > model.config.vocab_size:
        logits = logits[..., : model.config.vocab_size]
    return F.cross_entropy(
        logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORED, reduction=reduction
    )
