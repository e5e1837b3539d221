"""`python -m launch`: up, status, logs, down; and on the node begin, price and notify."""

import io
import logging
import os
import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from casallm.errors import CasallmError
from casallm.units import format_usd

if TYPE_CHECKING:
    from launch.request import Job

app = typer.Typer(
    name="launch",
    help="Run casallm in a cloud: one plan, one question, nothing left behind.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Settings = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Any setting, such as optim.lr=3e-4."),
]
RunOption = Annotated[str | None, typer.Option("--run", help="The run's URL, or a name in BUCKET.")]
BucketOption = Annotated[
    str | None, typer.Option(help="Where runs are kept. Default: s3://casallm-ACCOUNT.")
]
CloudOption = Annotated[str, typer.Option(help="aws; others are reached through SkyPilot.")]


def main() -> None:
    """Run the command line; errors a person can fix become one sentence and an exit code."""
    is_debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for name in ("casallm", "launch"):
        logging.getLogger(name).setLevel(logging.DEBUG if is_debug else logging.INFO)
    try:
        code = app(arguments, standalone_mode=True)
    except CasallmError as error:
        if is_debug:
            raise
        sys.stdout.flush()  # into a pipe, the plan comes before what is wrong with it
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    raise SystemExit(code)


@app.command()
def up(
    job: Annotated[str, typer.Argument(help="pretrain or sft.")],
    settings: Settings = None,
    *,
    cloud: CloudOption = "aws",
    run: RunOption = None,
    start_from: Annotated[
        str | None, typer.Option("--from", help="The run that sft starts from.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="tiny, 124m, 350m, 1.2b ….")] = None,
    params: Annotated[str | None, typer.Option(help="Instead of a preset: 700M, 1.2B.")] = None,
    data: Annotated[str | None, typer.Option(help="Documents, or the URL of shards.")] = None,
    tokens: Annotated[str | None, typer.Option(help="How many to train on, such as 10B.")] = None,
    gpu: Annotated[str | None, typer.Option(help="A100:8, H100:1 …. Default: as the task.")] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    ranks: Annotated[int | None, typer.Option(min=1, help="Processes a machine.")] = None,
    region: Annotated[
        str | None, typer.Option(help="Default: the cheapest of one continent.")
    ] = None,
    spot: Annotated[bool, typer.Option("--spot/--on-demand", help="Preemptible machines.")] = True,
    budget: Annotated[str | None, typer.Option(help="Dollars at which the run ends well.")] = None,
    deadline: Annotated[str | None, typer.Option(help="Hours at which it does.")] = None,
    bucket: BucketOption = None,
    allow_dirty: Annotated[
        bool, typer.Option("--allow-dirty", help="Send uncommitted code as it is.")
    ] = False,
    detach: Annotated[
        bool, typer.Option("--detach", help="Start it and leave it to itself.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan, offline, and do nothing.")
    ] = False,
) -> None:
    """Plan, ask once, and train in a cloud until it is done and nothing is left."""
    from launch.request import LaunchRequest
    from launch.session import Choices, run_up

    request = LaunchRequest(
        job=_job(job),
        cloud=cloud.lower(),
        run=run,
        start_from=start_from,
        preset=preset,
        params=params,
        data=data,
        tokens=tokens,
        gpu=gpu,
        nodes=nodes,
        ranks=ranks,
        region=region,
        is_spot=spot,
        budget=budget,
        deadline=deadline,
        bucket=bucket,
        settings=tuple(settings or ()),
    )
    choices = Choices(
        is_dirty_allowed=allow_dirty,
        is_detached=detach,
        is_sure=yes,
        is_dry=dry_run,
    )
    raise typer.Exit(run_up(request, choices, say=print))


@app.command()
def status(run: RunOption = None, *, bucket: BucketOption = None) -> None:
    """What runs, how far it is, what it has cost and will cost."""
    from launch.session import status_text

    print(status_text(_url(run, bucket) if run else None))


@app.command()
def logs(run: RunOption = None, *, bucket: BucketOption = None) -> None:
    """What the job says, until it ends or you press Ctrl-C."""
    from launch import cluster
    from launch.request import cluster_name
    from launch.session import only_run

    name = cluster_name(_url(run, bucket)) if run else only_run()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # also into a pipe
    raise typer.Exit(1 if cluster.tail(name) else 0)


@app.command()
def down(
    run: RunOption = None,
    *,
    bucket: BucketOption = None,
    cloud: CloudOption = "aws",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """End a run's machines (default: those of all runs) and prove that nothing is left."""
    from launch.session import run_down

    raise typer.Exit(run_down(_url(run, bucket) if run else None, cloud, is_sure=yes, say=print))


@app.command()
def begin(run: Annotated[str, typer.Argument(help="The run's URL.")]) -> None:
    """Refuse to begin a run whose machine came too late (on the first node, by LAUNCHED_AT)."""
    from casallm.storage.store import open_store
    from launch.node import require_in_time

    if os.environ.get("SKYPILOT_NODE_RANK", "0") == "0":
        require_in_time(open_store(run), os.environ.get("LAUNCHED_AT", ""), time.time())


@app.command()
def price() -> None:
    """Dollars an hour of the machines that this is run on; nothing where they are unknown."""
    from launch.node import usd_per_hour

    usd = usd_per_hour()
    print("" if usd is None else f"{usd:.6g}")


@app.command()
def notify(
    run: Annotated[str, typer.Argument(help="The run's URL.")],
    *,
    exit_code: Annotated[int, typer.Option(help="How its job ended.")],
) -> None:
    """Tell the webhook in NOTIFY how a run ended (from the first node only)."""
    from launch import node

    url = os.environ.get("NOTIFY", "")
    if not url or os.environ.get("SKYPILOT_NODE_RANK", "0") != "0":
        return
    text = node.ending_text(run, exit_code, _reason(run))
    if text:
        node.notify(url, text)


def _job(name: str) -> "Job":
    from casallm.config import nearest
    from casallm.errors import ConfigError
    from launch.request import JOBS

    for job in JOBS:
        if job == name:
            return job
    raise ConfigError(f"there is no job {name!r}{nearest(name, JOBS)} (jobs: {', '.join(JOBS)})")


def _url(run: str, bucket: str | None) -> str:
    from launch.request import LaunchRequest
    from launch.session import with_account

    return with_account(LaunchRequest(run=run, bucket=bucket)).run_url


def _reason(run: str) -> str | None:
    from casallm.storage.store import open_store
    from launch.progress import read_progress

    try:
        progress = read_progress(open_store(run))
    except CasallmError:
        return None
    usd = f" ({format_usd(progress.usd)})" if progress.usd else ""
    return f"{progress.finished}{usd}" if progress.finished else None
