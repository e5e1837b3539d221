"""Small models of every kind, with weights large enough that each of them matters."""

import pytest
import torch

from casallm.estimate.architecture import ModelConfig
from casallm.model.gpt import GPT, build_gpt

KINDS = {
    "classic": ModelConfig(family="classic", n_layers=2, d_model=32, n_heads=4, vocab_size=100),
    "modern": ModelConfig(n_layers=2, d_model=32, n_heads=4, vocab_size=100),
    "grouped-untied": ModelConfig(
        n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, vocab_size=100, is_tied=False
    ),
}
CONTEXT_LENGTH = 48


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(params=KINDS)
def config(request) -> ModelConfig:
    return KINDS[request.param]


@pytest.fixture
def model(config) -> GPT:
    return randomised(build_gpt(config, CONTEXT_LENGTH))


@torch.no_grad()
def randomised(model: GPT) -> GPT:
    """`model` with no weight left at zero or one, so that a test sees what each of them does."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.normal_(centre, 0.2, generator=generator)
    return model


@pytest.fixture
def tokens_BT() -> torch.Tensor:
    return torch.randint(0, 100, (3, 40), generator=torch.Generator().manual_seed(1))
