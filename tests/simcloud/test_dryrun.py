"""The real optimizer of SkyPilot chooses among our tasks' machines: no node, no network."""

import pytest

from tests.simcloud.cloud import PATIENCE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900 * PATIENCE)]


@pytest.fixture(scope="module")
def sky(control_plane):
    control_plane.sky("api", "start", timeout=300)
    control_plane.sky("check", "aws", timeout=600)
    return lambda *words: control_plane.sky("launch", "--dryrun", "-y", *words, timeout=300)


def test_pretraining_on_demand_takes_the_cheapest_machine_of_the_task(sky):
    shown = sky("tasks/pretrain.yaml", "--no-use-spot", "--env", "RUN=s3://ours/x")

    chosen = next(line for line in shown.splitlines() if "✔" in line)
    assert "p4d.24xlarge" in chosen
    assert "21.96" in chosen
    assert "Dryrun finished." in shown


def test_pretraining_on_spot_weighs_every_candidate_of_the_task(sky):
    shown = sky("tasks/pretrain.yaml", "--env", "RUN=s3://ours/x")

    chosen = next(line for line in shown.splitlines() if "✔" in line)
    assert "[Spot]" in chosen
    assert "6.29" in chosen
    assert all(machine in shown for machine in ("p4d.24xlarge", "p4de.24xlarge", "p5.48xlarge"))


def test_preparing_data_takes_a_machine_without_gpus(sky):
    shown = sky("tasks/prepare.yaml", "--env", "DATA=x", "--env", "OUT=s3://ours/data/x")

    chosen = next(line for line in shown.splitlines() if "✔" in line)
    assert "m6i" in chosen
