"""The summed loss and its gradients against torch's own cross-entropy in fp32."""

import pytest
import torch
import torch.nn.functional as F

from casallm.model.loss import TrainingLoss, token_losses


@pytest.fixture
def targets_BT(tokens_BT):
    targets = tokens_BT.roll(-1, dims=1)
    targets[0, 5:9] = -1
    targets[2] = -1
    return targets


def reference(model, tokens_BT, targets_BT):
    """Log-probabilities of the real vocabulary, one target at a time."""
    logits_BTV = model(tokens_BT)[..., : model.config.vocab_size]
    is_target = targets_BT >= 0
    chosen = logits_BTV[is_target].log_softmax(-1).gather(1, targets_BT[is_target][:, None])
    return -chosen.sum()


def gradients(model, loss):
    parameters = list(model.parameters())
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


def test_loss_and_gradients_equal_cross_entropy(model, tokens_BT, targets_BT):
    expected = reference(model, tokens_BT, targets_BT)

    loss = TrainingLoss(model)(tokens_BT, targets_BT)

    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    difference = gradients(model, loss) - gradients(model, expected)
    assert difference.abs().max() < 1e-4  # of gradients of about 10


def test_padding_of_the_vocabulary_takes_no_part(model, tokens_BT, targets_BT):
    before = TrainingLoss(model)(tokens_BT, targets_BT)
    with torch.no_grad():
        model.head_weight[model.config.vocab_size :] = 100.0
    after = TrainingLoss(model)(tokens_BT, targets_BT)
    after.backward()

    assert after.item() == before.item()
    assert not model.head_weight.grad[model.config.vocab_size :].any()


def test_parts_of_a_batch_add_up(model, tokens_BT, targets_BT):
    loss = TrainingLoss(model)

    whole = loss(tokens_BT, targets_BT)
    parts = [loss(*pair) for pair in zip(tokens_BT.split(1), targets_BT.split(1), strict=True)]

    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-6)


def test_a_batch_of_padding_costs_nothing_and_moves_nothing(model, tokens_BT):
    loss = TrainingLoss(model)(tokens_BT, torch.full_like(tokens_BT, -1))
    loss.backward()

    assert loss.item() == 0.0
    assert all(not parameter.grad.any() for parameter in model.parameters())


def test_under_autocast_the_loss_is_reduced_in_fp32(model, tokens_BT, targets_BT):
    with torch.autocast("cpu", torch.bfloat16):
        loss = TrainingLoss(model)(tokens_BT, targets_BT)
        hidden_BTD = model.hidden(tokens_BT)
        logits = model.logits(hidden_BTD)[..., : model.config.vocab_size].float()
    expected = F.cross_entropy(
        logits.flatten(0, 1), targets_BT.flatten(), ignore_index=-1, reduction="sum"
    )

    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@torch.no_grad()
def test_token_losses_stand_where_their_targets_do(model, tokens_BT, targets_BT):
    losses_BT = token_losses(model, tokens_BT, targets_BT)

    assert losses_BT.shape == targets_BT.shape
    assert losses_BT.dtype == torch.float32
    assert not losses_BT[targets_BT < 0].any()
    assert losses_BT[targets_BT >= 0].all()
    whole = TrainingLoss(model)(tokens_BT, targets_BT)
    assert losses_BT.sum().item() == pytest.approx(whole.item(), rel=1e-6)


@torch.no_grad()
def test_documents_and_positions_reach_the_model(model, tokens_BT, targets_BT):
    halves = torch.arange(0, 121, 20, dtype=torch.int32)
    positions = (torch.arange(40) % 20).expand(3, -1)

    packed = token_losses(model, tokens_BT, targets_BT, positions, halves)
    summed = TrainingLoss(model)(tokens_BT, targets_BT, positions, halves)

    alone = token_losses(model, tokens_BT[:, 20:], targets_BT[:, 20:])
    assert torch.allclose(packed[:, 20:], alone, atol=1e-5)
    assert summed.item() == pytest.approx(packed.sum().item(), rel=1e-6)
