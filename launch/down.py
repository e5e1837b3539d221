"""`down`: end what runs for a run, and prove that nothing is left that bills.

First what is being launched is called off and SkyPilot is asked to end what it knows; then AWS
itself is asked, by label and in every region, what is still there; that is ended too and watched
until it is gone. What refuses to end, or does not answer, keeps nothing else from being ended.
"""

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta

from casallm.errors import CloudError
from casallm.units import format_usd
from launch import aws, cluster, launching
from launch.request import PROJECT, cluster_name, machine_names, own_bucket, run_labels

log = logging.getLogger(__name__)

GONE_SECONDS = 600.0
POLL_SECONDS = 3.0
SETTLE_SECONDS = 5.0
"""After a launch was called off: as long as a request for machines may have been on its way."""

DEAD_UPLOAD = timedelta(days=1)
"""After which no upload is still at work."""


@dataclass
class TearDown:
    """What was ended, and what could not be."""

    ended: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Why something could not be ended, or looked at."""
    notes: list[str] = field(default_factory=list)
    """What a person should know beside it."""
    is_proven: bool = False
    """Whether the cloud itself was asked; else only SkyPilot was."""

    @property
    def is_clean(self) -> bool:
        """Whether nothing is left, and everything was done to know it."""
        return not self.left and not self.problems

    def text(self, usd: float | None) -> str:
        """The bill, and `nothing left` or what is."""
        lines = [f"ended {each}" for each in self.ended]
        if usd is not None:
            lines.append(f"the machines of this run cost {format_usd(usd)}")
        lines += self.notes
        if not self.is_clean:
            lines += [f"STILL THERE: {each}" for each in self.left]
            lines += [f"not certain: {each}" for each in self.problems]
            lines.append("run `make down` again; the console of the cloud shows the rest")
        elif self.is_proven:
            lines.append("nothing left")
        else:
            lines.append("nothing left that SkyPilot knows of; look into the cloud's console once")
        return "\n".join(lines)

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Write down what could not be done, once, and go on."""
        try:
            yield
        except CloudError as error:
            if str(error) not in self.problems:
                log.warning("%s", error)
                self.problems.append(str(error))


def tear_down(run_url: str | None, *, cloud: str = "aws") -> TearDown:
    """End everything that runs for the run (None: for all), and wait until it is gone."""
    result, known = TearDown(), set[str]()
    names = machine_names(run_url) if run_url else []
    for each in launching.withdraw(names[0] if names else None):
        result.ended.append(f"the wait for machines of {each}")
    for ask in (cluster.cluster_names, cluster.job_names):
        with result.noting():
            known |= ask()
    for name in names or _live_names(result):
        _end_known(name, result)
    with result.noting():
        if cluster.end_idle_controller():
            result.ended.append("SkyPilot's controller")
        elif cluster.controller():
            result.notes.append("SkyPilot's controller stays: it has other jobs, or had others'")
    with result.noting():
        if cloud == "aws":
            regions = aws.enabled_regions()
            found = _prove(run_url, regions, result)
            _look_for_others(run_url, regions, found, known, result)
            result.is_proven = True
        else:
            result.left = sorted({*cluster.live_names()} & {*(names or known)})
    return result


def _live_names(result: TearDown) -> list[str]:
    """Everything of ours that SkyPilot has running or is launching; each is asked apart."""
    names: set[str] = set()
    for ask in (cluster.cluster_names, cluster.launches, cluster.live_names):
        with result.noting():
            names |= {name for name in ask() if name.startswith(cluster.PREFIX)}
    return sorted(names)


def _end_known(name: str, result: TearDown) -> None:
    """End what SkyPilot runs under the name, or is about to."""
    with result.noting():
        if cluster.cancel_launches(name):
            result.ended.append(f"launch of {name}")
            time.sleep(SETTLE_SECONDS)
    with result.noting():
        current = cluster.standing(name)
        if current.kind == "job" and current.is_live:
            cluster.end_job(name)
            result.ended.append(f"managed job {current.job_id} ({name})")
    with result.noting():
        if cluster.has_cluster(name):
            cluster.end_cluster(name)
            result.ended.append(f"cluster {name}")


def _prove(run_url: str | None, regions: list[str], result: TearDown) -> list[aws.Leftover]:
    """Ask AWS itself what is there, end that, and watch it until it is gone; what there was."""
    labels = run_labels(run_url) if run_url else PROJECT
    seen = aws.survey(regions, labels)
    found = [*seen.found, *_uploads(run_url, result)]
    for each in found:
        if (
            each.kind != "volume" and each.state != "shutting-down"
        ):  # a volume ends with its machine
            log.warning("ending %s", each)
            with result.noting():
                aws.remove(each)
    left = _wait_until_gone(found, labels, run_url, result)
    left_ids = {each.id for each in left}
    result.ended += [str(each) for each in found if each.id not in left_ids]
    result.left += map(str, left)
    result.notes += [f"not looked at, for AWS closes it to you: {each}" for each in seen.closed]
    return found


def _wait_until_gone(
    found: list[aws.Leftover], labels: dict[str, str], run_url: str | None, result: TearDown
) -> list[aws.Leftover]:
    """What is still there after as long as a cloud may take to end it."""
    left, deadline = found, time.monotonic() + GONE_SECONDS
    while left and time.monotonic() < deadline:
        regions = sorted({each.region for each in left if each.kind != "upload"})
        left = [*aws.survey(regions, labels).found, *_uploads(run_url, result)]
        for each in left:
            if each.kind == "volume" and each.state == "available":
                with result.noting():
                    aws.remove(each)
        if left:
            time.sleep(POLL_SECONDS)
    return left


def _look_for_others(
    run_url: str | None,
    regions: list[str],
    found: list[aws.Leftover],
    known: set[str],
    result: TearDown,
) -> None:
    """Say what another computer's SkyPilot may rent again; what that watches cannot be asked."""
    ours = {each for each in known if each.startswith(aws.CONTROLLER)}
    others = [
        each
        for name, each in aws.controllers(regions).items()
        if not any(name.startswith(own) for own in ours)
    ]
    result.notes += [f"{each} is of another computer's SkyPilot: left alone" for each in others]
    strangers = {each.spot_run for each in found} - known - {""}
    if run_url and others and not launching.was_begun(cluster_name(run_url)):
        strangers |= {cluster_name(run_url)} - known
    result.problems += [
        f"{run} is no launch of this computer's SkyPilot: if another still watches it, that one"
        " rents again, so run `make down` there"
        for run in sorted(strangers)
    ]


def _uploads(run_url: str | None, result: TearDown) -> list[aws.Leftover]:
    """Unfinished uploads below the run, which has no writer any more.

    Without a run, those of the account's own bucket in which nothing can be at work any longer.
    """
    if run_url is not None and not run_url.startswith("s3://"):
        return []
    with result.noting():
        url = run_url or f"s3://{own_bucket(aws.account_id())}"
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        if aws.bucket_region(bucket) is not None:
            older_than = timedelta(0) if run_url else DEAD_UPLOAD
            below = f"{prefix}/" if prefix else ""
            return aws.unfinished_uploads(bucket, below, older_than=older_than)
    return []
