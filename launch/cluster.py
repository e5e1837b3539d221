"""SkyPilot, the engine: start a task, see what became of it, end it. The only importer of `sky`.

Every call goes through SkyPilot's API server (on this computer unless configured otherwise, where
the first call starts it) and has a time limit. Machines never get keys: they use the role that
SkyPilot gives them, and the controller of managed jobs is deleted, not stopped, when it is idle.
"""

import contextlib
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from casallm.errors import CloudError, MissingExtraError
from launch.sky_errors import NoControllerError, explained

log = logging.getLogger(__name__)

CONFIG = (
    "aws.remote_identity=SERVICE_ACCOUNT",
    "jobs.controller.autostop.idle_minutes=10",
    "jobs.controller.autostop.down=true",
)
"""Settings of SkyPilot that hold for everything launched here."""

PREFIX = "casallm-"
"""How the names of everything launched here begin."""

CONTROLLER = "sky-jobs-controller-"
"""How SkyPilot names the machine that watches managed jobs."""

POLL_SECONDS = 2.0
CALL_SECONDS = 300.0
"""For anything but a launch or an end; a busy server takes minutes over what it does in one."""

DOWN_SECONDS = 600.0
SUBMIT_SECONDS = 1200.0
"""For a managed job: its controller may have to be started first."""

_LAUNCHES = ("sky.launch", "sky.jobs.launch")
"""What the API server calls a launch that is under way."""

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
        """Whether it is a managed job that has not had a machine yet."""
        return self.kind == "job" and self.status in _WAITING

    @property
    def is_live(self) -> bool:
        """Whether it goes on by itself, or holds machines."""
        return self.kind == "cluster" or self.status in _LIVE_JOB


def submit_job(task: Mapping[str, Any], name: str) -> int:
    """Hand a task to SkyPilot's managed jobs, which recover it; the job's number."""
    sky = _sky()
    with explained():
        made = sky.Task.from_yaml_config(dict(task))
        request = sky.jobs.launch(made, name=name)
    job_ids, _ = _finish(request, seconds=SUBMIT_SECONDS, what="submitting the job")
    return int(job_ids[0])


def launch_cluster(task: Mapping[str, Any], name: str) -> None:
    """Start a task on machines of its own that end themselves when idle.

    NoCapacityError where none is to be had now; after any CloudError nothing of them is left.
    """
    sky = _sky()
    with explained():
        made = sky.Task.from_yaml_config(dict(task))
        request = sky.launch(made, cluster_name=name)
    try:
        _finish(request, seconds=SUBMIT_SECONDS, what="launching")
    except CloudError:
        end_cluster(name)
        raise


def launches() -> dict[str, list[str]]:
    """What SkyPilot's server is launching for us: its requests, by the name of what is launched."""
    sky = _sky()
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
        sky = _sky()
        with explained():
            request = sky.api_cancel(requests, silent=True)
        _finish(request, seconds=CALL_SECONDS, what="calling off the launch")
    return bool(requests)


def settle(name: str) -> None:
    """Wait until no launch under `name` that an earlier, killed start asked for is under way."""
    for request in launches().get(name, []):
        log.info("an earlier start of %s is still at work: waiting for it", name)
        with contextlib.suppress(CloudError):
            _finish(request, seconds=SUBMIT_SECONDS, what="an earlier launch")


def ends_itself(name: str) -> bool:
    """Whether the cluster is known to delete itself when idle (SkyPilot once forgot to set it)."""
    records = _clusters(name)
    return bool(records) and all(
        record["autostop"] >= 0 and record["to_down"] for record in records
    )


def make_end_itself(name: str, *, idle_minutes: int) -> None:
    """Let the cluster delete itself when idle."""
    sky = _sky()
    with explained():
        request = sky.autostop(name, idle_minutes, down=True)
    _finish(request, seconds=CALL_SECONDS, what="setting autodown")


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
            details=str(record.get("last_event") or ""),
        )
    return jobs[0] if jobs else Standing()


def cluster_job_status(name: str, job_id: int | None = None) -> str:
    """SkyPilot's word for a job on a cluster (default: the newest); empty if it cannot be asked."""
    sky = _sky()
    try:
        with explained():
            request = sky.job_status(name, None if job_id is None else [job_id])
        answer = _finish(request, seconds=CALL_SECONDS, what="asking for the job's state")
    except CloudError as error:
        log.debug("job state of %s: %s", name, error)
        return ""
    return next((_word(status) for status in answer.values() if status is not None), "")


def live_names() -> list[str]:
    """Everything of ours that SkyPilot knows to be live, the controller left out."""
    names = [str(record["job_name"]) for record in _jobs() if _job_standing(record).is_live]
    names += [str(record["name"]) for record in _clusters() if not _is_controller(record)]
    return sorted({name for name in names if name.startswith(PREFIX)})


def known_names() -> set[str]:
    """Every managed job and cluster that SkyPilot remembers, whatever became of it."""
    names = {str(record["job_name"]) for record in _jobs()}
    return names | {str(record["name"]) for record in _clusters()}


def has_live_jobs() -> bool:
    """Whether the controller has a managed job to watch, ours or anybody's."""
    return any(_job_standing(record).is_live for record in _jobs())


def has_cluster(name: str) -> bool:
    """Whether SkyPilot knows of machines under that name, in whatever state."""
    return bool(_clusters(name))


def controller() -> str | None:
    """The state of the machine that watches managed jobs; None if there is none."""
    return next((_word(record["status"]) for record in _clusters() if _is_controller(record)), None)


def end_job(name: str) -> None:
    """Cancel the managed jobs of that name and wait until their machines are gone."""
    sky = _sky()
    ids = [
        int(record["job_id"])
        for record in _jobs()
        if record.get("job_name") == name and _job_standing(record).is_live
    ]
    if not ids:
        return
    with explained():
        request = sky.jobs.cancel(job_ids=ids)
    _finish(request, seconds=CALL_SECONDS, what="cancelling the job")
    deadline = time.monotonic() + DOWN_SECONDS
    while any(_job_standing(r).is_live for r in _jobs() if r.get("job_id") in ids):
        if time.monotonic() > deadline:
            raise CloudError(
                f"SkyPilot has not cancelled {name} within {DOWN_SECONDS / 60:.0f} minutes: look at"
                " `sky jobs queue`, and run `make down` again"
            )
        time.sleep(POLL_SECONDS)


def end_cluster(name: str) -> None:
    """Delete the cluster and wait until SkyPilot says that it is gone; missing is fine."""
    sky = _sky()
    if not _clusters(name):
        return
    with explained():
        request = sky.down(name)
    _finish(request, seconds=DOWN_SECONDS, what="deleting the machines")


def end_controller() -> None:
    """Delete the machine that watches managed jobs, if there is one."""
    for record in _clusters():
        if _is_controller(record):
            end_cluster(str(record["name"]))


def tail(name: str, *, follow: bool = True) -> int:
    """Print what the job says, until it ends or the reader leaves; SkyPilot's exit code."""
    sky = _sky()
    current = standing(name)
    with explained():
        if current.kind == "job":
            is_followed = follow and current.is_live
            return int(sky.jobs.tail_logs(job_id=current.job_id, follow=is_followed) or 0)
        if current.kind == "cluster":
            return int(sky.tail_logs(name, None, follow=follow) or 0)
    raise CloudError(f"SkyPilot knows nothing that is called {name}: look at `make status`")


def _jobs() -> list[dict[str, Any]]:
    """All managed jobs, newest first; none where there is no controller to ask."""
    sky = _sky()
    try:
        with explained():
            request = sky.jobs.queue_v2(refresh=False, skip_finished=False)
        records, *_ = _finish(request, seconds=CALL_SECONDS, what="asking for managed jobs")
    except NoControllerError:
        return []
    rows = [record if isinstance(record, dict) else record.model_dump() for record in records]
    return sorted(rows, key=lambda row: -int(row.get("job_id") or 0))


def _clusters(name: str | None = None) -> list[dict[str, Any]]:
    sky = _sky()
    with explained():
        request = sky.status([name] if name else None, refresh=sky.StatusRefreshMode.AUTO)
    records = _finish(request, seconds=CALL_SECONDS, what="asking for clusters")
    return [record if isinstance(record, dict) else record.model_dump() for record in records]


def _launched_name(record: Any) -> str:
    """The cluster or managed job that a request is to launch."""
    if record.cluster_name and not str(record.cluster_name).startswith(CONTROLLER):
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
    return str(record["name"]).startswith(CONTROLLER)


def _word(status: Any) -> str:
    """`ClusterStatus.UP` and `"UP"` alike as UP."""
    return str(getattr(status, "value", status) or "").rpartition(".")[2]


@cache
def _sky() -> Any:
    """SkyPilot, with our settings applied once a process."""
    try:
        import sky
        import sky.jobs
        from sky import skypilot_config
    except ImportError:
        raise MissingExtraError("skypilot", "cloud") from None
    skypilot_config.apply_cli_config(list(CONFIG))
    return sky


def _finish(request: Any, *, seconds: float, what: str) -> Any:
    """The result of a request to the API server; CloudError when it takes too long."""
    sky = _sky()
    deadline, pause = time.monotonic() + seconds, 0.2
    with explained():
        while not _is_over(request):
            if time.monotonic() > deadline:
                with contextlib.suppress(OSError):
                    sky.api_cancel(request)
                raise CloudError(
                    f"{what} took longer than {seconds / 60:.0f} minutes and was given up: look at"
                    " `sky api logs`, then run the same command again"
                )
            time.sleep(pause)
            pause = min(1.2 * pause, POLL_SECONDS)
        return sky.get(request)


def _is_over(request: Any) -> bool:
    """Whether the API server has ended the request; not yet, where the connection was lost."""
    try:
        records = _sky().api_status([request])
    except OSError as error:
        log.debug("SkyPilot's API server did not say: %s", error)
        return False
    return not records or records[0].status in ("SUCCEEDED", "FAILED", "CANCELLED")
