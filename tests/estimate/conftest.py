"""A small price list and a model for the estimator's tests; the shared data where it is there."""

import datetime
import os
from pathlib import Path

import pytest
from hypothesis import settings

from casallm.estimate.architecture import NAMED_SIZES, ModelConfig
from casallm.estimate.hardware import GPUS
from casallm.estimate.prices import Offer, Prices

settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")


def offer(
    instance: str,
    gpu: str,
    n_gpus: int,
    *,
    on_demand: float | None,
    spot: float | None,
    cloud: str = "aws",
    region: str = "us-east-1",
) -> Offer:
    """An offer with the fields that matter."""
    return Offer(cloud, region, "", instance, GPUS[gpu], n_gpus, on_demand, spot)


@pytest.fixture
def few_prices() -> Prices:
    """Four machines whose prices never change."""
    offers = (
        offer("p4d.24xlarge", "A100", 8, on_demand=21.96, spot=6.29),
        offer("p5.48xlarge", "H100", 8, on_demand=55.04, spot=None),
        offer("p3.2xlarge", "V100", 1, on_demand=3.06, spot=0.48),
        offer("gpu_1x_a100", "A100", 1, on_demand=1.99, spot=None, cloud="lambda"),
    )
    return Prices(offers, datetime.date(2026, 11, 22), "test prices")


@pytest.fixture
def model_350m() -> ModelConfig:
    return NAMED_SIZES["350m"]


@pytest.fixture
def shared_data() -> Path:
    """The project's shared data; the test is skipped where they are not there."""
    default = Path(__file__).parents[2] / ".." / "shared" / "data"
    path = Path(os.environ.get("CASALLM_SHARED_DATA", default))
    if not path.is_dir():
        pytest.skip("the shared data are not there: set CASALLM_SHARED_DATA")
    return path
