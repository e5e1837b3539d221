import os

import pytest

from tests.simcloud.cloud import SimulatedCloud, missing_for_nodes, missing_for_skypilot


def _started(**features: bool):
    reason = missing_for_nodes() if features.get("has_nodes") else missing_for_skypilot()
    if reason:
        pytest.skip(reason)
    cloud = SimulatedCloud(**features)
    try:
        cloud.start()
        yield cloud
    finally:
        cloud.stop()


@pytest.fixture(scope="module")
def control_plane():
    """SkyPilot and moto's AWS: machines can be chosen and rented, but not entered."""
    yield from _started()


@pytest.fixture(scope="module")
def bare_machines():
    """The same, with machines that count as set up as soon as EC2 says that they run."""
    if not os.environ.get("CASALLM_E2E"):
        pytest.skip("takes minutes: `make e2e` runs it")
    yield from _started(is_bare=True)


@pytest.fixture(scope="module")
def cloud():
    """SkyPilot, moto's AWS, and a little Linux machine behind every instance."""
    if not os.environ.get("CASALLM_E2E"):
        pytest.skip("whole runs in the simulated cloud take minutes each: `make e2e` runs them")
    yield from _started(has_nodes=True, has_spot=True)


def pytest_terminal_summary(terminalreporter):
    """Tell what the tests of this folder have measured."""
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties if report.when == "call" else ():
            terminalreporter.write_line(f"{name}: {value}")
