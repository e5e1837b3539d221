import json
import logging
import logging.handlers
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from casallm.train.metrics import Line, evaluation_line
from casallm.train.wandb_mirror import (
    MirrorSetup,
    WandbMirror,
    choose_mode,
    mirror_run_id,
    open_mirror,
)
from casallm.train.wandb_process import find_obstacle

LINES: list[Line] = [
    {"step": 10, "tokens": 100, "loss": 3.5, "mfu": None},
    {"step": 20, "tokens": 200, "loss": 3.0, "mfu": None},
    evaluation_line(20, 200, val_loss=3.25),
]


@pytest.fixture(autouse=True)
def _no_account(monkeypatch, tmp_path):
    forget_account(monkeypatch, tmp_path / "home")


def forget_account(patch: pytest.MonkeyPatch, home: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        patch.delenv(name)
    patch.delenv("NETRC", raising=False)
    patch.setenv("HOME", str(home))


@pytest.fixture
def silent_server():
    """The address of a server that takes connections and never says a word."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(50)
        kept: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    kept.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        for connection in kept:
            connection.close()


def mirror(mode: str, directory: Path, **options) -> WandbMirror:
    directory.mkdir(parents=True, exist_ok=True)
    return WandbMirror(
        MirrorSetup(mode, "run-1234", "a run", {"model": {"d_model": 8}}, str(directory), **options)
    )


def records(directory: Path) -> list:
    """Everything in the one `.wandb` file beneath `directory`, read by wandb's own reader."""
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    (path,) = directory.glob("wandb/*run-*/run-*.wandb")
    store = DataStore()
    store.open_for_scan(str(path))
    found = []
    while (data := store.scan_data()) is not None:
        record = Record()
        record.ParseFromString(data)
        found.append(record)
    return found


def history(found: list) -> list[dict]:
    rows = [record.history for record in found if record.HasField("history")]
    lines = [
        {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in r.item} for r in rows
    ]
    return [{k: v for k, v in line.items() if not k.startswith("_")} for line in lines]


@dataclass
class Mirrored:
    directory: Path
    said: list[str]


@pytest.fixture(scope="module")
def offline_run(tmp_path_factory):
    """One run of somebody without an account, told all LINES, in a home of its own."""
    directory = tmp_path_factory.mktemp("offline")
    heard = logging.handlers.BufferingHandler(100)
    logger = logging.getLogger("casallm.train.wandb_mirror")
    level = logger.level
    logger.addHandler(heard)
    logger.setLevel(logging.INFO)
    with pytest.MonkeyPatch.context() as patch:
        forget_account(patch, directory / "home")
        with_wandb = mirror("auto", directory / "scratch")
        for line in LINES:
            with_wandb.log(line)
        with_wandb.close(120)
    logger.removeHandler(heard)
    logger.setLevel(level)
    return Mirrored(directory / "scratch", [record.getMessage() for record in heard.buffer])


def test_without_an_account_files_are_kept_and_no_question_is_asked(offline_run):
    assert offline_run.said == [
        "wandb is offline, no key was found (set WANDB_API_KEY, or run `wandb login`): its files"
        f" are in {offline_run.directory}"
    ]


def test_an_offline_run_holds_every_line_under_the_given_id(offline_run):
    found = records(offline_run.directory)
    run = next(record.run for record in found if record.HasField("run"))

    assert history(found) == LINES
    assert (run.run_id, run.display_name, run.project) == ("run-1234", "a run", "casallm")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["model"] == {"d_model": 8}


def test_every_metric_is_drawn_over_the_step(offline_run):
    metrics = [
        record.metric for record in records(offline_run.directory) if record.HasField("metric")
    ]

    assert "step" in {metric.name for metric in metrics}
    assert ("*", "step") in {(metric.glob_name, metric.step_metric) for metric in metrics}


def test_nothing_is_written_outside_the_given_directory(offline_run):
    assert not (offline_run.directory.parent / "home").exists()


def test_the_command_line_is_not_recorded(offline_run):
    files = [path for path in offline_run.directory.rglob("*") if path.is_file()]

    assert files
    assert not any(b"wandb_process" in path.read_bytes() for path in files)


@pytest.mark.slow
def test_online_without_a_route_becomes_offline_with_one_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
    with_wandb = mirror("online", tmp_path)
    with_wandb.log(LINES[0])
    with_wandb.close(120)
    said = list(caplog.messages)

    assert history(records(tmp_path)) == LINES[:1]
    assert said == [f"wandb is offline, 127.0.0.1 does not answer: its files are in {tmp_path}"]


def test_a_server_that_never_answers_is_given_up_in_seconds(silent_server):
    started = time.monotonic()

    obstacle = find_obstacle({"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": silent_server})

    assert obstacle == "127.0.0.1 does not answer"
    assert time.monotonic() - started < 30


def test_a_key_in_netrc_is_a_key(tmp_path):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine example.test login user password " + "a" * 40 + "\n")

    with_key = {"NETRC": str(netrc), "WANDB_BASE_URL": "http://example.test:1"}
    without = {"NETRC": str(netrc), "WANDB_BASE_URL": "http://other.test:1"}

    assert find_obstacle(with_key) == "example.test does not answer"
    assert str(find_obstacle(without)).startswith("no key was found")


@pytest.mark.slow
def test_a_wandb_that_hangs_at_its_start_is_killed_and_training_hears_of_it(
    tmp_path, monkeypatch, caplog
):
    stub = tmp_path / "stub" / "wandb"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stub"))
    started = time.monotonic()

    with_wandb = mirror("offline", tmp_path / "scratch", start_seconds=1.0)
    with_wandb.log(LINES[0])
    with_wandb.close(120)

    assert time.monotonic() - started < 60  # 2 s on an idle machine; the stub sleeps for 600
    assert caplog.messages == [
        "wandb did not start in time: metrics are no longer mirrored, metrics.jsonl has them all"
    ]


def test_closing_does_not_wait_for_a_wandb_that_hangs(tmp_path, monkeypatch, caplog):
    stub = tmp_path / "stub" / "wandb"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stub"))
    with_wandb = mirror("offline", tmp_path / "scratch")
    started = time.monotonic()

    for step in range(20_000):  # far more than a pipe holds
        with_wandb.log({"step": step, "loss": 1.0})
    queued = time.monotonic() - started
    with_wandb.close(0.5)

    assert queued < 20  # 0.1 s on an idle machine; a pipe would wait for 600
    assert time.monotonic() - started < 60
    assert caplog.messages == [
        "wandb did not finish in 0 s and was left: metrics.jsonl has everything"
    ]


def test_a_broken_wandb_costs_one_warning(tmp_path, monkeypatch, caplog):
    stub = tmp_path / "stub" / "wandb"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text("raise RuntimeError('broken')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stub"))
    with_wandb = mirror("offline", tmp_path / "scratch")

    for line in LINES:
        with_wandb.log(line)
    with_wandb.close(120)
    with_wandb.log(LINES[0])

    assert caplog.messages == [
        f"wandb failed ({tmp_path}/scratch/mirror.log says how): metrics are no longer mirrored,"
        " metrics.jsonl has them all"
    ]
    assert "RuntimeError: broken" in (tmp_path / "scratch" / "mirror.log").read_text()


def test_a_missing_wandb_is_no_reason_to_warn(tmp_path, monkeypatch, caplog):
    stub = tmp_path / "stub" / "wandb"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text("raise ModuleNotFoundError('wandb')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stub"))
    caplog.set_level(logging.INFO)
    with_wandb = mirror("auto", tmp_path / "scratch")

    with_wandb.log(LINES[0])
    with_wandb.close(120)

    assert caplog.messages[-1] == "metrics are not mirrored: wandb is not installed"
    assert caplog.records[-1].levelno == logging.INFO


@pytest.mark.slow
def test_a_trainer_that_is_killed_leaves_no_process_behind_and_loses_no_line(tmp_path):
    trainer = (
        "import os, signal, time; from pathlib import Path\n"
        "from casallm.train.wandb_mirror import MirrorSetup, WandbMirror\n"
        f"m = WandbMirror(MirrorSetup('offline', 'run-1', 'r', {{}}, {str(tmp_path)!r}))\n"
        "m.log({'step': 1, 'loss': 2.0}); print(m._process.pid, flush=True); time.sleep(1)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", trainer], capture_output=True, text=True, check=False
    )
    group = int(ran.stdout)

    assert ran.returncode == -signal.SIGKILL
    assert becomes_true(lambda: not is_alive(group), seconds=120)
    assert history(records(tmp_path)) == [{"step": 1, "loss": 2.0}]


def is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def becomes_true(condition, *, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize(
    ("setting", "environment", "mode"),
    [
        ("auto", {}, "auto"),
        ("auto", {"WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_MODE": "online"}, "online"),
        ("auto", {"WANDB_MODE": "disabled"}, "off"),
        ("online", {"WANDB_MODE": "disabled"}, "off"),
        ("online", {"WANDB_MODE": "offline"}, "online"),
        ("online", {"WANDB_DISABLED": "true"}, "off"),
        ("off", {"WANDB_MODE": "online"}, "off"),
        ("offline", {}, "offline"),
    ],
)
def test_the_setting_and_wandb_own_variables_together_choose_the_mode(setting, environment, mode):
    assert choose_mode(setting, environment) == mode


def test_turned_off_nothing_is_started(tmp_path):
    directory = tmp_path / "scratch"

    assert open_mirror("off", run_id="r", name="r", config={}, directory=directory) is None
    assert not directory.exists()


def test_a_directory_that_cannot_be_made_costs_one_warning(tmp_path, caplog):
    (tmp_path / "file").touch()

    opened = open_mirror("auto", run_id="r", name="r", config={}, directory=tmp_path / "file" / "x")

    assert opened is None
    assert caplog.messages[0].startswith("metrics are not mirrored to wandb (")


def test_the_id_is_that_of_the_run_not_of_the_attempt():
    first = mirror_run_id("s3://bucket/a run", "2026-11-22T08:00:00+00:00")

    assert first == mirror_run_id("s3://bucket/a run", "2026-11-22T08:00:00+00:00")
    assert first != mirror_run_id("s3://bucket/a run", "2026-11-23T08:00:00+00:00")
    assert first.startswith("s3-bucket-a-run-")
