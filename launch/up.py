"""`up`: from a confirmed plan to a run that goes on by itself.

Each step can be done again: killed anywhere, the same command finds what is there, removes what
nobody watches, and goes on. What runs in the cloud needs no one here: the node enforces budget and
deadline, SkyPilot recovers it and deletes its machines.
"""

import contextlib
import logging
import os
import time
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import NoReturn

from casallm.errors import CloudError
from casallm.storage.store import open_store
from launch import aws, cluster, launching
from launch.launching import Announcement
from launch.plan import PREPARE_LIMIT_USD, Plan
from launch.request import CAPACITY_HOURS, LaunchRequest, data_machine, machine_names, run_labels
from launch.sky_errors import NoCapacityError, NotUpError
from launch.tasks import Overrides, Tree, load_task, override

log = logging.getLogger(__name__)

CAPACITY_POLL_SECONDS = 60.0
"""Between two asks for machines, while the cloud has none."""

PREPARE_POLL_SECONDS = 10.0

SECRETS = ("WANDB_API_KEY", "HF_TOKEN", "NOTIFY")
ROLE_SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
"""Only for machines of other clouds, which have no role in AWS."""

NOTICES = ("aws", "gcp")
"""Clouds whose notices of preemption the trainer understands."""


def launch_plan(plan: Plan, environment: Mapping[str, str]) -> None:
    """Have the plan running, whatever an earlier, killed start left behind."""
    with launching.announced(plan.name) as announcement:
        names = (plan.name, data_machine(plan.request.run_url))
        for name in names:
            cluster.settle(name)
        current, preparing = (cluster.standing(name) for name in names)
        if not current.is_live and not preparing.is_live:
            reconcile(plan)
        if current.is_live and (current.kind == "job" or _is_at_work(plan.name, plan)):
            log.info("%s runs already (%s): it is not started twice", plan.name, current.status)
            return
        if current.kind == "cluster":  # idle: it may delete itself at any moment
            cluster.end_cluster(plan.name)
        if plan.workload.data == "documents":
            _prepare(plan, environment, announcement)
        task = train_task(plan, environment)
        launch = _submit if plan.request.is_spot else _launch
        launch(task, plan.name, announcement)


def reconcile(plan: Plan) -> None:
    """End what carries the label of a run that SkyPilot remembers and does not run.

    CloudError where it does not remember the run: another computer's SkyPilot may be at it.
    """
    if plan.request.cloud != "aws":
        return
    regions = sorted({candidate.offer.region for candidate in plan.candidates})
    seen = aws.survey(regions, run_labels(plan.request.run_url)).found
    found = [each for each in seen if each.kind == "instance" and each.state != "shutting-down"]
    known = found and cluster.cluster_names() | cluster.job_names()
    if found and not {*machine_names(plan.request.run_url)} & {*known}:
        raise CloudError(
            f"{plan.request.run_url} has {found[0]}, which this computer's SkyPilot did not rent:"
            " the run goes on from another computer (`make status`, `make logs` there), or that one"
            f" is gone; `make down RUN={plan.request.run_url}` ends it"
        )
    for each in found:
        log.warning("an earlier start left %s behind: it is ended", each)
        aws.remove(each)


def train_task(plan: Plan, environment: Mapping[str, str]) -> Tree:
    """The task of the plan's job with everything filled in."""
    request, workload = plan.request, plan.workload
    envs = {
        "RUN": request.run_url,
        "BUDGET": f"{plan.budget_usd:g}",
        "DEADLINE": f"{plan.deadline_hours:g}",
        "OFFERS": plan.offers_text(),
        "SETTINGS": " ".join(request.settings),
        "RANKS": str(request.ranks or ""),
        "LAUNCHED_AT": f"{time.time():.0f}",
        "NOTICES": request.cloud if request.cloud in NOTICES else "off",
    }
    if request.job == "sft":
        envs["FROM"] = request.base_url or ""
    else:
        envs |= {
            "PRESET": "" if request.params else workload.size,
            "PARAMS": request.params or "",
            "TOKENS": request.tokens or "",
            "DATA": workload.data_url,
        }
    return override(
        load_task(request.job),
        Overrides(
            name=plan.name,
            nodes=request.nodes,
            is_spot=request.is_spot,
            places=[plan.place_of(candidate) for candidate in plan.candidates],
            labels=run_labels(request.run_url),
            envs=envs,
            secrets=_secrets(plan, environment),
        ),
    )


def prepare_task(plan: Plan, environment: Mapping[str, str]) -> Tree:
    """The task that makes the plan's shards, on a machine without GPUs."""
    secrets = _secrets(plan, environment)
    changes = Overrides(
        name=data_machine(plan.request.run_url),
        max_hourly_usd=PREPARE_LIMIT_USD,
        labels=run_labels(plan.request.run_url),
        envs={
            "DATA": plan.request.data or "",
            "OUT": plan.workload.data_url,
            "VOCAB_SIZE": str(plan.workload.config.vocab_size),
            "HOURS": f"{plan.prepare_hours:g}",
        },
        secrets={name: value for name, value in secrets.items() if name != "WANDB_API_KEY"},
    )
    return override(load_task("prepare"), changes)


def three_commands(request: LaunchRequest, *, is_launched: bool = True) -> str:
    """What a person needs who leaves a run to itself."""
    url = request.run_url
    cloud = "" if request.cloud == "aws" else f" CLOUD={request.cloud}"
    here = "it goes on without this computer, also while it waits for a machine:"
    if not is_launched:
        here = "it may be being launched still: the same command again goes on, or"
    return f"{here}\n  make status RUN={url}\n  make logs RUN={url}\n  make down RUN={url}{cloud}"


def _submit(task: Tree, name: str, announcement: Announcement) -> None:
    """Have the task as a managed job, or nothing of it; SkyPilot waits for capacity itself."""
    announcement.insist()
    try:
        cluster.submit_job(task, name)
    except CloudError:
        with contextlib.suppress(CloudError):
            cluster.cancel_launches(name)
            cluster.end_job(name)
            cluster.end_idle_controller()
        announcement.insist()
        raise
    if announcement.is_called_off:
        cluster.end_job(name)
        announcement.insist()


def _launch(task: Tree, name: str, announcement: Announcement) -> None:
    """Have the task on a cluster that ends itself; asks again while there is no capacity."""
    began, said = datetime.now().astimezone(), ""
    until = began + timedelta(hours=CAPACITY_HOURS)
    while True:
        announcement.insist()
        try:
            cluster.launch_cluster(task, name)
            break
        except NoCapacityError as error:
            if datetime.now().astimezone() + timedelta(seconds=CAPACITY_POLL_SECONDS) > until:
                raise CloudError(
                    f"{error}, and was not within {CAPACITY_HOURS:g} hours: nothing is rented; run"
                    " the same command again later, or add REGION=, GPU= or SPOT="
                ) from None
            if str(error) != said:
                log.warning("%s: asking again every minute until %s", error, f"{until:%H:%M}")
                said = str(error)
            _wait_for_capacity()
        except CloudError:
            announcement.insist()
            raise
    if announcement.is_called_off:
        cluster.end_cluster(name)
        announcement.insist()
    try:
        if not cluster.ends_itself(name):
            cluster.make_end_itself(name, idle_minutes=2)
    except CloudError:  # nothing would end it when its job is over
        cluster.end_cluster(name)
        raise


def _wait_for_capacity() -> None:
    try:
        time.sleep(CAPACITY_POLL_SECONDS)
    except KeyboardInterrupt:
        raise CloudError(
            "nothing is rented, and nothing is asked for any more: run the same command again"
        ) from None


def _is_at_work(name: str, plan: Plan) -> bool:
    """As `_has_work`; where SkyPilot does not reach the machine, a person must look."""
    try:
        return _has_work(name)
    except NotUpError as error:
        raise CloudError(
            f"SkyPilot has {name} and does not reach it ({error}): where `make status"
            f" RUN={plan.request.run_url}` shows no progress, `make down` with the same RUN ends"
            " it, and this command begins anew"
        ) from None


def _has_work(name: str) -> bool:
    """Whether the cluster has a job that has not ended."""
    job = cluster.cluster_job_status(name)
    return bool(job) and not job.startswith(cluster.OVER)


def _prepare(plan: Plan, environment: Mapping[str, str], announcement: Announcement) -> None:
    """Make the shards first, unless they are in the bucket already."""
    shards, name = open_store(plan.workload.data_url), data_machine(plan.request.run_url)
    if shards.exists("manifest.json"):
        return
    log.info("preparing %s into %s", plan.request.data, plan.workload.data_url)
    if not _is_at_work(name, plan):
        cluster.end_cluster(name)
        _launch(prepare_task(plan, environment), name, announcement)
    deadline, looks = time.monotonic() + 3600 * plan.prepare_hours, 0
    while not shards.exists("manifest.json"):
        announcement.insist()
        looks = looks + 1 if _has_ended(name) else 0
        if looks >= 2 or time.monotonic() > deadline:
            _give_up_preparing(plan, name)
        time.sleep(PREPARE_POLL_SECONDS)
    cluster.end_cluster(name)


def _has_ended(name: str) -> bool:
    """Whether the machine is gone or its job is over; no, where SkyPilot does not say."""
    try:
        return not cluster.has_cluster(name) or cluster.cluster_job_status(name).startswith(
            cluster.OVER
        )
    except CloudError as error:
        log.warning("%s", error)
        return False


def _give_up_preparing(plan: Plan, name: str) -> NoReturn:
    cluster.last_words(name)
    cluster.end_cluster(name)
    raise CloudError(
        f"preparing {plan.request.data} made no shards (at most {plan.prepare_hours:g} h were"
        " allowed), and its machine is gone: the last lines above say why; the same command goes on"
        " where it stopped"
    )


def _secrets(plan: Plan, environment: Mapping[str, str]) -> dict[str, str]:
    names = SECRETS if plan.request.cloud == "aws" else SECRETS + ROLE_SECRETS
    return {name: environment[name] for name in names if environment.get(name)}


def environment_of_this_process() -> dict[str, str]:
    """What the launcher reads of its environment, and nothing else."""
    names = (*SECRETS, *ROLE_SECRETS, "AWS_SESSION_TOKEN")
    return {name: os.environ[name] for name in names if name in os.environ}
