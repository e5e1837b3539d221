"""What the commands do, in order: plan, check, ask, launch, follow, bring home, end.

The command line parses and prints; each function here is one command as a list of steps.
"""

import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import typer

from casallm.errors import CasallmError, CloudError
from casallm.storage.store import open_store
from launch import aws, cluster, launching, node
from launch.down import tear_down
from launch.follow import Ending, bring_home, follow
from launch.plan import Plan, build_plan
from launch.preflight import Findings, Surroundings, preflight
from launch.progress import read_progress
from launch.request import ACCOUNT, PROJECT, LaunchRequest, cluster_name, machine_names, run_labels
from launch.screen import format_plan
from launch.up import environment_of_this_process, launch_plan, three_commands

log = logging.getLogger(__name__)

Say = Callable[[str], None]

RUNS = Path("runs")


@dataclass(frozen=True)
class Choices:
    """How `up` is to behave, beside what it launches."""

    is_dirty_allowed: bool = False
    is_detached: bool = False
    is_sure: bool = False
    is_dry: bool = False


def run_up(request: LaunchRequest, choices: Choices, *, say: Say) -> int:
    """One `up`, from plan to end; the exit code."""
    plan = build_plan(request)
    if choices.is_dry:
        say(format_plan(plan))
        return 0
    environment = environment_of_this_process()
    found = preflight(plan, Surroundings(environment, choices.is_dirty_allowed))
    if found.account:
        plan = replace(plan, request=_named(request, found.account))
        plan = replace(plan, workload=build_plan(plan.request).workload)
    if not found.problems and not found.bucket_to_create and is_over(plan.request.run_url):
        say(f"{plan.request.run_url} is finished already: no machine is rented for it")
        return _accompany(plan, environment, say)
    say(format_plan(plan))
    for note in found.notes:
        say(f"note: {note}")
    if found.problems:
        raise CloudError(_listed(found.problems))
    if not choices.is_sure and not confirm("Launch it?"):
        return 1
    _create_bucket(found)
    is_launched = False
    try:
        _launch(plan, environment)
        is_launched = True
        if choices.is_detached:
            say(three_commands(plan.request))
            return 0
        return _accompany(plan, environment, say)
    except KeyboardInterrupt:
        say("\n" + three_commands(plan.request, is_launched=is_launched))
        return 0


def run_down(run_url: str | None, cloud: str, *, is_sure: bool, say: Say) -> int:
    """End one run's machines, or all; 0 only if nothing is left."""
    if not is_sure:
        say(_what_ends(run_url))
        if not confirm("End all of this?"):
            return 1
    result = tear_down(run_url, cloud=cloud)
    usd = _paid(run_url) if run_url else None
    if run_url and not result.ended and result.is_clean and not _was_begun(run_url):
        raise CloudError(
            f"there is no run at {run_url}, and nothing was rented for it: check RUN= and BUCKET=,"
            " or run `make down` alone, which ends everything"
        )
    say(result.text(usd))
    return 0 if result.is_clean else 1


def status_text(run_url: str | None) -> str:
    """One run in full, or every live one by name; the controller, and what AWS itself has."""
    begun = cluster.launches()
    names = machine_names(run_url) if run_url else sorted({*cluster.live_names(), *begun})
    if run_url and not cluster.has_cluster(names[1]):
        names = names[:1]
    lines = []
    for name in names:
        current = cluster.standing(name)
        state = current.status or ("being launched" if name in begun else "not running")
        where = f" on {current.where}" if current.where else ""
        recovered = f", recovered {current.recoveries} times" if current.recoveries else ""
        lines.append(f"{name}   {state}{where}{recovered}")
    if run_url:
        lines += [f"  {line}" for line in read_progress(open_store(run_url)).lines()]
    watching = cluster.controller()
    lines.append(f"controller   {watching or 'none: nothing is billed for it'}")
    lines.append(f"in AWS       {_rented(run_url)}")
    return "\n".join(lines if names else ["SkyPilot runs nothing of casallm", *lines])


def _what_ends(run_url: str | None) -> str:
    """What `down` is about to end; what cannot be looked at keeps nobody from ending it."""
    try:
        return status_text(run_url)
    except CasallmError as error:
        return f"{run_url or 'all that carries our label'}, of which little is known ({error})"


def is_over(run_url: str) -> bool:
    """Whether the run has finished, so that every machine of it would end at once."""
    run = open_store(run_url)
    return run.exists("finished.json") and read_progress(run).finished is not None


def only_run() -> str:
    """The name of the one thing that runs; CloudError if there is none, or a choice."""
    names = cluster.live_names()
    if len(names) == 1:
        return names[0]
    listed = f" ({', '.join(names)})" if names else ""
    raise CloudError(f"{len(names)} runs are live{listed}: say which with RUN=s3://BUCKET/NAME")


def with_account(request: LaunchRequest) -> LaunchRequest:
    """`request` with the account's number in the name of its default bucket."""
    if ACCOUNT not in request.run_url:
        return request
    return _named(request, aws.account_id())


def confirm(question: str) -> bool:
    """Ask for one keystroke; CloudError where nobody can answer."""
    if not sys.stdin.isatty():
        raise CloudError("nobody can be asked here: add --yes (YES=1) to go on")
    sys.stdout.write(f"{question} [y/N] ")
    sys.stdout.flush()
    answer = typer.getchar()
    sys.stdout.write(f"{answer}\n")
    return answer.lower() == "y"


def _launch(plan: Plan, environment: Mapping[str, str]) -> None:
    """Launch the plan; who is away hears of it when that fails."""
    try:
        launch_plan(plan, environment)
    except CloudError as error:
        _tell(plan, environment, str(error))
        raise


def _accompany(plan: Plan, environment: Mapping[str, str], say: Say) -> int:
    """Follow the run to its end, bring it home, end its machines, say what it cost."""
    url = plan.request.run_url
    try:
        ending = follow(plan)
    except CloudError as error:
        ending = Ending(False, str(error), was_told=False)
    if not ending.has_succeeded:
        cluster.last_words(plan.name)
    say(f"{url}: {ending.reason}")
    try:
        is_home = not ending.has_succeeded or _bring_home(url, say)
        if not ending.was_told:
            _tell(plan, environment, ending.reason)
        result = tear_down(url, cloud=plan.request.cloud)
    except KeyboardInterrupt:
        raise CloudError(
            f"interrupted before it was known that nothing is left: run `make down RUN={url}`"
        ) from None
    say(result.text(_paid(url)))
    if not ending.has_succeeded:
        say("the same command goes on from the last checkpoint")
    return 0 if ending.has_succeeded and is_home and result.is_clean else 1


def _bring_home(url: str, say: Say) -> bool:
    """Copy the results to this computer; what fails is said, and does not keep machines alive."""
    try:
        folder, n_files = bring_home(url, RUNS)
    except (CasallmError, OSError) as error:
        say(f"not everything could be brought home ({error}): it is all in {url}")
        return False
    say(f"{n_files} files of it are in {folder}")
    return True


def _tell(plan: Plan, environment: Mapping[str, str], reason: str) -> None:
    if environment.get("NOTIFY"):
        node.notify(environment["NOTIFY"], f"casallm: {plan.request.run_url}: {reason}")


def _named(request: LaunchRequest, account: str) -> LaunchRequest:
    bucket = request.bucket_url.replace(ACCOUNT, account)
    return replace(request, bucket=bucket)


def _create_bucket(found: Findings) -> None:
    if found.bucket_to_create:
        name, region = found.bucket_to_create.split()
        aws.create_bucket(name, region)


def _rented(run_url: str | None) -> str:
    """What AWS says is there, also what SkyPilot has lost track of, as the end of a row."""
    labels = run_labels(run_url) if run_url else PROJECT
    try:
        seen = aws.survey(aws.enabled_regions(), labels)
    except CloudError as error:
        return f"not asked: {error}"
    rows = [*map(str, seen.found), *(f"{region} is closed to you" for region in seen.closed)]
    return "\n             ".join(rows) or "nothing"


def _was_begun(run_url: str) -> bool:
    """Whether the run was ever launched or started; yes, where that cannot be found out."""
    if launching.was_begun(cluster_name(run_url)):
        return True
    try:
        return read_progress(open_store(run_url)).attempts > 0
    except CasallmError:
        return True


def _paid(run_url: str) -> float | None:
    """What the run's own ledger says; None where it cannot be read."""
    try:
        usd = read_progress(open_store(run_url)).usd
    except CasallmError as error:
        log.warning("the ledger of %s cannot be read: %s", run_url, error)
        return None
    return usd or None


def _listed(problems: tuple[str, ...]) -> str:
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} things to fix first:\n" + "\n".join(f"  - {each}" for each in problems)
