"""One start of a run: from what was asked for to an exit code and a sentence.

Settle the settings, have the data, claim the attempt, let the supervisor run generations of
ranks, and at the end write what a finished run holds. The same request continues the run. What
differs from stage to stage is asked of the request.
"""

import logging
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from casallm.config import build, canonical_json, to_tree, to_yaml
from casallm.errors import CheckpointError, ConfigError, StoreError, TrainingError
from casallm.estimate.architecture import count_params
from casallm.estimate.estimator import EstimateRequest, estimate
from casallm.estimate.layout import Wishes
from casallm.storage.store import Store, open_store
from casallm.train.attempts import Attempt, CheckpointName, attempt_numbers, read_attempt
from casallm.train.budget import BudgetConfig
from casallm.train.checkpoint import Checkpoint, list_checkpoints, newest_good
from casallm.train.control import Outcome, Spec
from casallm.train.journal import (
    METRICS,
    SAMPLES,
    AttemptLog,
    Line,
    merged_metrics,
    merged_samples,
    spent_usd,
)
from casallm.train.machine import Machine, this_machine
from casallm.train.nodes import Follower, Leader, Place
from casallm.train.preemption import heed_notices
from casallm.train.report import write_report
from casallm.train.resume import start_attempt
from casallm.train.run import (
    RunConfig,
    changes_of,
    identity_sha256,
    load_config,
    save_config,
    try_with,
)
from casallm.train.run_place import scratch_of
from casallm.train.stage import Material, Request
from casallm.train.status import finish, read_finished
from casallm.train.supervisor import (
    EXIT_AGAIN,
    EXIT_DONE,
    EXIT_FAILED,
    Generation,
    Supervisor,
    follow,
)
from casallm.units import format_count

log = logging.getLogger(__name__)

BOOT_TIME_SLACK_SECONDS = 30.0
"""The kernel counts its boot back from now, so each correction of the clock moves it."""


@dataclass(frozen=True)
class Settled:
    """Everything about one start that is known before it claims the run."""

    request: Request
    run: Store
    config: RunConfig
    material: Material
    machine: Machine
    ranks: int
    """Of this node."""

    @property
    def place(self) -> Place:
        """Of this node among those of the run."""
        return self.request.start.place

    @property
    def identity_sha256(self) -> str:
        """Of what the run computes."""
        return identity_sha256(self.config, self.material.identity)

    @property
    def scratch(self) -> Path:
        """Where this machine keeps copies of what belongs to a bucket's run."""
        return scratch_of(self.run)


def start(request: Request) -> tuple[int, str]:
    """Begin or continue the run; the exit code, and a sentence for the person.

    Raises CasallmError for what a person must fix.
    """
    machine = this_machine()
    run = open_store(request.run_url(machine))
    finished = read_finished(run)
    if finished:
        if not run.exists(METRICS):
            _write_derived(run)
        return EXIT_DONE, f"{run.url} is finished: {finished['reason']}\n{_next_steps(run)}"
    settled = settle(request, machine, run)
    place = settled.place
    if place.node:
        notices = settled.config.train.notices
        return follow(Follower(place, run.url), _localizer(settled), notices), ""
    _refuse_changes(settled)
    attempt, checkpoint = _claim(settled)
    log.info("%s", describe(settled, checkpoint.name if checkpoint else None))
    leader = Leader(place, run.url) if place.n_nodes > 1 else None
    supervisor = Supervisor(_generations(settled, attempt), lambda: _newest_step(run), leader)
    code, answer = EXIT_FAILED, ""
    try:
        with heed_notices(settled.config.train.notices, supervisor.request_stop):
            code, answer = _conclude(settled, attempt, supervisor.run())
    finally:
        if leader:
            leader.dismiss(code)
    return code, answer


def settle(request: Request, machine: Machine, run: Store) -> Settled:
    """Settings, data and ranks for `request`, checked against each other."""
    config, material = request.settle(machine, run)
    return Settled(request, run, config, material, machine, _n_ranks(request, machine))


def describe(settled: Settled, start_from: CheckpointName | None) -> str:
    """What is about to be trained, in one line."""
    config = settled.config
    begin = "begins"
    if start_from:
        begin = f"continues from step {start_from.step:,}"
    elif config.base:
        begin = f"begins from {config.base.run}, {config.base.checkpoint}"
    return (
        f"{settled.run.url} {begin}: {format_count(count_params(config.model))} parameters,"
        f" {format_count(config.total_tokens)} tokens in {config.train.steps:,} steps, on"
        f" {settled.machine.describe()}, {settled.ranks} rank{'s' if settled.ranks > 1 else ''},"
        f" {config.train.precision}"
    )


def plan_text(request: Request) -> str:
    """What `start` would do, without writing or claiming anything."""
    machine = this_machine()
    run = open_store(request.run_url(machine))
    config = request.plan(machine, run)
    lines = [
        f"run         {run.url}",
        f"model       {config.model.family}, {count_params(config.model):,} parameters",
        *([f"from        {config.base.run}, {config.base.checkpoint}"] if config.base else []),
        f"data        {config.data.source}",
        f"length      {config.train.steps:,} steps of {config.tokens_per_step:,} tokens"
        f" ({format_count(config.total_tokens)})",
        f"machine     {machine.describe()}, {_n_ranks(request, machine)} ranks,"
        f" {config.train.precision}",
        "settings",
        *(f"  {line}" for line in to_yaml(to_tree(config)).splitlines()),
    ]
    return "\n".join(lines)


def _claim(settled: Settled) -> tuple[Attempt, Checkpoint | None]:
    """Lead the run from here on, and put what it is made of into its directory."""
    run, config = settled.run, settled.config
    attempt, checkpoint = start_attempt(
        run,
        settled.scratch,
        ranks=settled.ranks * settled.place.n_nodes,
        machine=settled.machine.facts(),
        usd_per_hour=config.budget.usd_per_hour,
        predicted_usd=predicted_usd(config, settled.machine, settled.ranks, settled.place.n_nodes),
        started_at=time.time(),
        **_billing(run, config.budget),
    )
    _copy_files(settled.material, run)
    save_config(run, config, settled.material.identity)
    _note(run, attempt, "dataset", **settled.material.facts)
    return attempt, checkpoint


def predicted_usd(
    config: RunConfig, machine: Machine, ranks: int, n_nodes: int
) -> dict[str, float] | None:
    """What the estimator says of the whole run at this machine's price; None where it cannot.

    Preemptions are not in it: a run does not know how its machine was rented.
    """
    hardware, price = machine.hardware, config.budget.usd_per_hour
    if not price or machine.device_kind != "cuda" or hardware is None:
        return None
    request = EstimateRequest(
        config=config.model,
        tokens=config.total_tokens,
        context_length=config.train.context_length,
        hardware=hardware,
        n_gpus=ranks,
        n_nodes=n_nodes,
        usd_per_gpu_hour=price / (ranks * n_nodes),
        wishes=Wishes(
            stack="eager" if config.train.compile == "off" else "compiled",
            precision=config.train.precision,
            batch_tokens=config.train.global_batch_size * config.train.context_length,
        ),
    )
    try:
        return asdict(estimate(request).offers[0].bill.usd)
    except ConfigError as error:
        log.info("no cost is predicted: %s", error)
        return None


def _billing(run: Store, config: BudgetConfig) -> dict[str, Any]:
    """What was paid before this machine, and since when it bills; one machine is billed once."""
    host, booted_at = socket.gethostname(), psutil.boot_time()
    newest = max(attempt_numbers(run), default=0)
    last = read_attempt(run, newest) if newest else None
    is_same_machine = (
        last is not None
        and last.info.get("host") == host
        and abs(float(last.info.get("booted_at", 0.0)) - booted_at) < BOOT_TIME_SLACK_SECONDS
    )
    if last and is_same_machine and config.billed_from == "boot":
        paid = {key: last.info[key] for key in ("usd_before", "billed_since")}
    else:
        since = booted_at if config.billed_from == "boot" else time.time()
        paid = {"usd_before": spent_usd(run), "billed_since": since}
    return {"booted_at": booted_at, **paid}


def _generations(settled: Settled, attempt: Attempt) -> Callable[[], Generation]:
    """What the supervisor asks before each generation: to go on from the newest checkpoint."""
    run, config = settled.run, settled.config

    def next_generation() -> Generation:
        elapsed = [line["elapsed_seconds"] for line in merged_metrics(run) if "loss" in line]
        checkpoint = newest_good(run, settled.scratch)
        spec = Spec(
            run_url=run.url,
            config=to_tree(config),
            machine=settled.machine.facts(),
            data_directory=str(settled.material.directory),
            scratch=str(settled.scratch),
            attempt=attempt.number,
            start_from=str(checkpoint.name) if checkpoint else None,
            identity_sha256=settled.identity_sha256,
            usd_before=float(attempt.info["usd_before"]),
            billed_since=float(attempt.info["billed_since"]),
            run_started=_run_started(run, attempt),
            elapsed_before=float(elapsed[-1]) if elapsed else 0.0,
        )
        return _generation(settled, spec)

    return next_generation


def _localizer(settled: Settled) -> Callable[[Spec], Generation]:
    """Node 0's spec with this node's directories; TrainingError if its data are not ours."""

    def localize(spec: Spec) -> Generation:
        config = build(RunConfig, spec.config)
        if identity_sha256(config, settled.material.identity) != spec.identity_sha256:
            raise TrainingError(
                f"the settings or data of node {settled.place.node} are not those of node 0:"
                " give every node the same command and the same data"
            )
        local = replace(
            spec,
            machine=settled.machine.facts(),
            data_directory=str(settled.material.directory),
            scratch=str(settled.scratch),
        )
        return _generation(settled, local)

    return localize


def _generation(settled: Settled, spec: Spec) -> Generation:
    return Generation(
        spec=spec,
        place=settled.place,
        ranks=settled.ranks,
        threads_per_rank=max(1, settled.machine.n_cores // settled.ranks),
        stall_seconds=60 * settled.config.train.stall_minutes,
    )


def _conclude(settled: Settled, attempt: Attempt, outcome: Outcome) -> tuple[int, str]:
    """Write down how the attempt ended; the exit code and what to tell the person."""
    run = settled.run
    if outcome.kind == "finished":
        for kind, fields in settled.request.score(run, settled.config, settled.material):
            _note(run, attempt, kind, **fields)
    try:
        _note(run, attempt, "end", outcome=outcome.kind, step=outcome.step, reason=outcome.reason)
    except StoreError as error:
        if outcome.kind == "finished":
            raise
        log.warning("%s does not hear how this start ended: %s", run.url, error)
    if outcome.kind == "failed":
        raise TrainingError(outcome.reason)
    if outcome.kind == "stopped":
        return EXIT_AGAIN, _stopped_sentence(settled, outcome)
    finish(run, attempt, step=outcome.step, reason=outcome.reason)
    _write_derived(run)
    return EXIT_DONE, f"{run.url} is finished: {outcome.reason}\n{_next_steps(run)}"


def _stopped_sentence(settled: Settled, outcome: Outcome) -> str:
    url, steps = settled.run.url, settled.config.train.steps
    if not outcome.step:
        return f"{url} has no checkpoint yet ({outcome.reason}): the same command begins again"
    return (
        f"{url} is saved at step {outcome.step:,} of {steps:,} ({outcome.reason}): the same command"
        " goes on from there"
    )


def _write_derived(run: Store) -> None:
    """What a finished run holds and could be computed again; all is there when metrics are."""
    run.write(SAMPLES, _to_lines(merged_samples(run)))
    write_report(run)
    run.write(METRICS, _to_lines(merged_metrics(run)))


def _note(run: Store, attempt: Attempt, kind: str, **fields: Any) -> None:
    """One event of the attempt, readable by others when this returns."""
    journal = AttemptLog(run, attempt, publish_every_seconds=None)
    journal.event(kind, **fields)
    journal.close()


def _to_lines(records: list[Line]) -> bytes:
    return "".join(canonical_json(record) + "\n" for record in records).encode()


def _refuse_changes(settled: Settled) -> None:
    differences = changes_of(settled.run, settled.config, settled.material.identity)
    if not differences:
        return
    listed = "; ".join(differences)
    if settled.request.start.allow_changes:
        log.warning("%s goes on with other settings: %s", settled.run.url, listed)
        return
    raise CheckpointError(
        f"{settled.run.url} was made with other settings ({listed}): give the old values, start a"
        " run of another name with RUN=, or insist with --allow-changes"
    )


def _n_ranks(request: Request, machine: Machine) -> int:
    ranks = request.start.ranks or max(1, machine.n_gpus)
    if machine.n_gpus and ranks > machine.n_gpus:
        raise ConfigError(
            f"--ranks is {ranks}, and each needs a GPU of its own, of which there are"
            f" {machine.n_gpus} here: give at most that many"
        )
    return ranks


def _copy_files(material: Material, run: Store) -> None:
    """The run's own copies, with which it goes on without this machine's data."""
    for name, path in material.files.items():
        if not run.exists(name):
            run.put(name, path)


def _newest_step(run: Store) -> int:
    names = list_checkpoints(run)
    return names[-1].step if names else 0


def _run_started(run: Store, attempt: Attempt) -> float:
    first = read_attempt(run, 1) or attempt
    return float(first.info["started_at"])


def _next_steps(run: Store) -> str:
    report = f"{run.url}/report.html"
    return (
        f"report: {report}\ntry it: casallm sample {run.url} {try_with(load_config(run)[0].stage)}"
    )
