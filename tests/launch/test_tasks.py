import json
import os
import subprocess
from pathlib import Path

import pytest
import typer
import yaml

from casallm.cli import app
from casallm.config import build, merge, parse_overrides
from casallm.errors import ConfigError
from launch.tasks import CHECKOUT, Overrides, Place, accelerators_of, load_task, override

JOBS = ("prepare", "pretrain", "sft", "evaluate")
GIVEN = {
    "RUN": "s3://bucket/run",
    "FROM": "s3://bucket/run",
    "DATA": "s3://bucket/documents",
    "OUT": "s3://bucket/shards",
    "PRESET": "350m",
    "TOKENS": "10B",
    "TOKENIZER": "gpt2",
    "VOCAB_SIZE": "40960",
    "RANKS": "2",
    "BUDGET": "100",
    "DEADLINE": "24",
    "SETTINGS": "optim.lr=3e-4 train.seed=7",
}
ONE_NODE = {"SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0", "SKYPILOT_NODE_IPS": "10.0.0.4"}
TWO_NODES = {
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NODE_RANK": "1",
    "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5",
}


def words_of(job: str, home: Path, *, given: dict[str, str], cluster: dict[str, str]) -> list[str]:
    """What the task's own shell lines hand to `python`, in the last command of `run:`."""
    task = load_task(job)
    python = home / "casallm-venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        '#!/bin/bash\n[ "$3" != price ] || { echo 21.96; exit; }\n[ "$2" = casallm ] || exit 0\n'
        'shift 2\nprintf \'%s\\0\' "$@" > "$HOME/words"\n'
    )
    python.chmod(0o755)
    envs = {
        **task["envs"],
        **task["secrets"],
        **{k: v for k, v in given.items() if k in task["envs"]},
    }
    environment = {"HOME": str(home), "PATH": os.environ["PATH"], **envs, **cluster}
    script = home / "sky_app_x"  # as SkyPilot runs it
    script.write_text(task["run"])
    subprocess.run(["bash", script], env=environment, check=True, timeout=30)
    return (home / "words").read_text().rstrip("\0").split("\0")


def parse(words: list[str]) -> dict[str, object]:
    """What the real parser of `casallm` makes of the words, without running the command."""
    group = typer.main.get_command(app)
    context = group.make_context("casallm", list(words))
    name, command, rest = group.resolve_command(context, list(words))
    return command.make_context(name, rest, parent=context).params


@pytest.fixture
def sky(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.setenv("SKYPILOT_DISABLE_USAGE_COLLECTION", "1")
    return pytest.importorskip("sky", reason="skypilot is not installed (extra cloud)")


@pytest.mark.parametrize("job", JOBS)
def test_skypilot_accepts_every_task(job, sky, monkeypatch):
    monkeypatch.chdir(CHECKOUT)
    required = [(name, "x") for name, value in load_task(job)["envs"].items() if value is None]

    task = sky.Task.from_yaml_config(load_task(job), env_overrides=required)

    assert all(resources.autostop_config.down for resources in task.resources)
    assert all(resources.autostop_config.wait_for.name == "JOBS" for resources in task.resources)
    assert all(
        resources.job_recovery["recover_on_exit_codes"] == [75] for resources in task.resources
    )


def test_skypilot_accepts_a_task_that_the_launcher_has_filled_in(sky):
    changes = Overrides(
        name="casallm-x",
        nodes=2,
        is_spot=True,
        places=[Place("aws/us-east-1", "A100:8", 30.0), Place("aws/us-east-2", "H100:8", 60.0)],
        labels={"casallm-run": "casallm-x"},
        envs={"RUN": "s3://bucket/run"},
        secrets={"WANDB_API_KEY": "key"},
    )

    task = sky.Task.from_yaml_config(override(load_task("pretrain"), changes))

    first, second = task.resources
    assert (first.region, second.region) == ("us-east-1", "us-east-2")
    assert first.use_spot
    assert (first.max_hourly_cost, second.max_hourly_cost) == (30.0, 60.0)
    assert first.labels == {"project": "casallm", "casallm-run": "casallm-x"}
    assert task.num_nodes == 2


@pytest.mark.parametrize("job", JOBS)
def test_the_command_of_every_task_is_one_that_the_parser_accepts(job, tmp_path):
    words = words_of(job, tmp_path, given=GIVEN, cluster=ONE_NODE)

    parsed = parse(words)

    assert words[0] == job
    assert "settings" not in parsed or list(parsed["settings"])[-2:] == GIVEN["SETTINGS"].split()


@pytest.mark.parametrize("job", JOBS)
def test_a_running_task_has_removed_the_scripts_that_spell_out_its_secrets(job, tmp_path):
    of_driver = tmp_path / ".sky/sky_app"
    of_driver.mkdir(parents=True)
    for script in (of_driver / "sky_job_7", of_driver / "sky_job_8", tmp_path / "sky_setup_sky-1"):
        script.touch()

    words_of(job, tmp_path, given=GIVEN, cluster={**ONE_NODE, "SKYPILOT_INTERNAL_JOB_ID": "7"})

    assert sorted(path.name for path in tmp_path.rglob("sky_*_*")) == ["sky_job_8"]


def test_defaults_of_a_task_leave_every_choice_to_casallm(tmp_path):
    words = words_of("pretrain", tmp_path, given={"RUN": "s3://b/r"}, cluster=ONE_NODE)

    machine = ["train.notices=aws", "budget.billed_from=boot", "budget.usd_per_hour=21.96"]
    assert words == ["pretrain", "--run", "s3://b/r", *machine]


def test_budget_and_deadline_of_a_task_reach_the_real_configuration(tmp_path):
    from casallm.train.run import RunConfig, load_preset

    words = words_of("pretrain", tmp_path, given=GIVEN, cluster=ONE_NODE)
    settings = parse_overrides(parse(words)["settings"])

    budget = build(RunConfig, merge(load_preset("350m"), settings)).budget

    assert (budget.usd, budget.deadline_hours, budget.usd_per_hour) == (100.0, 24.0, 21.96)
    assert budget.billed_from == "boot"


def test_every_node_of_several_is_told_its_rank_and_the_first_ones_address(tmp_path):
    words = words_of("pretrain", tmp_path, given={"RUN": "s3://b/r"}, cluster=TWO_NODES)

    assert words[1:7] == ["--nodes", "2", "--node-rank", "1", "--master-addr", "10.0.0.4"]


@pytest.mark.parametrize("job", JOBS)
def test_a_task_is_short_and_ends_in_one_command_of_casallm(job):
    lines = load_task(job)["run"].replace("\\\n", " ").splitlines()

    assert len(load_task(job)["run"].splitlines()) <= 10
    assert lines[-1].removeprefix('timeout "${HOURS}h" ').startswith("python -m casallm ")


@pytest.mark.parametrize("job", JOBS)
def test_keys_are_secrets_and_never_envs(job):
    task = load_task(job)

    assert not [name for name in task["envs"] if "KEY" in name or name.endswith("TOKEN")]
    assert set(task["secrets"].values()) == {""}


def test_the_machines_of_a_task_are_gpus_that_the_estimator_knows():
    assert [(gpu.name, count) for gpu, count in accelerators_of(load_task("pretrain"))] == [
        ("A100", 8),
        ("A100-80GB", 8),
        ("H100", 8),
    ]


def test_overriding_changes_no_line_of_setup_or_run():
    task = load_task("pretrain")

    changed = override(task, Overrides(name="x", envs={"RUN": "s3://b/r"}))

    assert (changed["setup"], changed["run"]) == (task["setup"], task["run"])


def test_a_variable_that_a_task_does_not_have_is_refused_by_name():
    with pytest.raises(ConfigError) as refused:
        override(load_task("pretrain"), Overrides(name="x", envs={"TOKEN": "10B"}))

    assert str(refused.value).startswith("the task x has no envs TOKEN, did you mean TOKENS?")


def test_what_the_launcher_fills_in_shows_no_secret_when_printed():
    assert "canary" not in repr(Overrides(name="x", secrets={"HF_TOKEN": "canary"}))


def test_what_goes_to_a_machine_is_the_code_and_not_the_results(tmp_path):
    ignored = (CHECKOUT / ".skyignore").read_text().split("\n")

    assert {"/.git", "/.venv", "/runs", "/data"} <= set(ignored)
    assert "data/" not in ignored  # rsync would leave casallm/data behind


def test_tasks_are_yaml_that_survives_a_round_trip():
    for job in JOBS:
        task = load_task(job)
        assert yaml.safe_load(yaml.safe_dump(task)) == task
        assert json.loads(json.dumps(task)) == task
