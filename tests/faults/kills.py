"""The campaign of random SIGKILLs over real runs: three ranks, checkpoints in a bucket.

Each run is killed about ten times, at instants spread over starting, training, saving and
uploading, now the supervisor, now one rank; every third time the machine's disk is lost with it.
Every run must end with the weights of the one that nothing disturbed.
"""

import os
import random
import shutil
import signal
import time
from pathlib import Path

from tests.data.conftest import make_texts, write_documents
from tests.faults.campaigns import Result
from tests.faults.fixtures import moto
from tests.faults.servers import CREDENTIALS
from tests.train.real_run import RealRun

KILLS_PER_RUN = 10
STEPS = 150
"""Long enough that kills meet every phase; with a checkpoint every 10 steps."""

SETTINGS = (f"train.steps={STEPS}", "checkpoint.every_steps=10", "eval.every_steps=75")


def sigkills(count: int, seed: int, directory: Path) -> Result:
    """`count` kills over as many runs as they need; each ends with the calm run's weights."""
    dice = random.Random(seed)
    result = Result()
    documents = write_documents(directory / "documents.jsonl", make_texts(400))
    calm = RealRun(documents, "calm", ranks=3)
    begin = time.monotonic()
    if calm.start(*SETTINGS).wait_for_exit().code != 0:
        result.broken.append("the calm run did not end well")
        return result
    calm_seconds = time.monotonic() - begin
    url, _, client = moto()
    client.create_bucket(Bucket="chaos")
    number = 0
    while result.faults < count:
        number += 1
        run = _Run(documents, directory, number, url)
        run.disturb(min(KILLS_PER_RUN, count - result.faults), calm_seconds, dice, result)
        if run.finish() != calm.weights():
            result.broken.append(f"run {number}: other weights than the calm run")
        result.count("runs")
    return result


class _Run:
    """One run that is killed again and again."""

    def __init__(self, documents: Path, directory: Path, number: int, endpoint: str) -> None:
        self._home = directory / f"home-{number}"
        self._home.mkdir()
        self._run = RealRun(
            documents,
            f"run-{number}",
            ranks=3,
            url=f"s3://chaos/run-{number}",
            environment={**CREDENTIALS, "AWS_ENDPOINT_URL": endpoint, "HOME": str(self._home)},
        )

    def disturb(self, kills: int, calm_seconds: float, dice: random.Random, result: Result) -> None:
        """Start and kill the run so many times."""
        for number in range(kills):
            self._run.start(*SETTINGS)
            time.sleep(dice.uniform(0.1, 1.1) * calm_seconds)
            ranks = self._run.ranks()
            if number % 2 and ranks:
                os.kill(dice.choice(ranks), signal.SIGKILL)
                result.count("a rank killed")
                time.sleep(dice.uniform(0, 2))
            else:
                result.count("the supervisor killed")
            self._run.signal(signal.SIGKILL)
            self._run.wait_for_exit()
            if number % 3 == 2:
                shutil.rmtree(self._home / ".cache", ignore_errors=True)
                result.count("the disk lost")
            result.faults += 1

    def finish(self) -> str | None:
        """The weights at the end."""
        done = self._run.start(*SETTINGS).wait_for_exit()
        return self._run.weights() if done.code == 0 else None
