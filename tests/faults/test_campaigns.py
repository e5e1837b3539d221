"""The campaigns of `make chaos` in short, and proof that they notice what they are there for."""

from pathlib import Path

import pytest
import torch

from casallm.storage.store import Store
from casallm.train import checkpoint_writer
from casallm.train.attempts import Attempt, CheckpointName, claim, list_committed
from casallm.train.checkpoint import newest_good
from casallm.train.retention import apply_retention, remove_checkpoint
from tests.faults import tiny_run
from tests.faults.campaigns import (
    bit_flips,
    claim_race,
    commit_protocol,
    interleaving,
    kill_while_saving,
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_no_fault_at_any_store_call_loses_or_changes_a_checkpoint(memory_path: Path):
    result = commit_protocol(120, seed=1, directory=memory_path)

    assert result.broken == []
    assert len(result.details) == 7


def test_no_interleaving_of_processes_loses_or_changes_a_checkpoint(memory_path: Path):
    assert interleaving(60, seed=1, directory=memory_path).broken == []


def test_every_flipped_bit_of_a_checkpoint_is_noticed(memory_path: Path):
    result = bit_flips(100, seed=1, directory=memory_path)

    assert result.broken == []
    assert sorted(result.details) == [
        "manifest.json", "model-00000.safetensors", "optim-00000.safetensors", "state.json",
    ]  # fmt: skip


def test_a_kill_while_saving_loses_nothing_that_was_durable(memory_path: Path):
    result = kill_while_saving(10, seed=1, directory=memory_path)

    assert result.broken == []
    assert result.details["steps"] > 0


def test_one_of_sixteen_starts_wins(memory_path: Path):
    assert claim_race(5, seed=1, directory=memory_path).broken == []


def keep_one(
    run: Store, attempt: Attempt, keep: int, verified: set[CheckpointName]
) -> list[CheckpointName]:
    return apply_retention(run, attempt, 1, verified)


def delete_by_age(run: Store, attempt: Attempt, keep: int, verified: object) -> None:
    for name in list_committed(run)[:-keep]:
        remove_checkpoint(run, name)


def start_without_looking_again(run: Store, scratch: Path) -> tuple[Attempt, object]:
    checkpoint = newest_good(run, scratch)
    return claim(run, parent=checkpoint.name if checkpoint else None), checkpoint


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "name", "mistake"),
    [
        (checkpoint_writer, "apply_retention", keep_one),
        (checkpoint_writer, "apply_retention", delete_by_age),
        (tiny_run, "start_attempt", start_without_looking_again),
    ],
)
def test_the_campaigns_notice_a_broken_protocol(
    memory_path: Path, monkeypatch: pytest.MonkeyPatch, module: object, name: str, mistake: object
):
    monkeypatch.setattr(module, name, mistake)

    result = interleaving(400, seed=5, directory=memory_path)

    assert result.broken
