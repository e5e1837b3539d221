import socket
from pathlib import Path

import pytest

from casallm.errors import AttemptError
from casallm.storage.local import LocalStore
from casallm.train.attempts import CheckpointName, claim
from casallm.train.status import finish, list_runs, read_finished, read_status
from tests.faults.tiny_run import Session


@pytest.fixture
def run(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "runs" / "a")


def test_a_finished_run_says_why(run: LocalStore, tmp_path: Path):
    session = Session(run, tmp_path)
    session.train()
    assert read_finished(run) is None

    finish(run, session.attempt, step=10, reason="all 10 steps are done")

    record = read_finished(run)
    assert record is not None
    assert (record["attempt"], record["step"]) == (1, 10)
    status = read_status(run)
    assert (status.state, status.step, status.reason) == ("finished", 10, "all 10 steps are done")


def test_only_the_leader_finishes_a_run_and_the_overtaken_is_ignored(
    run: LocalStore, tmp_path: Path
):
    first = Session(run, tmp_path)
    first.train()
    run.write("finished.json", b'{"attempt":1,"step":30,"reason":"zombie"}')
    assert read_finished(run) is not None
    second = claim(run, parent=CheckpointName(10, 1))

    assert read_finished(run) is None
    with pytest.raises(AttemptError):
        finish(run, first.attempt, step=30, reason="zombie")
    finish(run, second, step=40, reason="done")
    finish(run, second, step=40, reason="done again")

    record = read_finished(run)
    assert record is not None
    assert record["reason"] == "done"


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"attempt":"x","step":1}', b"{"])
def test_a_torn_record_is_none(run: LocalStore, content: bytes):
    claim(run, parent=None)
    run.write("finished.json", content)

    assert read_finished(run) is None


def test_runs_are_listed_with_state_step_dollars_and_checkpoint(run: LocalStore, tmp_path: Path):
    session = Session(run, tmp_path)
    session.train()
    session.journal.metric({"step": 11, "loss": 1.0, "usd": 2.5})
    other = LocalStore(tmp_path / "runs" / "b")
    stopped = Session(other, tmp_path)
    stopped.journal.event("end", reason="a notice")
    Path(tmp_path, "runs", "no-run").mkdir()

    running, ended = list_runs(LocalStore(tmp_path / "runs"))

    assert (running.url, running.state, running.step) == (run.url, "running", 11)
    assert (running.usd, running.checkpoint, running.attempts) == (2.5, "step-00000010-a1", 1)
    assert (ended.url, ended.state, ended.reason) == (other.url, "stopped", "a notice")
    assert (ended.step, ended.usd, ended.checkpoint) == (0, 0.0, None)


def test_a_run_whose_process_died_on_this_machine_is_stopped(
    run: LocalStore, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("casallm.train.attempts.os.getpid", lambda: 2**22 + 1)
    claim(run, parent=None)
    assert read_status(run).state == "stopped"

    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    assert read_status(run).state == "running"
