"""The `casallm` command: parse, call one function, print its answer, end with its code.

Nothing heavy is imported before a command needs it: `casallm --help` loads neither torch nor a
cloud library. Answers go to stdout; progress, notices and errors to stderr.
"""

import contextlib
import io
import logging
import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from casallm import __version__
from casallm.cli_data import data_app, prepare_command, tokenizer_app
from casallm.cli_estimate import estimate_command
from casallm.cli_output import AsJson, new_table, print_json, print_table
from casallm.config import build
from casallm.errors import CasallmError, ConfigError

if TYPE_CHECKING:
    from casallm.train.dialogue import Dialogue
    from casallm.train.nodes import Place
    from casallm.train.stage import Request

app = typer.Typer(
    name="casallm",
    help="Train your own language model, know beforehand what it costs, talk to it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(data_app, name="data")
app.add_typer(tokenizer_app, name="tokenizer")
app.command("estimate")(estimate_command)
app.command("prepare")(prepare_command)

RunArgument = Annotated[
    str | None, typer.Argument(help="A run: name, path or URL. Default: the newest under runs/.")
]
Settings = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Any setting, such as optim.lr=3e-4."),
]
Ranks = Annotated[int | None, typer.Option(min=1, help="Processes. Default: one per GPU, or one.")]
Nodes = Annotated[int, typer.Option(min=1, help="Machines that train together.")]
NodeRank = Annotated[int, typer.Option(min=0, help="Which of them this one is.")]
MasterAddress = Annotated[str, typer.Option(help="Address of node 0.")]
AllowChanges = Annotated[
    bool, typer.Option("--allow-changes", help="Resume although the settings differ.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and do nothing.")]


def main() -> None:
    """Run the command line; errors a person can fix become one sentence and an exit code."""
    is_debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("casallm").setLevel(logging.DEBUG if is_debug else logging.INFO)
    try:
        code = app(arguments, standalone_mode=True)
    except CasallmError as error:
        if is_debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    raise SystemExit(code)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def pretrain(
    settings: Settings = None,
    *,
    run: Annotated[
        str | None, typer.Option(help="Name, path or URL. Default: runs/<preset>-<data>.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="tiny, 124m, 350m, 350m-modern or 1.2b. Default: what fits.")
    ] = None,
    params: Annotated[
        str | None, typer.Option(help="Instead of a preset: a size, such as 700M.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Documents or shards. Default: the built-in corpus.")
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="How many tokens to train on, such as 10B.")
    ] = None,
    ranks: Ranks = None,
    nodes: Nodes = 1,
    node_rank: NodeRank = 0,
    master_addr: MasterAddress = "127.0.0.1",
    allow_changes: AllowChanges = False,
    dry_run: DryRun = False,
) -> None:
    """Train a model on text; the same command continues it, or says that it is finished."""
    from casallm.train.pretrain import PretrainRequest
    from casallm.train.stage import Start

    start = Start(
        run=run,
        ranks=ranks,
        allow_changes=allow_changes,
        place=_place(node_rank, nodes, master_addr),
        settings=tuple(settings or ()),
    )
    request = PretrainRequest(start, preset=preset, params=params, data=data, tokens=tokens)
    _train(request, dry_run=dry_run)


@app.command()
def sft(
    settings: Settings = None,
    *,
    start_from: Annotated[
        str | None,
        typer.Option(
            "--from", help="RUN or RUN@STEP. Default: the newest finished pretraining run here."
        ),
    ] = None,
    run: Annotated[
        str | None, typer.Option(help="Name, path or URL. Default: the run it starts from, -sft.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="A recipe: a YAML file, reference or offline.")
    ] = None,
    ranks: Ranks = None,
    nodes: Nodes = 1,
    node_rank: NodeRank = 0,
    master_addr: MasterAddress = "127.0.0.1",
    allow_changes: AllowChanges = False,
    dry_run: DryRun = False,
) -> None:
    """Make an assistant of a pretrained run; the same command continues it."""
    from casallm.train.sft import SftRequest
    from casallm.train.stage import Start

    start = Start(
        run=run,
        ranks=ranks,
        allow_changes=allow_changes,
        place=_place(node_rank, nodes, master_addr),
        settings=tuple(settings or ()),
    )
    _train(SftRequest(start, start_from=start_from, data=data), dry_run=dry_run)


@app.command()
def sample(
    run: RunArgument = None,
    *,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue; may repeat.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Only the likeliest tokens that reach this.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest continuation.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, another text.")] = 0,
    is_chat: Annotated[
        bool,
        typer.Option("--chat", help="Answer each prompt; without one, talk until Ctrl-D."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt, answer it, or talk, with the newest good checkpoint of a run."""
    from casallm.inference.sampling import SamplingConfig
    from casallm.storage.store import open_store
    from casallm.train.dialogue import Dialogue
    from casallm.train.run_place import run_url
    from casallm.train.trained import answer_prompts, continue_prompts, load_trained

    sampling = build(SamplingConfig, {"temperature": temperature, "top_p": top_p, "seed": seed})
    store = open_store(run_url(run))
    if is_chat and not prompt:
        if as_json:
            raise ConfigError("--chat --json answers prompts: add --prompt")
        _talk(Dialogue(load_trained(store), max_new_tokens=max_new_tokens, sampling=sampling))
        return
    prompts = prompt or ["The"]
    reply = answer_prompts if is_chat else continue_prompts
    texts = reply(store, prompts, max_new_tokens=max_new_tokens, sampling=sampling)
    pairs = list(zip(prompts, texts, strict=True))
    if as_json:
        print_json([{"prompt": asked, "text": text} for asked, text in pairs])
        return
    print("\n\n".join(text if is_chat else asked + text for asked, text in pairs))


@app.command()
def runs(
    place: Annotated[str, typer.Argument(help="A directory or bucket of runs.")] = "runs",
    *,
    as_json: AsJson = False,
) -> None:
    """List runs: state, step, dollars, newest checkpoint."""
    from casallm.storage.store import open_store
    from casallm.train.status import list_runs

    found = list_runs(open_store(place))
    if as_json:
        print_json([asdict(status) for status in found])
        return
    if not found:
        print(f"there are no runs in {place}")
        return
    table = new_table("run", "state", "step", "attempts", "usd", "newest checkpoint", "reason")
    for status in found:
        usd = f"{status.usd:.2f}" if status.usd else "-"
        checkpoint = status.checkpoint or "-"
        table.add_row(
            status.url,
            status.state,
            f"{status.step:,}",
            str(status.attempts),
            usd,
            checkpoint,
            status.reason,
        )
    print_table(table)


@app.command()
def verify(run: RunArgument = None, *, as_json: AsJson = False) -> None:
    """Check every checkpoint of a run to the last byte; ends with 1 if one is bad."""
    from casallm.storage.store import open_store
    from casallm.train.checkpoint import verify_run
    from casallm.train.run import load_config
    from casallm.train.run_place import run_url, scratch_of

    store = open_store(run_url(run))
    load_config(store)
    result = verify_run(store, scratch_of(store))
    if as_json:
        print_json(result)
    else:
        for checkpoint in result["checkpoints"]:
            verdict = "ok" if checkpoint["ok"] else "; ".join(checkpoint["problems"])
            print(f"{checkpoint['name']}  {verdict}")
        print(f"newest good: {result['newest_good'] or 'none'}")
        print(f"weights sha256: {result['weights_sha256'] or '-'}")
    raise typer.Exit(0 if all(each["ok"] for each in result["checkpoints"]) else 1)


@app.command()
def evaluate(run: RunArgument = None, *, as_json: AsJson = False) -> None:
    """Hold a run against all that was held out; an assistant in fixed chats too."""
    from casallm.storage.store import open_store
    from casallm.train.held_out import NAME, evaluate_run
    from casallm.train.run_place import run_url

    store = open_store(run_url(run))
    scores = evaluate_run(store)
    if as_json:
        print_json(scores)
        return
    print(f"{scores['checkpoint']} on all that was held out")
    print(f"loss {scores['val_loss']:.4f} nats a token, {scores['val_bpb']:.4f} bits a byte")
    for source, loss in scores["val_loss_by_source"].items():
        print(f"  {source}: {loss:.4f}")
    for name, share in scores.get("chat", {}).items():
        print(f"{name.replace('_', ' ')}: {share:.0%}")
    print(f"kept in {store.url}/{NAME}")


@app.command()
def report(run: RunArgument = None) -> None:
    """Write report.html, report.md and plots/ of a run, at whatever point it is."""
    from casallm.storage.store import open_store
    from casallm.train.report import write_report
    from casallm.train.run_place import run_url

    store = open_store(run_url(run))
    write_report(store)
    print(f"{store.url}/report.html")


def _talk(dialogue: "Dialogue") -> None:
    """Answer what a person types, or each line of a pipe, until its end or Ctrl-C."""
    is_person = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if is_person:
        import readline  # noqa: F401 - lets `input` edit the line and remember earlier ones
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            text = input("> " if is_person else "").strip()
            try:
                for piece in dialogue.answer(text) if text else ():
                    print(piece, end="", flush=True)
            except ConfigError as error:
                print(f"error: {error}", file=sys.stderr)
            print(end="\n" if text else "")
    print(end="\n" if is_person else "")


def _place(node_rank: int, nodes: int, master_addr: str) -> "Place":
    from casallm.train.nodes import Place

    if node_rank >= nodes:
        raise ConfigError(f"--node-rank is {node_rank}, but --nodes {nodes} are counted from 0")
    return Place(node_rank, nodes, master_addr)


def _train(request: "Request", *, dry_run: bool) -> None:
    """Start or continue what `request` asks for, and end with its exit code."""
    from casallm.train.job import plan_text, start

    if dry_run:
        print(plan_text(request))
        return
    code, answer = start(request)
    if answer:
        print(answer)
    raise typer.Exit(code)
