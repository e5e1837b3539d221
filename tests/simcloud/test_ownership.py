"""What a killed session leaves of its cloud is cleared, and what a living one has is not."""

import json
import os
import subprocess
import sys
import tempfile

import pytest

from tests.simcloud import ownership


@pytest.fixture(autouse=True)
def _temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def process():
    """A function that starts a process of a cloud."""
    started = []

    def start(folder):
        sleep = [sys.executable, "-c", "import time; time.sleep(300)"]
        environment = {**os.environ, ownership.MARK: str(folder)}
        started.append(subprocess.Popen(sleep, env=environment))
        return started[-1]

    yield start
    for each in started:
        each.kill()
        each.wait()


def test_a_cloud_whose_owner_is_gone_is_ended_with_its_processes(process):
    folder = ownership.claim()
    left = process(folder)
    owner = {"pid": os.getpid(), "started": "1"}  # the number was another's before
    (folder / "owner").write_text(json.dumps(owner))

    ownership.sweep()

    assert left.wait(10) == -9
    assert not folder.exists()


def test_a_cloud_whose_owner_lives_is_left_alone(process):
    folder = ownership.claim()
    other = process(folder)

    ownership.sweep()

    assert folder.exists()
    assert ownership.marked(folder) == [other.pid]
