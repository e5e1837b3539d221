"""The launcher killed at random moments of `up` and of `down`; nodes are rented but not set up."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.simcloud.cloud import CHECKOUT, PATIENCE, SimulatedCloud

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200 * PATIENCE)]

BUCKET = "s3://casallm-kills"
MACHINE = ["--preset", "tiny", "--gpu", "A100:8", "--on-demand"]
REGIONS = ("us-east-1", "us-east-2", "us-west-2")
"""Where the runs are that are launched and ended at the same time: one in each."""


def test_after_many_kills_of_the_launcher_one_down_of_each_run_leaves_nothing(
    bare_machines, record_property
):
    cloud, began = bare_machines, time.monotonic()
    kills, seed = int(os.environ.get("KILLS", "200")), int(os.environ.get("SEED", "200"))
    cloud.client("s3").create_bucket(Bucket="casallm-kills")
    cloud.start_server()
    up_seconds, down_seconds = (
        _seconds(cloud, _up("us-east-1")),
        _seconds(cloud, _down("us-east-1")),
    )

    def campaign(region: str) -> tuple[set[str], int]:
        """Every machine that was met in the region, and how many kills left one running."""
        chance, met, n_that_left = random.Random(f"{seed} {region}"), set[str](), 0
        for _ in range(REGIONS.index(region), kills, len(REGIONS)):
            is_up = chance.random() < 0.7
            words = _up(region) if is_up else _down(region)
            _kill(cloud, words, chance.uniform(0, up_seconds if is_up else down_seconds))
            live = cloud.live_instances(region)
            met |= set(live)
            n_that_left += bool(live)
        return met, n_that_left

    with ThreadPoolExecutor(len(REGIONS)) as executor:
        met, that_left = zip(*executor.map(campaign, REGIONS), strict=True)
    killed_for = time.monotonic() - began
    for region in REGIONS:
        done = cloud.launch(*_down(region), timeout=1200)
        assert done.stdout.rstrip().endswith("nothing left")
        assert cloud.live_instances(region) == []
    assert (cloud.live_instances(), cloud.live_volumes()) == ([], [])
    assert sum(that_left) > kills / 10, "the kills came too early to leave anything"
    result = {"kills": kills, "that left a machine": sum(that_left)}
    result |= {"machines met": len(set.union(*met)), "seconds": round(killed_for)}
    result |= {"seconds of an up": round(up_seconds), "of a down": round(down_seconds)}
    record_property("kills", json.dumps(result))


def _run(region: str) -> str:
    return f"{BUCKET}/killed-{region}"


def _up(region: str) -> list[str]:
    where = ["--region", region, "--run", _run(region), "--yes", "--allow-dirty", "--detach"]
    return ["up", "pretrain", *MACHINE, *where]


def _down(region: str) -> list[str]:
    return ["down", "--run", _run(region), "--yes"]


def _seconds(cloud: SimulatedCloud, words: list[str]) -> float:
    """What a command takes when it is left alone."""
    began = time.monotonic()
    cloud.launch(*words, timeout=900)
    return time.monotonic() - began


def _kill(cloud: SimulatedCloud, words: list[str], seconds: float) -> None:
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
