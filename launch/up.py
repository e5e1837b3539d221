"""`up`: from a confirmed plan to a finished run, or to a person who left it running.

Each step can be done again: killed anywhere, the same command finds what is there, removes what
nobody watches, and goes on. What runs in the cloud needs no one here: the node enforces budget and
deadline, SkyPilot recovers it and deletes its machines.
"""

import logging
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from casallm.errors import CloudError, StoreError
from casallm.storage.store import open_store
from casallm.units import format_usd
from launch import aws, cluster
from launch.down import TearDown, tear_down
from launch.plan import CAPACITY_HOURS, Plan
from launch.progress import RunProgress, read_progress
from launch.request import run_labels
from launch.tasks import Overrides, Tree, load_task, override

log = logging.getLogger(__name__)

FOLLOW_SECONDS, ASK_SECONDS = 10.0, 60.0
START_PATIENCE_SECONDS = 120.0
"""How long a job may be unknown after it was submitted."""

SECRETS = ("WANDB_API_KEY", "HF_TOKEN", "NOTIFY")
ROLE_SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
"""Only for machines of other clouds, which have no role in AWS."""

NOTICES = ("aws", "gcp")
"""Clouds whose notices of preemption the trainer understands."""

OVER = ("FAILED", "CANCELLED", "SUCCEEDED")
"""How SkyPilot's words for a job that has ended begin."""

BROUGHT_HOME = ("config.yaml", "finished.json", "metrics.jsonl", "samples.jsonl")
BROUGHT_HOME_BELOW = ("report", "plots/", "model/", "tokenizer/")


@dataclass(frozen=True)
class Ending:
    """How a job that was followed ended."""

    has_succeeded: bool
    reason: str
    was_told: bool = True
    """Whether the node itself had the chance to tell the webhook."""


def launch_plan(plan: Plan, environment: Mapping[str, str]) -> cluster.Standing:
    """Have the plan running, whatever an earlier, killed start left behind."""
    names = (plan.name, _data_machine(plan))
    for name in names:
        cluster.settle(name)
    current, preparing = (cluster.standing(name) for name in names)
    if not current.is_live and not preparing.is_live:
        reconcile(plan)
    if current.is_live and (current.kind == "job" or _has_work(plan.name)):
        log.info("%s runs already (%s): it is not started twice", plan.name, current.status)
        return current
    if plan.workload.data == "documents":
        _prepare(plan, environment)
    task = train_task(plan, environment)
    if plan.request.is_spot:
        cluster.submit_job(task, plan.name)
    else:
        cluster.launch_cluster(task, plan.name, wait_hours=CAPACITY_HOURS)
        if not cluster.ends_itself(plan.name):
            cluster.make_end_itself(plan.name, idle_minutes=2)
    return cluster.standing(plan.name)


def reconcile(plan: Plan) -> list[aws.Leftover]:
    """End what carries the label of a run that SkyPilot does not run; what that was."""
    if plan.request.cloud != "aws":
        return []
    regions = sorted({candidate.offer.region for candidate in plan.candidates})
    found = aws.leftovers(regions, run_labels(plan.request.run_url))
    for each in found:
        log.warning("an earlier start left %s behind: it is ended", each)
        if each.kind != "volume":
            aws.remove(each)
    return found


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
        "NOTICES": request.cloud if request.cloud in NOTICES else "off",
    }
    if request.job == "sft":
        envs["FROM"] = request.start_from or ""
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
            places=[candidate.place for candidate in plan.candidates],
            max_hourly_usd=plan.max_hourly_usd,
            labels=run_labels(request.run_url),
            envs=envs,
            secrets=_secrets(plan, environment),
        ),
    )


def prepare_task(plan: Plan, environment: Mapping[str, str]) -> Tree:
    """The task that makes the plan's shards, on a machine without GPUs."""
    secrets = _secrets(plan, environment)
    changes = Overrides(
        name=_data_machine(plan),
        labels=run_labels(plan.request.run_url),
        envs={
            "DATA": plan.request.data or "",
            "OUT": plan.workload.data_url,
            "VOCAB_SIZE": str(plan.workload.config.vocab_size),
        },
        secrets={name: value for name, value in secrets.items() if name != "WANDB_API_KEY"},
    )
    return override(load_task("prepare"), changes)


def follow(plan: Plan) -> Ending:
    """Say what happens until the run is over or its job is; Ctrl-C leaves it running.

    The run's own directory is read often; SkyPilot, which answers slowly, is asked once a minute.
    """
    url, began, said, asked = plan.request.run_url, time.monotonic(), "", -math.inf
    current, job = cluster.Standing(), ""
    while True:
        progress = _progress(url)
        if progress.finished is not None:
            return Ending(True, progress.finished)
        if time.monotonic() - asked > ASK_SECONDS:
            current, job = _ask(plan.name, current, job)
            asked = time.monotonic()
        if (words := _words(current, job, progress)) != said:
            log.info("%s", words)
            said = words
        is_unknown = current.kind == "none" and time.monotonic() - began > START_PATIENCE_SECONDS
        if not progress.attempts and time.monotonic() - began > 3600 * CAPACITY_HOURS:
            end(plan)
            raise CloudError(
                f"no machine began within {CAPACITY_HOURS:g} hours, so {plan.name} was ended: run"
                " the same command again, or add REGION=, GPU= or SPOT=0"
            )
        if job.startswith(OVER) or is_unknown:
            return _ended(_progress(url), job, current)
        time.sleep(FOLLOW_SECONDS)


def _ask(name: str, current: cluster.Standing, job: str) -> tuple[cluster.Standing, str]:
    """What stands under the name and its job's state; as before where SkyPilot does not say."""
    try:
        current = cluster.standing(name)
        is_cluster = current.kind == "cluster"
        return current, cluster.cluster_job_status(name) if is_cluster else current.status
    except CloudError as error:
        log.warning("%s", error)
        return cluster.Standing("unknown") if current.kind == "none" else current, job


def bring_home(run_url: str, folder: Path) -> list[Path]:
    """Copy the report, the finished model and what belongs to them to this computer."""
    run = open_store(run_url)
    brought = []
    for entry in run.list():
        if entry.name in BROUGHT_HOME or entry.name.startswith(BROUGHT_HOME_BELOW):
            path = folder / entry.name
            run.get(entry.name, path)
            brought.append(path)
    return brought


def end(plan: Plan) -> TearDown:
    """Prove that nothing of the run is left that bills."""
    return tear_down(plan.request.run_url, cloud=plan.request.cloud)


def three_commands(run_url: str, *, is_launched: bool = True) -> str:
    """What a person needs who leaves a run to itself."""
    here = "it is being launched from this computer, which must stay on until it is RUNNING:"
    return (
        f"{'it goes on without this computer:' if is_launched else here}\n"
        f"  make status RUN={run_url}\n"
        f"  make logs RUN={run_url}\n"
        f"  make down RUN={run_url}"
    )


def _has_work(name: str) -> bool:
    """Whether the cluster has a job that has not ended."""
    job = cluster.cluster_job_status(name)
    return bool(job) and not job.startswith(OVER)


def _prepare(plan: Plan, environment: Mapping[str, str]) -> None:
    """Make the shards first, unless they are in the bucket already."""
    if open_store(plan.workload.data_url).exists("manifest.json"):
        return
    name = _data_machine(plan)
    log.info("preparing %s into %s", plan.request.data, plan.workload.data_url)
    cluster.launch_cluster(prepare_task(plan, environment), name, wait_hours=CAPACITY_HOURS)
    while not open_store(plan.workload.data_url).exists("manifest.json"):
        status = cluster.cluster_job_status(name)
        if status.startswith(OVER[:2]):
            cluster.tail(name)
            cluster.end_cluster(name)
            raise CloudError(
                f"preparing {plan.request.data} failed, and its machine is gone: the last lines"
                " above say why"
            )
        time.sleep(FOLLOW_SECONDS)
    cluster.end_cluster(name)


def _data_machine(plan: Plan) -> str:
    """The name of the machine that prepares the plan's data."""
    return f"{plan.name}-data"


def _secrets(plan: Plan, environment: Mapping[str, str]) -> dict[str, str]:
    names = SECRETS if plan.request.cloud == "aws" else SECRETS + ROLE_SECRETS
    return {name: environment[name] for name in names if environment.get(name)}


def _progress(run_url: str) -> RunProgress:
    """The run's progress; an unreachable bucket is no reason to stop watching."""
    try:
        return read_progress(open_store(run_url))
    except StoreError as error:
        log.warning("%s cannot be read just now: %s", run_url, error)
        return RunProgress(run_url)


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
    return Ending(False, reason, was_told=job.startswith("FAILED"))


def environment_of_this_process() -> dict[str, str]:
    """What the launcher reads of its environment, and nothing else."""
    names = (*SECRETS, *ROLE_SECRETS)
    return {name: os.environ[name] for name in names if name in os.environ}
