"""`down`: end what runs for a run, and prove that nothing is left that bills.

First what is being launched is stopped and SkyPilot is asked to end what it knows; then AWS itself
is asked, by label and in every region, what is still there; that is ended too and watched until it
is gone. What refuses to end keeps nothing else from being ended.
"""

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from casallm.errors import CloudError
from casallm.units import format_usd
from launch import aws, cluster, launching
from launch.request import PROJECT, machine_names, run_labels

log = logging.getLogger(__name__)

GONE_SECONDS = 600.0
POLL_SECONDS = 3.0
SETTLE_SECONDS = 5.0
"""After a launch was called off: as long as a request for machines may have been on its way."""


@dataclass(frozen=True)
class TearDown:
    """What was ended, and what could not be."""

    ended: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    """Why something could not be ended, or looked at."""
    closed: tuple[str, ...] = ()
    """Regions that AWS closes to this user."""
    is_proven: bool = True
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
        if self.closed:
            lines.append(f"not looked at, for AWS closes them to you: {', '.join(self.closed)}")
        if not self.is_clean:
            lines += [f"STILL THERE: {each}" for each in self.left]
            lines += [f"not certain: {each}" for each in self.problems]
            lines.append("run `make down` again; the console of the cloud shows the rest")
        elif self.is_proven:
            lines.append("nothing left")
        else:
            lines.append("nothing left that SkyPilot knows of; look into the cloud's console once")
        return "\n".join(lines)


def tear_down(run_url: str | None, *, cloud: str = "aws") -> TearDown:
    """End everything that runs for the run (None: for all), and wait until it is gone."""
    ended: list[str] = []
    problems: list[str] = []
    names = machine_names(run_url) if run_url else []
    launching.withdraw(names[0] if names else None)
    known: set[str] = set()
    with _noted(problems):
        known = cluster.known_names()
        names = names or sorted({*cluster.live_names(), *cluster.launches()})
    for name in names:
        _end_known(name, ended, problems)
    with _noted(problems):
        if cluster.controller() and not cluster.has_live_jobs():
            cluster.end_controller()
            ended.append("SkyPilot's controller")
    with _noted(problems):
        if cloud == "aws":
            return _prove(run_url, known, ended, problems)
        left = sorted({*cluster.live_names()} & {*names})
        return TearDown(tuple(ended), tuple(left), tuple(problems), is_proven=False)
    return TearDown(tuple(ended), problems=tuple(problems), is_proven=False)


def _end_known(name: str, ended: list[str], problems: list[str]) -> None:
    """End what SkyPilot runs under the name, or is about to."""
    with _noted(problems):
        if cluster.cancel_launches(name):
            ended.append(f"launch of {name}")
    with _noted(problems):
        current = cluster.standing(name)
        if current.kind == "job" and current.is_live:
            cluster.end_job(name)
            ended.append(f"managed job {current.job_id} ({name})")
    with _noted(problems):
        if cluster.has_cluster(name):
            cluster.end_cluster(name)
            ended.append(f"cluster {name}")


def _prove(run_url: str | None, known: set[str], ended: list[str], problems: list[str]) -> TearDown:
    """Ask AWS itself what is left, end that, and watch it until it is gone."""
    labels = run_labels(run_url) if run_url else PROJECT
    if any(each.startswith("launch of ") for each in ended):
        time.sleep(SETTLE_SECONDS)
    seen = aws.survey(aws.enabled_regions(), labels)
    found = [*seen.found, *_uploads(run_url, problems)]
    _remove(found, problems)
    left = _wait_until_gone(found, labels, run_url, problems)
    for run in sorted({each.spot_run for each in found} - known - {""}):
        problems.append(
            f"{run} is no launch of this computer's SkyPilot: if another still watches it, that one"
            " rents again, so run `make down` there"
        )
    left_ids = {each.id for each in left}
    return TearDown(
        ended=(*ended, *(str(each) for each in found if each.id not in left_ids)),
        left=tuple(str(each) for each in left),
        problems=tuple(problems),
        closed=seen.closed,
    )


def _remove(found: Iterable[aws.Leftover], problems: list[str]) -> None:
    """Ask for the end of each; a volume ends with its instance, or is asked for when it is free."""
    for each in found:
        if each.kind != "volume" and each.state != "shutting-down":
            log.warning("ending %s", each)
            with _noted(problems):
                aws.remove(each)


def _wait_until_gone(
    found: list[aws.Leftover], labels: dict[str, str], run_url: str | None, problems: list[str]
) -> list[aws.Leftover]:
    """What is still there after as long as a cloud may take to end it."""
    left, deadline = found, time.monotonic() + GONE_SECONDS
    while left and time.monotonic() < deadline:
        regions = sorted({each.region for each in left if each.kind != "upload"})
        left = [*aws.survey(regions, labels).found, *_uploads(run_url, problems)]
        for each in left:
            if each.kind == "volume" and each.state == "available":
                with _noted(problems):
                    aws.remove(each)
        if left:
            time.sleep(POLL_SECONDS)
    return left


def _uploads(run_url: str | None, problems: list[str]) -> list[aws.Leftover]:
    """Unfinished uploads below the run; it has no writer any more."""
    if run_url is None or not run_url.startswith("s3://"):
        return []
    bucket, _, prefix = run_url.removeprefix("s3://").partition("/")
    with _noted(problems):
        if aws.bucket_region(bucket) is not None:
            return aws.unfinished_uploads(bucket, f"{prefix}/")
    return []


@contextlib.contextmanager
def _noted(problems: list[str]) -> Iterator[None]:
    """Write down what could not be done, once, and go on."""
    try:
        yield
    except CloudError as error:
        if str(error) not in problems:
            log.warning("%s", error)
            problems.append(str(error))
