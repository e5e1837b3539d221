"""README and docs against the code: commands parse, links resolve, the tree is the tree."""

import re
import shlex
from pathlib import Path

import click
import pytest
import typer.main

from casallm.cli import app
from casallm.train.run import PRESETS

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(" ".join(re.findall(r"^([a-z][a-z0-9 -]*):", MAKEFILE, re.MULTILINE)).split())
VARIABLES = set(re.findall(r"^([A-Z]+)\s*\?=", MAKEFILE, re.MULTILINE))


def shell_lines() -> list[tuple[str, str]]:
    """Every command line in a shell block of a page, continuation lines joined."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```(?:sh|bash|console)\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                text = line.split(" #")[0].strip()
                if text and not text.startswith("#"):
                    found.append((page.name, text))
    return found


def casallm_commands() -> list[tuple[str, list[str]]]:
    """The arguments of each casallm command shown."""
    commands = []
    for page, line in shell_lines():
        words = shlex.split(line)
        if words[0].rsplit("/", 1)[-1] == "casallm":
            commands.append((page, words[1:]))
        elif words[1:3] == ["-m", "casallm"]:
            commands.append((page, words[3:]))
    return commands


@pytest.mark.parametrize(("page", "arguments"), casallm_commands())
def test_every_command_shown_is_accepted_by_the_parser(page, arguments):
    command = typer.main.get_command(app)
    context = click.Context(command)
    while isinstance(command, click.Group) and arguments:
        command = command.get_command(context, arguments[0])
        assert command is not None, f"{page}: no command {arguments[0]}"
        arguments = arguments[1:]

    command.make_context(page, list(arguments))


def test_every_make_target_and_variable_shown_exists():
    for page, line in shell_lines():
        words = shlex.split(line)
        if words[0] != "make":
            continue
        for word in words[1:]:
            name, equals, _ = word.partition("=")
            assert (name in VARIABLES) if equals else (name in TARGETS), f"{page}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_resolves(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_tree_in_the_readme_is_the_tree():
    block = re.search(r"## The tree\n\n```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block
    folder = ""
    named = set()
    for line in block[1].splitlines():
        is_inside = line.startswith("  ")
        names = re.match(r"(\S+(?: \S+\.py)*)", line.strip())[1].split()
        folder = folder if is_inside else names[0]
        for name in names:
            path = ROOT / (folder + name if is_inside else name)
            assert path.exists(), path
            named.add(path.name)
    packages = {
        path.name for path in (ROOT / "casallm").iterdir() if (path / "__init__.py").exists()
    }
    assert packages <= named


def test_the_presets_named_in_the_readme_exist():
    for name in re.findall(r"PRESET=(\S+)", (ROOT / "README.md").read_text()):
        assert name in PRESETS
