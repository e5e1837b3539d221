"""The `casallm` command: parse, call one function, print its answer, end with its code.

Nothing heavy is imported before a command needs it: `casallm --help` loads neither torch nor a
cloud library. Answers go to stdout; progress, notices and errors to stderr.
"""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from casallm import __version__
from casallm.cli_estimate import estimate_command
from casallm.errors import CasallmError, CheckpointError

EXIT_AGAIN = 75

app = typer.Typer(
    name="casallm",
    help="Train your own language model, know beforehand what it costs, talk to it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(no_args_is_help=True, help="Look into a data set.", rich_markup_mode=None)
tokenizer_app = typer.Typer(
    no_args_is_help=True, help="Train or try a tokenizer.", rich_markup_mode=None
)
app.add_typer(data_app, name="data")
app.add_typer(tokenizer_app, name="tokenizer")
app.command("estimate")(estimate_command)

RunArgument = Annotated[
    str | None, typer.Argument(help="A run: name, path or URL. Default: the newest under runs/.")
]
Settings = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Any setting, such as optim.lr=3e-4."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


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
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Processes. Default: one per GPU, or one.")
    ] = None,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Resume although the settings differ.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done, and do nothing.")
    ] = False,
) -> None:
    """Train a model on text; the same command continues it, or says that it is finished."""
    from casallm.train.job import plan_text, start
    from casallm.train.pretrain import Request

    request = Request(
        run=run,
        preset=preset,
        params=params,
        data=data,
        tokens=tokens,
        ranks=ranks,
        allow_changes=allow_changes,
        settings=tuple(settings or ()),
    )
    if dry_run:
        print(plan_text(request))
        return
    code, answer = start(request)
    print(answer)
    raise typer.Exit(code)


@app.command()
def sample(
    run: RunArgument = None,
    *,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue; may repeat.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Only the likeliest tokens that reach this.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest continuation.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, another text.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt with the newest good checkpoint of a run."""
    from casallm.train.using import Sampling, sample_run

    prompts = tuple(prompt or ("The",))
    sampling = Sampling(temperature, top_p, max_new_tokens, seed)
    texts = sample_run(_run_url(run), prompts, sampling)
    if as_json:
        _print_json([{"prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)])
        return
    for number, (asked, text) in enumerate(zip(prompts, texts, strict=True)):
        print(("\n" if number else "") + asked + text)
