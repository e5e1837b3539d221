"""Which tokens can be drawn, how often, and that a seed decides it."""

import pytest
import torch

from casallm.config import build
from casallm.errors import ConfigError
from casallm.inference.sampling import SamplingConfig, sample

LOGITS_V = torch.tensor([0.1, 0.4, 0.2, 0.25, 0.05]).log()
"""The scores of five tokens with these probabilities."""


def draw(sampling, n=4000, logits_V=LOGITS_V):
    """How often each token comes, of n draws in one batch."""
    generators = [torch.Generator().manual_seed(sampling.seed + i) for i in range(n)]
    tokens = sample(logits_V.expand(n, -1), sampling, generators)
    return torch.bincount(torch.tensor(tokens), minlength=len(logits_V)) / n


def test_temperature_zero_takes_the_likeliest():
    assert draw(SamplingConfig(temperature=0.0), n=3).tolist() == [0, 1, 0, 0, 0]


def test_draws_follow_the_probabilities():
    frequencies = draw(SamplingConfig())

    # The deviation of a frequency over 4000 draws is below 0.008.
    assert (frequencies - LOGITS_V.exp()).abs().max() < 0.03


def test_temperature_sharpens_and_flattens():
    squared = LOGITS_V.exp().square()

    assert (draw(SamplingConfig(temperature=0.5)) - squared / squared.sum()).abs().max() < 0.03
    assert (draw(SamplingConfig(temperature=1e6)) - 0.2).abs().max() < 0.03


def test_top_k_keeps_the_k_likeliest_in_proportion():
    frequencies = draw(SamplingConfig(top_k=2))

    assert frequencies[[0, 2, 4]].sum() == 0
    assert frequencies[1].item() == pytest.approx(0.4 / 0.65, abs=0.03)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.3, [1]), (0.5, [1, 3]), (0.7, [1, 2, 3]), (1.0, [0, 1, 2, 3, 4])]
)
def test_top_p_keeps_the_fewest_that_reach_the_mass(top_p, kept):
    frequencies = draw(SamplingConfig(top_p=top_p))

    assert frequencies.nonzero().flatten().tolist() == kept


def test_top_k_larger_than_the_vocabulary_is_all_of_it():
    assert torch.equal(draw(SamplingConfig(top_k=50), n=50), draw(SamplingConfig(), n=50))


def test_a_row_depends_on_its_own_generator_alone():
    logits_BV = torch.randn(6, 50, generator=torch.Generator().manual_seed(2))
    sampling = SamplingConfig(top_p=0.9)

    together = sample(logits_BV, sampling, [torch.Generator().manual_seed(b) for b in range(6)])
    alone = [
        sample(logits_BV[b : b + 1], sampling, [torch.Generator().manual_seed(b)])[0]
        for b in range(6)
    ]

    assert together == alone


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": "-1"}, "temperature is '-1': input should be greater than or equal to 0"),
        ({"top_p": "0"}, "top_p is '0': input should be greater than 0"),
        ({"top_k": "0"}, "top_k is 0: input should be greater than 0"),
    ],
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(ConfigError, match=f"settings: {message}"):
        build(SamplingConfig, setting)
