"""`down`: end what runs for a run, and prove that nothing is left that bills.

First SkyPilot is asked to end what it knows; then AWS itself is asked, by label and in every
region, what is still there; that is ended too and watched until it is gone.
"""

import logging
import time
from dataclasses import dataclass

from casallm.units import format_usd
from launch import aws, cluster
from launch.request import PROJECT, cluster_name, run_labels

log = logging.getLogger(__name__)

GONE_SECONDS = 600.0
POLL_SECONDS = 3.0


@dataclass(frozen=True)
class TearDown:
    """What was ended, and what could not be."""

    ended: tuple[str, ...]
    left: tuple[str, ...]
    is_proven: bool
    """Whether the cloud itself was asked; else only SkyPilot was."""

    def text(self, usd: float | None) -> str:
        """The bill, and `nothing left` or what is."""
        lines = [f"ended {each}" for each in self.ended]
        if usd is not None:
            lines.append(f"the machines of this run cost {format_usd(usd)}")
        if self.left:
            lines += [f"STILL THERE: {each}" for each in self.left]
            lines.append("run `make down` again; the console of the cloud shows the rest")
        elif self.is_proven:
            lines.append("nothing left")
        else:
            lines.append("nothing left that SkyPilot knows of; look into the cloud's console once")
        return "\n".join(lines)


def tear_down(run_url: str, *, cloud: str = "aws") -> TearDown:
    """End everything that runs for the run, and wait until the cloud says that it is gone."""
    name = cluster_name(run_url)
    ended = _end_known(name)
    if cloud != "aws":
        return TearDown(tuple(ended), tuple(cluster.live_names()), is_proven=False)
    labels = run_labels(run_url)
    regions = aws.enabled_regions()
    found = aws.leftovers(regions, labels) + _uploads(run_url)
    for each in found:
        if each.kind != "volume" and each.state not in ("shutting-down",):
            log.warning("ending %s", each)
            aws.remove(each)
    left = _wait_until_gone(found, labels, run_url)
    ended += [str(each) for each in found if each not in left]
    return TearDown(tuple(ended), tuple(str(each) for each in left), is_proven=True)


def tear_down_all() -> TearDown:
    """The same for every run at once, and for the controller of managed jobs."""
    ended = []
    for name in cluster.live_names():
        ended += _end_known(name)
    regions = aws.enabled_regions()
    found = aws.leftovers(regions, PROJECT)
    for each in found:
        if each.kind != "volume":
            aws.remove(each)
    left = _wait_until_gone(found, PROJECT, None)
    ended += [str(each) for each in found if each not in left]
    return TearDown(tuple(ended), tuple(str(each) for each in left), is_proven=True)


def _end_known(name: str) -> list[str]:
    """End what SkyPilot runs under the name, its data preparation, and an idle controller."""
    ended = []
    current = cluster.standing(name)
    if current.kind == "job" and current.is_live:
        cluster.end_job(name)
        ended.append(f"managed job {current.job_id} ({name})")
    for each in (name, f"{name}-data"):
        if cluster.standing(each).kind == "cluster":
            cluster.end_cluster(each)
            ended.append(f"cluster {each}")
    if cluster.controller() and not cluster.live_names():
        cluster.end_controller()
        ended.append("SkyPilot's controller")
    return ended


def _wait_until_gone(
    found: list[aws.Leftover], labels: dict[str, str], run_url: str | None
) -> list[aws.Leftover]:
    """What is still there after as long as a cloud may take to end it."""
    left, deadline = found, time.monotonic() + GONE_SECONDS
    while left and time.monotonic() < deadline:
        regions = sorted({each.region for each in left if each.kind != "upload"})
        left = aws.leftovers(regions, labels) + (_uploads(run_url) if run_url else [])
        for each in left:
            if each.kind == "volume" and each.state == "available":
                aws.remove(each)
        if left:
            time.sleep(POLL_SECONDS)
    return left


def _uploads(run_url: str) -> list[aws.Leftover]:
    """Unfinished uploads below the run; it has no writer any more."""
    if not run_url.startswith("s3://"):
        return []
    bucket, _, prefix = run_url.removeprefix("s3://").partition("/")
    if aws.bucket_region(bucket) is None:
        return []
    return aws.unfinished_uploads(bucket, f"{prefix}/")
