"""What `make` hands on of what was typed: nothing is read as make's or the shell's own."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def would_run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`make -n`: the commands, not run."""
    return subprocess.run(
        ["make", "-n", "--no-print-directory", *arguments],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("variables", "options"),
    [
        ("PARAMS=1.2B", "--params 1.2B"),
        ("PARAMS=-3", "--params -3"),
        ("PARAMS=1.2B CLOUD=local SPOT=1", "--params 1.2B --spot"),
        ("PRESET=350m CLOUD=aws SPOT=0", "--preset 350m --cloud aws --on-demand"),
        (
            "BUDGET=100 DEADLINE=24h REGION=us-east-1 GPU=A100:8 NODES=2 TOKENS=1B",
            "--tokens 1B --gpu A100:8 --nodes 2 --region us-east-1 --budget 100 --deadline 24h",
        ),
    ],
)
def test_make_passes_every_variable_on(variables: str, options: str):
    (asked,) = re.findall(
        r"-m casallm estimate(.*)", would_run("estimate-cost", *variables.split()).stdout
    )

    assert shlex.split(asked) == options.split()


def test_the_guide_names_what_estimate_cost_passes_on():
    guide = (ROOT / "docs/guides/estimate.md").read_text("utf-8")
    told = re.search(r"`make estimate-cost` takes (.*?)\.\n", guide, re.DOTALL)
    names = re.findall(r"^([A-Z]+)\s*\?=", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert told
    assert "PARAMS" in names

    plain = would_run("estimate-cost").stdout.splitlines()[-1]
    asked = {name: would_run("estimate-cost", f"{name}=1") for name in names}

    assert {name: done.stderr for name, done in asked.items() if done.returncode} == {}
    assert set(re.findall(r"`([A-Z]+)(?:=\d)?`", told[1])) == {
        name for name, done in asked.items() if done.stdout.splitlines()[-1] != plain
    }


@pytest.mark.parametrize("budget", ["$1500", "$1,500", "$5", "100"])
@pytest.mark.parametrize("target", [("estimate-cost",), ("pretrain", "CLOUD=aws")])
def test_dollars_arrive_as_they_were_typed(budget: str, target: tuple[str, ...]):
    done = would_run(*target, f"BUDGET={budget}")

    assert f"--budget '{budget}'" in done.stdout


def test_values_with_spaces_stay_one_argument():
    assert "--params '1.2 B'" in would_run("estimate-cost", "PARAMS=1.2 B").stdout
    assert "--run 'runs/my first'" in would_run("pretrain", "RUN=runs/my first").stdout


def test_quotes_arrive_as_they_were_typed():
    (asked,) = re.findall(
        r"-m casallm verify(.*)", would_run("verify", "RUN=runs/it's; $HOME").stdout
    )

    assert shlex.split(asked) == ["runs/it's; $HOME"]


def test_a_run_on_this_machine_takes_its_limits_as_settings():
    done = would_run("pretrain", "BUDGET=5", "DEADLINE=2", "SET=train.compile=off optim.lr=1e-3")

    (command,) = re.findall(r"-m casallm pretrain.*", done.stdout)
    assert command.endswith(
        "'budget.usd=5' 'budget.deadline_hours=2' train.compile=off optim.lr=1e-3"
    )


def test_an_unknown_variable_is_refused():
    done = would_run("estimate-cost", "CONTEXT=4096", "PARAMS=1.2B")

    assert done.returncode != 0
    assert "there is no variable CONTEXT" in done.stderr


def test_spot_is_yes_or_no():
    assert "--on-demand" in would_run("estimate-cost", "SPOT=0").stdout
    assert "--spot" in would_run("estimate-cost", "SPOT=1").stdout
    assert "SPOT is maybe, but must be 1 or 0" in would_run("estimate-cost", "SPOT=maybe").stderr
