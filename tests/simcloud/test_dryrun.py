"""The real optimizer of SkyPilot chooses among our tasks' machines: no node, no network."""

import json
import socket
import sys

import pytest

from tests.simcloud.cloud import CHECKOUT, HERE, PATIENCE
from tests.simcloud.dryrun import SEPARATOR

pytestmark = pytest.mark.timeout(1500 * PATIENCE)

TASKS = CHECKOUT / "tasks"
RUN = ["--env", "RUN=s3://ours/x"]
DRY_RUNS = {
    "on demand": [f"{TASKS}/pretrain.yaml", "--no-use-spot", *RUN],
    "spot": [f"{TASKS}/pretrain.yaml", *RUN],
    "prepare": [f"{TASKS}/prepare.yaml", "--env", "DATA=x", "--env", "OUT=s3://ours/data/x"],
}


@pytest.fixture(scope="module")
def usual_port():
    """Who listens where a person's own server would; None if that one is there."""
    with socket.socket() as listener:
        try:
            listener.bind(("127.0.0.1", 46580))
        except OSError:
            yield None
            return
        listener.listen()
        listener.setblocking(False)
        yield listener


@pytest.fixture(scope="module")
def shown(control_plane, usual_port):
    """What `sky launch --dryrun` says of each; one server and one client serve them all."""
    words = json.dumps(list(DRY_RUNS.values()))
    done = control_plane.run([sys.executable, str(HERE / "dryrun.py"), words], timeout=900)
    _, *said, _ = done.stdout.split(SEPARATOR)
    return dict(zip(DRY_RUNS, said, strict=True))


def test_pretraining_on_demand_takes_the_cheapest_machine_of_the_task(shown):
    chosen = _chosen(shown["on demand"])

    assert "p4d.24xlarge" in chosen
    assert "21.96" in chosen
    assert "Dryrun finished." in shown["on demand"]


def test_pretraining_on_spot_weighs_every_candidate_of_the_task(shown):
    chosen = _chosen(shown["spot"])

    assert "[Spot]" in chosen
    assert "6.29" in chosen
    machines = ("p4d.24xlarge", "p4de.24xlarge", "p5.48xlarge")
    assert all(machine in shown["spot"] for machine in machines)


def test_preparing_data_takes_a_machine_without_gpus(shown):
    assert "m6i" in _chosen(shown["prepare"])


def test_a_server_on_the_usual_port_is_not_asked(shown, usual_port):
    if usual_port is None:
        pytest.skip("something else listens on port 46580")

    with pytest.raises(BlockingIOError):
        usual_port.accept()


def _chosen(table: str) -> str:
    return next(line for line in table.splitlines() if "✔" in line)
