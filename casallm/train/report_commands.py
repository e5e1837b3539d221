"""The commands that a report ends with: to go on, to try the model, to train it again."""

import shlex

from casallm.config import Tree
from casallm.train.report_data import Command
from casallm.train.run import IDENTITY, try_with

FROM_BASE = ("model", "tokenizer", "train.steps")
"""Settings that a run takes from the run it starts from, or that follow from its data."""


def commands_of(url: str, settings: Tree, *, is_over: bool) -> tuple[Command, ...]:
    """What there is to type about the run at `url`, by what it is for."""
    run, stage = shlex.quote(url), str(settings.get("stage", "pretrain"))
    begin = _begin(stage, settings)
    commands = [] if is_over else [Command("Continue it", f"{begin} --run {run}")]
    return (
        *commands,
        Command("Read what it writes", f"casallm sample {run} {try_with(stage)}"),
        Command("Check every checkpoint", f"casallm verify {run}"),
        Command("Do the same again", _reproduction(begin, url, settings)),
    )


def _begin(stage: str, settings: Tree) -> str:
    base = settings.get("base")
    if not isinstance(base, dict):
        return f"casallm {stage}"
    run, step = base["run"], str(base["checkpoint"]).split("-")[1].lstrip("0")
    return f"casallm {stage} --from {shlex.quote(f'{run}@{step}')}"


def _reproduction(begin: str, url: str, settings: Tree) -> str:
    """A command that trains the same model again: every setting that decides what is computed."""
    sections = {**dict.fromkeys(("data", "tokenizer"), ()), **IDENTITY}
    left_out = FROM_BASE if isinstance(settings.get("base"), dict) else ()
    words = [f"{begin} --run {shlex.quote(f'{url}-again')}"]
    for section, names in sections.items():
        values = settings.get(section)
        if not isinstance(values, dict) or section in left_out:
            continue
        words += [
            shlex.quote(f"{section}.{name}={value}")
            for name, value in values.items()
            if (not names or name in names)
            and f"{section}.{name}" not in left_out
            and str(value) not in ("null", "None", "")
        ]
    return " ".join(words)
