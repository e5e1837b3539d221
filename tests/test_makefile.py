"""What `make` hands on of what was typed: nothing is read as make's or the shell's own."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def would_run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`make -n`: the commands, not run."""
    return subprocess.run(
        ["make", "-n", "--no-print-directory", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("budget", ["$1500", "$1,500", "$5", "100"])
@pytest.mark.parametrize("target", [("estimate-cost",), ("pretrain", "CLOUD=aws")])
def test_dollars_arrive_as_they_were_typed(budget: str, target: tuple[str, ...]):
    done = would_run(*target, f"BUDGET={budget}")

    assert f"--budget '{budget}'" in done.stdout


def test_values_with_spaces_stay_one_argument():
    assert "--params '1.2 B'" in would_run("estimate-cost", "PARAMS=1.2 B").stdout
    assert "--run 'runs/my first'" in would_run("pretrain", "RUN=runs/my first").stdout


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
