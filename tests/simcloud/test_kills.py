"""The launcher killed at random moments of `up` and of `down`; nodes are rented but not set up."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.simcloud.cloud import CHECKOUT, PATIENCE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200 * PATIENCE)]

BUCKET = "s3://casallm-kills"
MACHINE = ["--preset", "tiny", "--gpu", "A100:8", "--region", "us-east-1", "--on-demand"]


@pytest.mark.skipif(not os.environ.get("CASALLM_E2E"), reason="takes long: `make e2e` runs it")
def test_after_many_kills_of_the_launcher_one_down_leaves_nothing(bare_machines):
    cloud, chance = bare_machines, random.Random(int(os.environ.get("SEED", "200")))
    cloud.client("s3").create_bucket(Bucket="casallm-kills")
    cloud.sky("api", "start", timeout=300)
    cloud.sky("check", "aws", timeout=600)
    up_seconds, down_seconds = _seconds(cloud, _up()), _seconds(cloud, _down())
    kills, rented, kills_that_left = int(os.environ.get("KILLS", "200")), set(), 0

    for _ in range(kills):
        is_up = chance.random() < 0.7
        _kill(
            cloud,
            _up() if is_up else _down(),
            chance.uniform(0, up_seconds if is_up else down_seconds),
        )
        live = cloud.live_instances()
        rented |= set(live)
        kills_that_left += bool(live)

    done = cloud.launch(*_down(), timeout=1200)
    assert done.stdout.rstrip().endswith("nothing left")
    assert (cloud.live_instances(), cloud.live_volumes()) == ([], [])
    assert kills_that_left > kills / 10, "the kills came too early to leave anything"
    result = {"kills": kills, "kills_that_left": kills_that_left, "machines_rented": len(rented)}
    result |= {"up_seconds": up_seconds, "down_seconds": down_seconds}
    (cloud.folder / "kills.json").write_text(json.dumps(result))


def _up() -> list[str]:
    where = ["--bucket", BUCKET, "--run", "killed", "--yes", "--allow-dirty", "--detach"]
    return ["up", "pretrain", *MACHINE, *where]


def _down() -> list[str]:
    return ["down", "--run", f"{BUCKET}/killed", "--yes"]


def _seconds(cloud, words: list[str]) -> float:
    """What a command takes when it is left alone."""
    began = time.monotonic()
    cloud.launch(*words, timeout=900)
    return time.monotonic() - began


def _kill(cloud, words: list[str], seconds: float) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "launch", *words],
        env=cloud.environment,
        cwd=CHECKOUT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    time.sleep(seconds)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
