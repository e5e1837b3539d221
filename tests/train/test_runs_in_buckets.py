"""Real runs whose directory is a bucket: lost machines, bad networks, zombies and notices.

The same in one process, in seconds: tests/faults/test_bucket_runs.py.
"""

import contextlib
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.faults.fixtures import Bucket, credentials, s3
from tests.faults.servers import CREDENTIALS
from tests.train.metadata_server import metadata_server
from tests.train.real_run import RealRun

__all__ = ["credentials", "s3"]


def run_in(s3: Bucket, documents: Path, home: Path, *, ranks: int = 3, **more: str) -> RealRun:
    """The run s3://bucket/run as a machine with this home directory sees it."""
    home.mkdir(exist_ok=True)
    endpoint = {"AWS_ENDPOINT_URL": s3.proxy.url, "HOME": str(home)}
    return RealRun(
        documents,
        home.name,
        ranks=ranks,
        url=f"s3://{s3.name}/run",
        environment={**CREDENTIALS, **endpoint, **more},
    )


@pytest.mark.slow
def test_a_lost_machine_and_a_bad_network_cost_no_bit(calm, documents, s3, tmp_path):
    run = run_in(s3, documents, tmp_path / "first")
    run.start().wait_for_step(10)
    run.signal(signal.SIGKILL)
    run.wait_for_exit()
    shutil.rmtree(tmp_path / "first")
    s3.proxy.decide = lambda method, path: s3.proxy.random.choice([None] * 18 + ["503", "reset"])

    again = run_in(s3, documents, tmp_path / "second")
    done = again.start().wait_for_exit()

    assert done.code == 0, done.stderr
    s3.proxy.behave()
    assert again.weights() == calm.weights()
    keys = s3.names()
    assert "run/report.html" in keys
    assert s3.open_uploads() == []


@pytest.mark.slow
def test_a_zombie_is_fenced_and_history_stays_linear(documents, s3, tmp_path):
    zombie = run_in(s3, documents, tmp_path / "zombie", ranks=1)
    zombie.start().wait_for_step(6)
    frozen = zombie.processes()
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)

    heir = run_in(s3, documents, tmp_path / "heir", ranks=1)
    assert heir.start().wait_for_exit().code == 0
    for pid in frozen:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    woken = zombie.wait_for_exit()

    assert woken.code == 1
    assert "leads" in woken.stderr
    finished = s3.client.get_object(Bucket=s3.name, Key="run/finished.json")["Body"].read()
    assert json.loads(finished)["attempt"] == 2
    metrics = s3.client.get_object(Bucket=s3.name, Key="run/metrics.jsonl")["Body"].read()
    steps = [line["step"] for line in map(json.loads, metrics.splitlines()) if "loss" in line]
    assert steps == list(range(1, 25))


@pytest.mark.parametrize(
    "notice",
    ["aws", "gcp", pytest.param("SIGTERM", marks=pytest.mark.slow)],
)
def test_with_notice_the_run_is_saved_and_asks_to_be_run_again(documents, s3, tmp_path, notice):
    with metadata_server() as metadata:
        variable = {"aws": "AWS_EC2_METADATA_SERVICE_ENDPOINT", "gcp": "GCE_METADATA_HOST"}
        moved = {variable.get(notice, "UNUSED"): metadata.url}
        run = run_in(s3, documents, tmp_path / "node", ranks=1, **moved)
        cloud = notice if notice in variable else "off"
        run.start("train.steps=100000", "eval.every_steps=100000", f"train.notices={cloud}")
        run.wait_for_step(3)
        begin = time.monotonic()

        metadata.give_notice()
        if notice == "SIGTERM":
            run.signal(signal.SIGTERM)
        done = run.wait_for_exit()

    assert done.code == 75, done.stderr
    assert time.monotonic() - begin < 60
    expected = {"aws": "AWS spot notice", "gcp": "GCP preemption notice", "SIGTERM": "SIGTERM"}
    assert expected[notice] in done.stdout
    step = int(done.stdout.split("at step ")[1].split(" of")[0].replace(",", ""))
    keys = s3.names()
    assert f"run/checkpoints/step-{step:08d}-a1/manifest.json" in keys
