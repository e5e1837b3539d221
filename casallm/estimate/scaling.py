"""How good a model becomes: loss from parameters and tokens, by a published law.

    L(N, D) = E + A / N^alpha + B / D^beta        (nats a token, on the law's own data)

Hoffmann et al. 2022 (Chinchilla, approach 3) as refitted by Besiroglu et al. 2024 (arXiv
2404.10102), who corrected the published constants and gave their uncertainty. The law knows
MassiveText and Hoffmann's architecture: losses on other text differ by a constant, the order of
two models and the best split of a budget much less. nanochat's own data and optimizer put the
optimum at 8 to 12 tokens a parameter, this law near 20.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from casallm.errors import ConfigError
from casallm.units import format_count

CHINCHILLA_TOKENS_PER_PARAM = 20
"""Tokens for each parameter when nothing else is said."""

FINEWEB_EDU_TOKENS = 1.3e12
"""What FineWeb-Edu holds, the text that casallm trains on (Penedo et al. 2024)."""

FINEWEB_TOKENS = 18.5e12
"""What FineWeb holds: the largest open collection of English web text."""


@dataclass(frozen=True)
class ScalingLaw:
    """E + A / N^alpha + B / D^beta with standard errors of what is uncertain."""

    irreducible: float
    params_factor: float
    params_exponent: float
    tokens_factor: float
    tokens_exponent: float
    irreducible_error: float
    """Standard error of the loss that no model can avoid."""
    exponent_error: float
    """Standard error of either exponent."""

    def loss(self, n_params: float, tokens: float) -> float:
        """Expected loss in nats a token."""
        params = self.params_factor / n_params**self.params_exponent
        return self.irreducible + params + self.tokens_factor / tokens**self.tokens_exponent

    def loss_spread(
        self, n_params: float, tokens: float, normal: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Draws of the loss from standard normal ones (n x 3).

        Factors and exponents were fitted together and their errors cancel where the data lay, so
        the exponents turn about Chinchilla's own model: 70B parameters, 1.4T tokens.
        """
        turned_n = (n_params / 70e9) ** (-self.exponent_error * normal[:, 1])
        turned_d = (tokens / 1.4e12) ** (-self.exponent_error * normal[:, 2])
        params = self.params_factor / n_params**self.params_exponent * turned_n
        data = self.tokens_factor / tokens**self.tokens_exponent * turned_d
        return self.irreducible + self.irreducible_error * normal[:, 0] + params + data


BESIROGLU_2024 = ScalingLaw(
    irreducible=1.8172,
    params_factor=482.01,
    params_exponent=0.3478,
    tokens_factor=2085.43,
    tokens_exponent=0.3658,
    irreducible_error=0.03,
    exponent_error=0.02,
)
"""The refit's constants; its standard errors are 0.03 on E and 0.02 on either exponent."""


def tokens_for_params(n_params: float) -> int:
    """Twenty a parameter (Hoffmann et al. 2022), to the token."""
    return round(CHINCHILLA_TOKENS_PER_PARAM * n_params)


def check_tokens(tokens: int) -> None:
    """ConfigError if there is no such amount of text."""
    if tokens > FINEWEB_TOKENS:
        raise ConfigError(
            f"{format_count(tokens)} tokens are more than there are: FineWeb holds"
            f" {format_count(FINEWEB_TOKENS)}, FineWeb-Edu {format_count(FINEWEB_EDU_TOKENS)};"
            f" ask for {format_count(FINEWEB_TOKENS)} at most (--tokens, of which there are 20 a"
            " parameter unless said)"
        )


def loss_range(n_params: float, tokens: float) -> tuple[float, float, float]:
    """Tenth, fiftieth and ninetieth percentile of the loss under the law's own uncertainty."""
    normal = np.random.default_rng(0).standard_normal((2001, 3))
    low, high = np.quantile(BESIROGLU_2024.loss_spread(n_params, tokens, normal), [0.1, 0.9])
    return float(low), BESIROGLU_2024.loss(n_params, tokens), float(high)
