"""What SkyPilot runs for us, by name: start a task, see what became of it, end it.

What SkyPilot does not say is an error here, and never taken for "nothing".
"""

import contextlib
import json
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from casallm.errors import CloudError
from launch import aws, skypilot
from launch.sky_errors import AbsentError, NotUpError, explained

log = logging.getLogger(__name__)

PREFIX = "casallm-"
"""How the names of everything launched here begin."""

DOWN_SECONDS = 600.0
LAST_LINES, LAST_WORDS_SECONDS = 40, 60.0

SUBMIT_SECONDS = 1200.0
"""For a managed job: its controller may have to be started first."""

_LAUNCHES = ("sky.launch", "sky.jobs.launch")
"""What the API server calls a launch that is under way."""

NO_JOBS = "No in-progress managed jobs"
"""SkyPilot's words where the controller does not exist, or has not begun to."""

_JOB_FIELDS = (
    "job_id",
    "job_name",
    "status",
    "recovery_count",
    "cloud",
    "region",
    "failure_reason",
)
"""What SkyPilot tells of managed jobs, of its many fields."""

_LIVE_JOB = (
    "PENDING",
    "SUBMITTED",
    "STARTING",
    "RUNNING",
    "WINDING_DOWN",
    "RECOVERING",
    "CANCELLING",
)


OVER = ("FAILED", "CANCELLED", "SUCCEEDED")
"""How SkyPilot's words for a job that has ended begin."""

_WAITING = ("PENDING", "SUBMITTED", "STARTING")


@dataclass(frozen=True)
class Standing:
    """What SkyPilot has running, or had, under one name."""

    kind: Literal["job", "cluster", "none", "unknown"] = "none"
    """A managed job (spot), a cluster (on demand), neither, or SkyPilot did not say."""
    status: str = ""
    """SkyPilot's own word: RUNNING, RECOVERING, UP, INIT …"""
    job_id: int | None = None
    where: str = ""
    recoveries: int = 0
    details: str = ""

    @property
    def waits_for_capacity(self) -> bool:
        """Whether it is a managed job that has never had a machine, as far as it says."""
        return self.kind == "job" and self.status in _WAITING and not self.recoveries

    @property
    def is_live(self) -> bool:
        """Whether it goes on by itself, or holds machines."""
        return self.kind == "cluster" or self.status in _LIVE_JOB


def submit_job(task: Mapping[str, Any], name: str) -> int:
    """Hand a task to SkyPilot's managed jobs, which recover it; the job's number."""
    sky = skypilot.sdk()
    with explained():
        made = sky.Task.from_yaml_config(dict(task))
        request = sky.jobs.launch(made, name=name)
    job_ids, _ = skypilot.finish(request, seconds=SUBMIT_SECONDS, what="submitting the job")
    return int(job_ids[0])


def launch_cluster(task: Mapping[str, Any], name: str) -> None:
    """Start a task on machines of its own that end themselves when idle.

    NoCapacityError where none is to be had now; after any CloudError nothing of them is left.
    """
    sky = skypilot.sdk()
    with explained():
        made = sky.Task.from_yaml_config(dict(task))
        request = sky.launch(made, cluster_name=name)
    try:
        skypilot.finish(request, seconds=SUBMIT_SECONDS, what="launching")
    except CloudError:
        end_cluster(name)
        raise


def launches() -> dict[str, list[str]]:
    """What SkyPilot's server is launching for us: its requests, by the name of what is launched."""
    sky = skypilot.sdk()
    with explained():
        under_way = [record for record in sky.api_status() if record.name in _LAUNCHES]
    requests: dict[str, list[str]] = {}
    for record in under_way:
        name = _launched_name(record)
        if name.startswith(PREFIX):
            requests.setdefault(name, []).append(str(record.request_id))
    return requests


def cancel_launches(name: str) -> bool:
    """Stop what the server is launching under `name`; whether there was anything."""
    requests = launches().get(name, [])
    if requests:
        sky = skypilot.sdk()
        with explained():
            request = sky.api_cancel(requests, silent=True)
        skypilot.finish(request, what="calling off the launch")
    return bool(requests)


def settle(name: str) -> None:
    """Wait until no launch under `name` that an earlier, killed start asked for is under way."""
    for request in launches().get(name, []):
        log.info("an earlier start of %s is still at work: waiting for it", name)
        with contextlib.suppress(CloudError):
            skypilot.finish(request, seconds=SUBMIT_SECONDS, what="an earlier launch")


def ends_itself(name: str) -> bool:
    """Whether the cluster is known to delete itself when idle (SkyPilot once forgot to set it)."""
    records = _clusters(name)
    return bool(records) and all(
        record["autostop"] >= 0 and record["to_down"] for record in records
    )


def make_end_itself(name: str, *, idle_minutes: int) -> None:
    """Let the cluster delete itself when idle."""
    sky = skypilot.sdk()
    with explained():
        request = sky.autostop(name, idle_minutes, down=True)
    skypilot.finish(request, what="setting autodown")


def standing(name: str) -> Standing:
    """What runs or ran under `name`: a live managed job, else a cluster, else the last job."""
    jobs = [_job_standing(record) for record in _jobs() if record.get("job_name") == name]
    live = [job for job in jobs if job.is_live]
    if live:
        return live[0]
    for record in _clusters(name):
        return Standing(
            kind="cluster",
            status=_word(record["status"]),
            where=f"{record.get('cloud') or ''} {record.get('region') or ''}".strip(),
        )
    return jobs[0] if jobs else Standing()


def cluster_job_status(name: str) -> str:
    """SkyPilot's word for the newest job on a cluster; empty if it has none or is no more.

    CloudError where that cannot be found out.
    """
    sky = skypilot.sdk()
    try:
        with explained():
            request = sky.job_status(name, None)
        answer = skypilot.finish(request, what="asking for the job's state")
    except AbsentError:
        return ""
    return next((_word(status) for status in answer.values() if status is not None), "")


def live_names() -> list[str]:
    """Everything of ours that SkyPilot knows to be live, the controller left out."""
    names = [str(record["job_name"]) for record in _jobs() if _job_standing(record).is_live]
    names += [str(record["name"]) for record in _clusters() if not _is_controller(record)]
    return sorted({name for name in names if name.startswith(PREFIX)})


def job_names() -> set[str]:
    """Every managed job that SkyPilot remembers, whatever became of it."""
    return {str(record["job_name"]) for record in _jobs()}


def cluster_names() -> set[str]:
    """Every cluster that SkyPilot knows, controllers too."""
    return {str(record["name"]) for record in _clusters()}


def has_cluster(name: str) -> bool:
    """Whether SkyPilot knows of machines under that name, in whatever state."""
    return bool(_clusters(name))


def controller() -> str | None:
    """The state of the machine that watches managed jobs; None if there is none."""
    return next((_word(record["status"]) for record in _clusters() if _is_controller(record)), None)


def end_job(name: str) -> None:
    """Cancel the managed jobs of that name and wait until their machines are gone."""
    sky = skypilot.sdk()
    ids = [
        int(record["job_id"])
        for record in _jobs()
        if record.get("job_name") == name and _job_standing(record).is_live
    ]
    if not ids:
        return
    with explained():
        request = sky.jobs.cancel(job_ids=ids)
    skypilot.finish(request, what="cancelling the job")
    deadline = time.monotonic() + DOWN_SECONDS
    while any(_job_standing(r).is_live for r in _jobs() if r.get("job_id") in ids):
        if time.monotonic() > deadline:
            raise CloudError(
                f"SkyPilot has not cancelled {name} within {DOWN_SECONDS / 60:.0f} minutes: look at"
                " `sky jobs queue`, and run `make down` again"
            )
        time.sleep(skypilot.POLL_SECONDS)


def end_cluster(name: str) -> None:
    """Delete the cluster and wait until SkyPilot says that it is gone; missing is fine."""
    sky = skypilot.sdk()
    if not _clusters(name):
        return
    with explained():
        request = sky.down(name)
    skypilot.finish(request, seconds=DOWN_SECONDS, what="deleting the machines")


def end_idle_controller() -> bool:
    """Delete the machine that watches managed jobs once it watches none; whether that was done.

    One that is stopped, is being set up for a job, or has had jobs of others is not ours to delete:
    it ends or stops itself.
    """
    for record in _clusters():
        if _is_controller(record) and _word(record["status"]) != "STOPPED":
            jobs = _jobs()
            is_ours = all(str(job["job_name"]).startswith(PREFIX) for job in jobs)
            is_idle = not any(_job_standing(job).is_live for job in jobs) and not _is_submitting()
            if is_ours and is_idle:
                end_cluster(str(record["name"]))
                return True
    return False


def _is_submitting() -> bool:
    """Whether the server is handing a managed job, ours or anybody's, to the controller."""
    with explained():
        return any(record.name == "sky.jobs.launch" for record in skypilot.sdk().api_status())


def tail(name: str) -> int:
    """Print what the job says until it ends or the reader leaves; SkyPilot's exit code."""
    return _print_log(name, follow=True, lines=None)


def last_words(name: str) -> None:
    """Print the last lines that the job said, if they are to be had within a minute."""

    def ask() -> None:
        with contextlib.suppress(CloudError):
            _print_log(name, follow=False, lines=LAST_LINES)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(LAST_WORDS_SECONDS)


def _print_log(name: str, *, follow: bool, lines: int | None) -> int:
    sky, current = skypilot.sdk(), standing(name)
    with explained():
        if current.kind == "job":
            is_followed = follow and current.is_live
            code = sky.jobs.tail_logs(job_id=current.job_id, follow=is_followed, tail=lines)
            return int(code or 0)
        if current.kind == "cluster":
            return int(sky.tail_logs(name, None, follow=follow, tail=lines or 0) or 0)
    raise CloudError(f"SkyPilot knows nothing that is called {name}: look at `make status`")


def _jobs() -> list[dict[str, Any]]:
    """All managed jobs, newest first; none where there is no controller that could watch any.

    CloudError where there is one that does not answer: nothing is known of its jobs then.
    """
    sky = skypilot.sdk()
    try:
        with explained():
            request = sky.jobs.queue_v2(
                refresh=False, skip_finished=False, all_users=True, fields=list(_JOB_FIELDS)
            )
        records, *_ = skypilot.finish(request, what="asking for managed jobs")
    except (NotUpError, AbsentError) as error:
        if NO_JOBS in str(error) or controller() in (None, "STOPPED"):
            return []
        name = next(each for each in cluster_names() if each.startswith(aws.CONTROLLER))
        raise CloudError(
            f"SkyPilot's controller of managed jobs does not answer ({error}): run the same"
            f" command again; where it stays so, `sky down {name}` ends it"
        ) from None
    rows = [record if isinstance(record, dict) else record.model_dump() for record in records]
    return sorted(rows, key=lambda row: -int(row.get("job_id") or 0))


def _clusters(name: str | None = None) -> list[dict[str, Any]]:
    sky = skypilot.sdk()
    with explained():
        request = sky.status([name] if name else None, refresh=sky.StatusRefreshMode.AUTO)
    records = skypilot.finish(request, what="asking for clusters")
    return [record if isinstance(record, dict) else record.model_dump() for record in records]


def _launched_name(record: Any) -> str:
    """The cluster or managed job that a request is to launch."""
    if record.cluster_name and not str(record.cluster_name).startswith(aws.CONTROLLER):
        return str(record.cluster_name)
    try:
        return str(json.loads(record.request_body or "{}").get("name") or "")
    except (ValueError, AttributeError):
        return ""


def _job_standing(record: Mapping[str, Any]) -> Standing:
    return Standing(
        kind="job",
        status=_word(record.get("status")),
        job_id=record.get("job_id"),
        where=f"{record.get('cloud') or ''} {record.get('region') or ''}".strip(" -"),
        recoveries=int(record.get("recovery_count") or 0),
        details=str(record.get("failure_reason") or ""),
    )


def _is_controller(record: Mapping[str, Any]) -> bool:
    return str(record["name"]).startswith(aws.CONTROLLER)


def _word(status: Any) -> str:
    """`ClusterStatus.UP` and `"UP"` alike as UP."""
    return str(getattr(status, "value", status) or "").rpartition(".")[2]
