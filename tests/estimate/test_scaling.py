import math

import pytest

from casallm.errors import ConfigError
from casallm.estimate.scaling import (
    BESIROGLU_2024,
    check_tokens,
    loss_range,
    tokens_for_params,
)


def test_chinchilla_itself():
    """70B parameters on 1.4T tokens: the refit gives 1.97 nats, near the paper's 1.94."""
    assert BESIROGLU_2024.loss(70e9, 1.4e12) == pytest.approx(1.97, abs=0.01)


def test_the_optimum_is_near_twenty_tokens_a_parameter():
    """Of Chinchilla's own work, 5.76e23 FLOP = 6 N D, over sizes 2 % apart."""
    sizes = [1e10 * 1.02**step for step in range(200)]

    best = min(sizes, key=lambda n: BESIROGLU_2024.loss(n, 5.76e23 / 6 / n))

    assert 15 < 5.76e23 / 6 / best**2 < 25


def test_the_range_of_the_loss_holds_its_middle():
    low, middle, high = loss_range(1.2e9, 24e9)

    assert low < middle < high
    assert high - low < 0.3


def test_twenty_tokens_a_parameter():
    assert tokens_for_params(1.2e9) == 24_000_000_000


def test_more_tokens_than_exist_are_refused():
    check_tokens(18 * 10**12)
    with pytest.raises(ConfigError, match=r"100T tokens .* FineWeb holds 18\.5T.* 1\.3T"):
        check_tokens(10**14)


def test_the_law_goes_down_with_size_and_data():
    assert BESIROGLU_2024.loss(2e9, 1e10) < BESIROGLU_2024.loss(1e9, 1e10)
    assert BESIROGLU_2024.loss(1e9, 2e10) < BESIROGLU_2024.loss(1e9, 1e10)
    assert BESIROGLU_2024.loss(math.inf, math.inf) == BESIROGLU_2024.irreducible
