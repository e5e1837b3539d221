"""Next-token cross-entropy: what training differentiates and what validation reports.

Targets below zero are ignored. The padding of the vocabulary takes no part in the softmax. Scores
come in the type of the model's products and are reduced in fp32. Compiled, the fp32 copy and the
log-probabilities exist only inside the kernels, so that the step holds the scores and their
gradient and no third tensor of that size.

Shapes: B batch, T positions, V padded vocabulary.
"""

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
        document_ids_BT: Tensor | None = None,
    ) -> Tensor:
        """The sum of the negative log-likelihoods of the targets that are not ignored, in fp32."""
        logits_BTV = self.model(inputs_BT, positions_BT, document_ids_BT)
        return _cross_entropy(self.model, logits_BTV, targets_BT, reduction="sum")


def token_losses(
    model: GPT,
    inputs_BT: Tensor,
    targets_BT: Tensor,
    positions_BT: Tensor | None = None,
    document_ids_BT: Tensor | None = None,
) -> Tensor:
    """Each target's negative log-likelihood in fp32 (BT), zero where the target is ignored."""
    logits_BTV = model(inputs_BT, positions_BT, document_ids_BT)
    return _cross_entropy(model, logits_BTV, targets_BT, reduction="none").view_as(targets_BT)


def _cross_entropy(model: GPT, logits_BTV: Tensor, targets_BT: Tensor, *, reduction: str) -> Tensor:
    if model.config.padded_vocab_size > model.config.vocab_size:
        logits_BTV = logits_BTV[..., : model.config.vocab_size]
    return F.cross_entropy(
        logits_BTV.flatten(0, 1).float(),
        targets_BT.flatten(),
        ignore_index=IGNORED,
        reduction=reduction,
    )
