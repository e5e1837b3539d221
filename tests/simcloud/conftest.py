import os

import pytest

from tests.simcloud.cloud import SimulatedCloud, missing_for_nodes, missing_for_skypilot


def _started(tmp_path_factory, *, has_nodes: bool, **extra: str):
    reason = missing_for_nodes() if has_nodes else missing_for_skypilot()
    if reason:
        pytest.skip(reason)
    cloud = SimulatedCloud(tmp_path_factory.mktemp("cloud"), has_nodes=has_nodes, **extra)
    try:
        cloud.start()
        yield cloud
    finally:
        cloud.stop()


@pytest.fixture(scope="module")
def control_plane(tmp_path_factory):
    """SkyPilot and moto's AWS: machines can be chosen and rented, but not entered."""
    yield from _started(tmp_path_factory, has_nodes=False)


@pytest.fixture(scope="module")
def bare_machines(tmp_path_factory):
    """The same, with machines that count as set up as soon as EC2 says that they run."""
    yield from _started(tmp_path_factory, has_nodes=False, SIMCLOUD_SKIP_BRINGUP="1")


@pytest.fixture(scope="module")
def cloud(tmp_path_factory):
    """SkyPilot, moto's AWS, and a little Linux machine behind every instance."""
    if not os.environ.get("CASALLM_E2E"):
        pytest.skip("whole runs in the simulated cloud take minutes each: `make e2e` runs them")
    yield from _started(tmp_path_factory, has_nodes=True)
