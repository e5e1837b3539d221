import pytest
import torch

from casallm.estimate.architecture import ModelConfig
from casallm.model.gpt import build_gpt
from casallm.train.optim import OptimConfig, Optimizers, clip_gradients

SHAPE = ModelConfig(n_layers=2, d_model=32, n_heads=2, vocab_size=100, is_tied=False)


def model_with_gradients(seed: int = 0):
    model = build_gpt(SHAPE, 16, seed=1)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return model


def test_adamw_is_the_published_update():
    model = model_with_gradients()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}

    Optimizers(model, OptimConfig(lr=0.1, weight_decay=0.5)).step(0.5)

    for name, p in model.named_parameters():
        decay = 0.5 if p.ndim >= 2 else 0.0
        g = gradients[name]
        expected = before[name] * (1 - 0.05 * decay) - 0.05 * g / (g.abs() + 1e-8)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-4, atol=1e-6)
        assert p.grad is None


def test_muon_takes_the_matrices_of_the_blocks_alone():
    model = model_with_gradients()

    state = Optimizers(model, OptimConfig(name="muon")).state()

    momentum = {name for name in state if name.endswith(".momentum_buffer")}
    matrices = {n for n, p in model.named_parameters() if n.startswith("blocks.") and p.ndim == 2}
    assert {name.removesuffix(".momentum_buffer") for name in momentum} == matrices
    assert "embedding.weight.exp_avg" in state
    assert "head.weight.exp_avg_sq" in state


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_copied_state_continues_to_the_same_bits(name):
    ours, theirs = model_with_gradients(), model_with_gradients()
    first = Optimizers(ours, OptimConfig(name=name))
    first.step(1.0)
    second = Optimizers(theirs, OptimConfig(name=name))
    with torch.no_grad():
        for mine, yours in zip(ours.parameters(), theirs.parameters(), strict=True):
            yours.copy_(mine)
        for key, value in second.state().items():
            value.copy_(first.state()[key])
    for model, optimizers in ((ours, first), (theirs, second)):
        generator = torch.Generator().manual_seed(7)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizers.step(0.7)

    for mine, yours in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, yours)


def test_clipping_returns_the_norm_before():
    model = model_with_gradients()
    norm = torch.sqrt(sum(p.grad.square().sum() for p in model.parameters()))

    said = clip_gradients(model, 1.0)

    torch.testing.assert_close(said, norm)
    clipped = torch.sqrt(sum(p.grad.square().sum() for p in model.parameters()))
    assert clipped == pytest.approx(1.0, rel=1e-4)
