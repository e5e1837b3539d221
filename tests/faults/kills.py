"""The campaign of random SIGKILLs over real runs: three ranks, checkpoints in a bucket.

Each run is killed again and again until it gets through, at instants spread over starting,
training, saving and uploading: now the supervisor alone, now a rank and then the supervisor; every
third time the machine's disk is lost with it. Only a kill of a process that was alive counts. Every
run must end with the weights of the one that nothing disturbed.
"""

import itertools
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

STEPS = 80
"""Long enough that kills meet every phase; with a checkpoint every 10 steps."""

SETTINGS = (f"train.steps={STEPS}", "checkpoint.every_steps=10", "eval.every_steps=40")


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
    for number in itertools.count(1):
        run = _Run(documents, directory, number, url)
        run.disturb(count - result.faults, calm_seconds, dice, result)
        result.count("runs")
        if run.finish() != calm.weights():
            result.broken.append(f"run {number}: other weights than the calm run")
        if result.faults >= count:
            break
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

    def disturb(self, most: int, calm_seconds: float, dice: random.Random, result: Result) -> None:
        """Start and kill the run, at most so often, until it is faster than its killer."""
        for number in range(most):
            process = self._run.start(*SETTINGS)
            if process.is_over_within(dice.uniform(0.05, 0.8) * calm_seconds):
                return
            ranks = self._run.ranks()
            if number % 2 and ranks:
                os.kill(dice.choice(ranks), signal.SIGKILL)
                result.count("a rank killed")
                time.sleep(dice.uniform(0, 2))
            else:
                result.count("the supervisor alone killed")
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
