"""The launcher where AWS has no machine: what it says, how it goes on, and how it ends."""

import contextlib
import signal
import subprocess
import sys
import time

import pytest

from tests.simcloud.cloud import CHECKOUT, PATIENCE, SimulatedCloud, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800 * PATIENCE)]

BUCKET = "s3://casallm-soldout"
MACHINE = ["--preset", "tiny", "--gpu", "A100:8", "--region", "us-east-1", "--on-demand"]
AMAZONS_WORDS = "We currently do not have sufficient p4d.24xlarge capacity"
POLL_SECONDS = 4.0
IMPATIENT = """
import sys
from launch import up
from launch.cli import main
up.CAPACITY_POLL_SECONDS, up.CAPACITY_HOURS = float(sys.argv.pop(1)), float(sys.argv.pop(1))
main()
"""
"""The command line, which asks for machines more often than every minute, and not for two hours."""


class Launcher:
    """An `up` that runs beside the test, and what it has said."""

    def __init__(self, cloud: SimulatedCloud, run: str, *, hours: float = 2.0) -> None:
        self._said = cloud.folder / f"{run}.log"
        where = ["--bucket", BUCKET, "--run", run, "--yes", "--allow-dirty", "--detach"]
        words = [f"{POLL_SECONDS}", f"{hours}", "up", "pretrain", *MACHINE, *where]
        with self._said.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", IMPATIENT, *words],
                env=cloud.environment,
                cwd=CHECKOUT,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )

    def said(self) -> str:
        return self._said.read_text()

    def waits_for_capacity(self) -> None:
        """Return when it has said that there is none, and that it goes on asking."""
        asks = "asking again every minute until"
        wait_until(lambda: asks in self.said(), seconds=90, what=f"{asks!r}")

    def ends(self, *, seconds: float) -> str:
        """What it had said when it ended."""
        self.process.wait(seconds * PATIENCE)
        return self.said()


@pytest.fixture(scope="module")
def cloud(bare_machines):
    bare_machines.client("s3").create_bucket(Bucket="casallm-soldout")
    bare_machines.start_server()
    return bare_machines


@pytest.fixture
def sold_out(cloud):
    cloud.sell_out()
    yield cloud
    if (cloud.folder / "sold-out").exists():
        cloud.restock()


@pytest.fixture
def start(sold_out):
    """A function that starts an `up` while there is no machine."""
    with contextlib.ExitStack() as stack:

        def start_one(run: str, **limits: float) -> Launcher:
            launcher = Launcher(sold_out, run, **limits)
            stack.callback(launcher.process.wait)
            stack.callback(launcher.process.kill)
            return launcher

        yield start_one


def test_no_capacity_is_told_in_amazons_words_and_asked_for_until_there_is_some(sold_out, start):
    launcher = start("waits")
    launcher.waits_for_capacity()
    refusals = sold_out.refusals()
    wait_until(lambda: sold_out.refusals() > refusals, seconds=60, what="the next ask")

    assert launcher.said().count(AMAZONS_WORDS) == 1
    assert launcher.process.poll() is None
    assert sold_out.live_instances() == []

    sold_out.restock()
    shown = launcher.ends(seconds=120)

    assert launcher.process.returncode == 0, shown
    assert len(sold_out.live_instances()) == 1
    done = sold_out.launch("down", "--run", f"{BUCKET}/waits", "--yes", timeout=300)
    assert done.stdout.rstrip().endswith("nothing left")


def test_down_ends_a_launcher_that_waits_and_nothing_is_rented_afterwards(sold_out, start):
    launcher = start("calledoff")
    launcher.waits_for_capacity()

    done = sold_out.launch("down", "--run", f"{BUCKET}/calledoff", "--yes", timeout=300)
    sold_out.restock()
    shown = launcher.ends(seconds=60)

    assert done.stdout.rstrip().endswith("nothing left")
    assert launcher.process.returncode == 1
    assert "was called off by `make down`: nothing is rented" in shown
    assert "Traceback" not in shown
    assert sold_out.live_instances() == []


def test_after_the_time_that_was_promised_one_sentence_says_that_nothing_was_rented(
    sold_out, start
):
    launcher = start("givesup", hours=3 * POLL_SECONDS / 3600)

    shown = launcher.ends(seconds=180)

    assert launcher.process.returncode == 1
    last = shown.rstrip().splitlines()[-1]
    assert last.startswith("error: no machine of the plan is to be had now")
    assert "nothing is rented; run the same command again later" in last
    assert (sold_out.live_instances(), sold_out.live_volumes()) == ([], [])


def test_a_launcher_that_waits_and_is_interrupted_says_that_nothing_is_rented(sold_out, start):
    launcher = start("interrupted")
    launcher.waits_for_capacity()
    time.sleep(POLL_SECONDS / 2)  # it waits for its next ask

    launcher.process.send_signal(signal.SIGINT)
    sold_out.restock()
    shown = launcher.ends(seconds=120)

    assert "Traceback" not in shown
    assert "nothing is rented" in shown or "make down RUN=" in shown
