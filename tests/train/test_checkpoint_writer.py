"""Writing checkpoints on this machine; in buckets and under faults: tests/faults."""

import threading
import time
from pathlib import Path

import pytest
import torch

from casallm.errors import AttemptError, StoreError
from casallm.storage.local import LocalStore
from casallm.train.attempts import CheckpointName, claim
from casallm.train.checkpoint import list_checkpoints, newest_good
from casallm.train.journal import EVENTS, read_lines
from casallm.train.retention import remove_checkpoint
from tests.faults.tiny_run import (
    Session,
    content_of,
    is_right,
    model_at,
    optimizer_at,
    sha256_at,
    state_at,
)


@pytest.fixture
def run(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "run")


class Slow(LocalStore):
    """A store that commits a manifest only once it is allowed to."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.may_commit = threading.Event()

    def create(self, name: str, data: bytes) -> None:
        if name.endswith("manifest.json"):
            assert self.may_commit.wait(20)
        super().create(name, data)


def steps(run: LocalStore) -> list[int]:
    return [name.step for name in list_checkpoints(run)]


def test_training_may_change_the_tensors_while_they_are_written(tmp_path: Path):
    run = Slow(tmp_path / "run")
    session = Session(run, tmp_path)
    model = model_at(10)

    session.writer.save(state_at(10), model, optimizer_at(10))
    for tensor in model.values():
        tensor.zero_()
    run.may_commit.set()
    session.writer.wait()

    checkpoint = newest_good(run, tmp_path)
    assert checkpoint is not None
    assert is_right(checkpoint)


def test_one_checkpoint_at_most_is_on_its_way(tmp_path: Path):
    run = Slow(tmp_path / "run")
    session = Session(run, tmp_path, every_steps=10)
    session.step = 10
    assert session.writer.is_due(10)

    session.save()

    assert session.writer.is_busy
    assert not session.writer.is_due(20)
    assert not session.writer.wait(timeout_seconds=0.05)
    assert steps(run) == []
    run.may_commit.set()
    assert session.writer.wait(timeout_seconds=20)
    assert session.writer.is_due(20)
    assert steps(run) == [10]


def test_a_save_waits_for_the_one_before(tmp_path: Path):
    run = Slow(tmp_path / "run")
    session = Session(run, tmp_path)
    session.step = 10
    session.save()
    threading.Timer(0.1, run.may_commit.set).start()

    session.step = 20
    session.save()
    session.writer.wait()

    assert steps(run) == [10, 20]


def test_the_newest_are_kept(run: LocalStore, tmp_path: Path):
    session = Session(run, tmp_path, keep=2)
    seen = []
    for _ in range(4):
        session.train()
        seen.append(steps(run))

    assert seen == [[10], [10, 20], [20, 30], [30, 40]]


def test_a_damaged_checkpoint_does_not_count_among_those_kept(run: LocalStore, tmp_path: Path):
    session = Session(run, tmp_path, keep=3)
    for _ in range(3):
        session.train()
    session = Session(run, tmp_path, keep=3)
    Path(run.url, "checkpoints/step-00000020-a1/state.json").write_bytes(b"")

    session.train()

    assert steps(run) == [10, 20, 30, 40]
    session.train()
    assert steps(run) == [30, 40, 50]


def test_events_tell_what_a_save_cost(run: LocalStore, tmp_path: Path):
    Session(run, tmp_path).train()

    (save,) = (line for line in read_lines(run, 1, EVENTS) if line["kind"] == "save")

    assert save["checkpoint"] == "step-00000010-a1"
    assert save["bytes"] > 0
    assert 0 <= save["stall_seconds"] < save["upload_seconds"] + 5


def test_an_attempt_that_was_overtaken_commits_nothing_more(run: LocalStore, tmp_path: Path):
    session = Session(run, tmp_path)
    session.train()
    claim(run, parent=CheckpointName(10, 1))

    with pytest.raises(AttemptError, match=r"attempt 2 .* leads"):
        session.train()

    assert session.writer.is_fenced
    assert steps(run) == [10]


def test_the_same_step_is_stored_once(run: LocalStore, tmp_path: Path):
    session = Session(run, tmp_path)
    name = session.train()
    content = run.read(f"checkpoints/{name}/manifest.json")

    session.save()
    session.writer.wait()

    assert run.read(f"checkpoints/{name}/manifest.json") == content
    assert session.writer.newest_durable == name


def test_restarted_ranks_replace_a_damaged_checkpoint_of_their_own_step(
    run: LocalStore, tmp_path: Path
):
    session = Session(run, tmp_path)
    for _ in range(2):
        session.train()
    Path(run.url, "checkpoints/step-00000020-a1/state.json").write_bytes(b"")
    restarted = Session(run, tmp_path)
    restarted.attempt = session.attempt
    run.delete("attempts/000002/attempt.json")
    restarted.writer._attempt = session.attempt

    restarted.step = 20
    restarted.save()
    restarted.writer.wait()

    checkpoint = newest_good(run, tmp_path)
    assert checkpoint is not None
    assert checkpoint.name == CheckpointName(20, 1)


def test_what_goes_wrong_is_raised_by_the_next_save_and_older_checkpoints_stay(
    run: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    session = Session(run, tmp_path)
    session.train()
    monkeypatch.setattr("casallm.train.tiers.free_bytes", lambda path: 100)

    session.step = 20
    session.save()
    time.sleep(0.1)

    with pytest.raises(StoreError, match=r"step-00000020-a1 needs .*B and 100 B are free: free"):
        session.save()
    assert steps(run) == [10]
    assert not Path(run.url, "checkpoints/step-00000020-a1").exists()
    monkeypatch.undo()
    session.train()
    assert steps(run)[-1] == session.step


def test_a_checkpoint_can_be_larger_than_one_file(
    run: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("casallm.train.checkpoint_writer.FILE_BYTES", 50)

    Session(run, tmp_path).train()

    checkpoint = newest_good(run, tmp_path)
    assert checkpoint is not None
    assert [path.name for path in checkpoint.paths("model")] == [
        "model-00000.safetensors",
        "model-00001.safetensors",
    ]
    assert is_right(checkpoint)


def test_nothing_but_the_newest_state_is_loaded(run: LocalStore, tmp_path: Path):
    session = Session(run, tmp_path)
    session.train()
    session.train()

    checkpoint = newest_good(run, tmp_path)
    assert checkpoint is not None
    state, model, _ = content_of(checkpoint)

    assert state == state_at(20)
    assert torch.equal(model["norm.weight"], model_at(20)["norm.weight"])
    assert sha256_at(20) != sha256_at(10)


def test_removing_a_checkpoint_takes_the_manifest_first(run: LocalStore, tmp_path: Path):
    Session(run, tmp_path).train()
    deleted = []

    class Recording(LocalStore):
        def delete(self, name: str) -> None:
            deleted.append(name.rpartition("/")[2])
            super().delete(name)

    remove_checkpoint(Recording(Path(run.url)), CheckpointName(10, 1))

    assert deleted == [
        "manifest.json", "model-00000.safetensors", "optim-00000.safetensors", "state.json",
    ]  # fmt: skip
    assert not Path(run.url, "checkpoints").exists()
