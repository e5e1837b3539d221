"""Starting again, whoever else is alive."""

import concurrent.futures
from pathlib import Path

import pytest

from casallm.errors import AttemptError
from casallm.storage.local import LocalStore
from casallm.train.attempts import CheckpointName, assert_leading, read_chain
from casallm.train.checkpoint import list_checkpoints
from casallm.train.journal import merged_metrics
from casallm.train.resume import start_attempt
from tests.faults.tiny_run import Session, is_right


@pytest.fixture
def run(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "run")


def test_a_first_start_starts_from_nothing(run: LocalStore, tmp_path: Path):
    attempt, checkpoint = start_attempt(run, tmp_path, world_size=4)

    assert (attempt.number, attempt.parent, checkpoint) == (1, None, None)
    assert attempt.info["world_size"] == 4


def test_a_later_start_continues_from_the_newest_good_checkpoint(run: LocalStore, tmp_path: Path):
    first = Session(run, tmp_path)
    first.train()
    first.train()
    first.journal.metric({"step": 21, "loss": 0.0})

    attempt, checkpoint = start_attempt(run, tmp_path)

    assert checkpoint is not None
    assert attempt.parent == checkpoint.name == CheckpointName(20, 1)
    assert is_right(checkpoint)
    assert [line["step"] for line in merged_metrics(run)] == list(range(1, 21))


def test_a_checkpoint_committed_while_starting_is_where_the_start_begins(
    run: LocalStore, tmp_path: Path
):
    alive = Session(run, tmp_path)
    alive.train()

    class Late(LocalStore):
        def create(self, name: str, data: bytes) -> None:
            if name == "attempts/000002/attempt.json":
                alive.train()
            super().create(name, data)

    attempt, checkpoint = start_attempt(Late(Path(run.url)), tmp_path)

    assert checkpoint is not None
    assert (attempt.number, attempt.parent) == (3, CheckpointName(20, 1))
    assert [link.attempt.number for link in read_chain(run).links] == [3, 1]


def test_of_many_starts_at_once_one_leads_in_the_end(run: LocalStore, tmp_path: Path):
    Session(run, tmp_path).train()

    def start(_: int) -> object:
        try:
            return start_attempt(run, tmp_path)[0]
        except AttemptError:
            return None

    with concurrent.futures.ThreadPoolExecutor(16) as executor:
        attempts = [attempt for attempt in executor.map(start, range(16)) if attempt]

    leading = []
    for attempt in attempts:
        try:
            assert_leading(run, attempt)  # type: ignore[arg-type]
        except AttemptError:
            continue
        leading.append(attempt)
    assert len(leading) == 1


def test_what_was_never_finished_is_deleted_and_what_others_are_writing_is_not(
    run: LocalStore, tmp_path: Path
):
    Session(run, tmp_path).train()
    run.write("checkpoints/step-00000020-a1/model-00000.safetensors", b"half")
    run.write("checkpoints/step-00000020-a9/model-00000.safetensors", b"of a newer attempt")
    Path(run.url, "checkpoints/step-00000010-a1/.x.0123456789ab.partial").touch()

    start_attempt(run, tmp_path)

    assert not Path(run.url, "checkpoints/step-00000020-a1").exists()
    assert Path(run.url, "checkpoints/step-00000020-a9").exists()
    assert not list(Path(run.url).rglob(".*.partial"))
    assert list_checkpoints(run) == [CheckpointName(10, 1)]
