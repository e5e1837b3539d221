"""A person who watches: what the run says until it is over, and its results on this computer."""

import logging
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

from casallm.errors import CasallmError, CloudError
from casallm.storage.store import open_store
from casallm.units import format_usd
from launch import cluster
from launch.plan import Plan
from launch.progress import RunProgress, read_progress
from launch.request import CAPACITY_HOURS, cluster_name

log = logging.getLogger(__name__)

FOLLOW_SECONDS, ASK_SECONDS = 10.0, 60.0
MISSING_SECONDS = 180.0
"""How long SkyPilot must say that there is nothing before the run is taken for gone."""

REPORT_SECONDS = 600.0
"""How long a job may go on after its run is finished: the report is written, the webhook told."""

BROUGHT_HOME = ("config.yaml", "finished.json", "metrics.jsonl", "samples.jsonl")
BROUGHT_HOME_BELOW = ("report", "plots/", "model/", "tokenizer/")

ORIGIN = "brought-from.txt"
"""In a run that was brought home: its URL."""


@dataclass(frozen=True)
class Ending:
    """How a job that was followed ended."""

    has_succeeded: bool
    reason: str
    was_told: bool = True
    """Whether the node itself had the chance to tell the webhook."""


def follow(plan: Plan) -> Ending:
    """Say what happens until the run is over or its job is; Ctrl-C leaves it running.

    The run's own directory is read often; SkyPilot, which answers slowly, is asked once a minute.
    CloudError when no machine was had within the plan's time: the caller ends what waits.
    """
    url, said, asked = plan.request.run_url, "", -math.inf
    current, job, progress = cluster.Standing("unknown"), "", RunProgress(url)
    waiting, missing, has_run = _Lasting(), _Lasting(), False
    while True:
        progress = _progress(progress)
        if progress.finished is not None:
            _await_end(plan.name)
            return Ending(True, progress.finished)
        if time.monotonic() - asked > ASK_SECONDS:
            current, job = _ask(plan.name, current, job)
            asked = time.monotonic()
        if (words := _words(current, job, progress)) != said:
            log.info("%s", words)
            said = words
        has_run = has_run or current.status == "RUNNING"
        if waiting.lasts(current.waits_for_capacity) > 3600 * CAPACITY_HOURS and not has_run:
            raise CloudError(
                f"no machine began within {CAPACITY_HOURS:g} hours, so {plan.name} was ended: run"
                " the same command again, or add REGION=, GPU= or SPOT=0"
            )
        is_gone = missing.lasts(current.kind == "none") > MISSING_SECONDS
        if job.startswith(cluster.OVER) or is_gone:
            return _ended(_progress(progress), job, current)
        time.sleep(FOLLOW_SECONDS)


class _Lasting:
    """Since when a thing has been so, without a break."""

    def __init__(self) -> None:
        self._since: float | None = None

    def lasts(self, is_so: bool) -> float:
        """Seconds for which it has been so; 0 if it is not."""
        now = time.monotonic()
        if not is_so:
            self._since = None
            return 0.0
        self._since = now if self._since is None else self._since
        return now - self._since


def bring_home(run_url: str, runs: Path) -> tuple[Path, int]:
    """Copy the report, the finished model and what belongs to them to a folder below `runs`.

    The folder, and how many files. A run of this computer that has the same name keeps its folder.
    """
    run, folder = open_store(run_url), _home_of(run_url, runs)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ORIGIN).write_text(f"{run_url}\n")
    wanted = [
        entry.name
        for entry in run.list()
        if entry.name in BROUGHT_HOME or entry.name.startswith(BROUGHT_HOME_BELOW)
    ]
    for name in wanted:
        run.get(name, folder / name)
    return folder, len(wanted)


def _home_of(run_url: str, runs: Path) -> Path:
    """A folder that is new, or was made for the same run before."""
    plain = runs / run_url.rstrip("/").rpartition("/")[2]
    origin = plain / ORIGIN
    is_free = not plain.exists() or (origin.exists() and origin.read_text().strip() == run_url)
    return plain if is_free else runs / cluster_name(run_url)


def _ask(name: str, current: cluster.Standing, job: str) -> tuple[cluster.Standing, str]:
    """What stands under the name and its job's state; as before where SkyPilot does not say."""
    try:
        current = cluster.standing(name)
        is_cluster = current.kind == "cluster"
        return current, cluster.cluster_job_status(name) if is_cluster else current.status
    except CloudError as error:
        log.warning("%s", error)
        return replace(current, kind="unknown") if current.kind == "none" else current, job


def _await_end(name: str) -> None:
    """Let the job of a finished run end: it writes the report, and tells the webhook."""
    deadline = time.monotonic() + REPORT_SECONDS
    while time.monotonic() < deadline:
        current, job = _ask(name, cluster.Standing("unknown"), "")
        if current.kind == "none" or job.startswith(cluster.OVER):
            return
        time.sleep(FOLLOW_SECONDS)


def _progress(known: RunProgress) -> RunProgress:
    """The run's progress; where the bucket cannot be read just now, what was known before."""
    try:
        return read_progress(open_store(known.url))
    except CasallmError as error:
        log.warning("%s cannot be read just now: %s", known.url, error)
        return known


def _words(current: cluster.Standing, job: str, progress: RunProgress) -> str:
    where = f" on {current.where}" if current.where else ""
    recovered = f", recovered {current.recoveries} times" if current.recoveries else ""
    if not progress.step:
        state = current.status or "waiting"
        return f"{state}{where}{recovered} {job if job != state else ''}".rstrip()
    steps = f" of {progress.steps:,}" if progress.steps else ""
    loss = f", loss {progress.loss:.3f}" if progress.loss is not None else ""
    usd = f", {format_usd(progress.usd)}"
    return f"{current.status or 'gone'}{where}{recovered}: step {progress.step:,}{steps}{loss}{usd}"


def _ended(progress: RunProgress, job: str, current: cluster.Standing) -> Ending:
    if progress.finished is not None:
        return Ending(True, progress.finished)
    steps = f"its last step was {progress.step:,}" if progress.step else "it made no step"
    said = progress.last or current.details or (steps if progress.attempts else "it never began")
    reason = f"the job ended ({job or 'its machines are gone'}): {said}"
    return Ending(False, reason, was_told=job == "FAILED")
