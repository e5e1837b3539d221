import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casallm.errors import ConfigError
from casallm.estimate.scaling import (
    BESIROGLU_2024,
    check_tokens,
    loss_range,
    optimal_split,
    tokens_for_params,
)


def test_chinchilla_itself():
    """70B parameters on 1.4T tokens: the refit gives 1.97 nats, near the paper's 1.94."""
    assert BESIROGLU_2024.loss(70e9, 1.4e12) == pytest.approx(1.97, abs=0.01)


@given(flops=st.floats(1e18, 1e25), factor=st.floats(0.2, 5))
def test_no_other_split_of_the_same_work_is_better(flops: float, factor: float):
    n_params, tokens = optimal_split(flops)

    assert 6 * n_params * tokens == pytest.approx(flops)
    best = BESIROGLU_2024.loss(n_params, tokens)
    assert best <= BESIROGLU_2024.loss(n_params * factor, tokens / factor) + 1e-12


def test_the_optimum_is_near_twenty_tokens_a_parameter():
    n_params, tokens = optimal_split(5.76e23)

    assert 15 < tokens / n_params < 25


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
