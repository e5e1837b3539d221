"""Runs in a bucket while networks, disks, machines and other starts misbehave.

The numbers are those of the scenarios in the project's list of faults.
"""

import concurrent.futures
import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from casallm.errors import AttemptError, StoreError
from casallm.storage.local import LocalStore
from casallm.storage.remote import RemoteStore
from casallm.storage.s3 import S3Bucket
from casallm.storage.store import Store
from casallm.train.attempts import CheckpointName, attempt_numbers
from casallm.train.checkpoint import (
    find_problems,
    list_checkpoints,
    newest_good,
    verify_run,
)
from casallm.train.journal import METRICS, merged_metrics, read_lines
from casallm.train.resume import start_attempt
from tests.faults.fixtures import Bucket
from tests.faults.tiny_run import Session, is_right, sha256_at
from tests.faults.worker import FENCED, durable_step, start_in_bucket, wait_for_progress


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def steps(run: Store) -> list[int]:
    return [name.step for name in list_checkpoints(run)]


def good_step(run: Store, scratch: Path) -> int:
    checkpoint = newest_good(run, scratch)
    assert checkpoint is not None
    assert is_right(checkpoint)
    return checkpoint.name.step


def fetched(bucket: Bucket) -> list[str]:
    """The tensor files that were downloaded."""
    return [
        path
        for method, path, _ in bucket.proxy.requests
        if method == "GET" and path.endswith(".safetensors")
    ]


def train_often(session: Session) -> None:
    for _ in range(20):
        session.train()


@pytest.fixture
def small_drive(tmp_path: Path) -> Iterator[Path]:
    """A drive of 256 KB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small drive needs root")
    drive = tmp_path / "drive"
    drive.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(drive)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine allows no mounts")
    yield drive
    subprocess.run(["umount", str(drive)], check=True)


def test_another_machine_continues_where_a_lost_one_was(s3: Bucket, memory_path: Path):
    """Scenarios 2 and 3."""
    session = Session(s3.store(), memory_path / "lost")
    session.train()
    session.train()

    successor = Session(s3.store(), memory_path / "new")

    assert successor.start is not None
    assert (successor.attempt.number, successor.start.name) == (2, CheckpointName(20, 1))
    assert is_right(successor.start)
    successor.train()
    report = verify_run(s3.store(), memory_path)
    assert report["weights_sha256"] == sha256_at(30)
    assert [line["step"] for line in merged_metrics(s3.store())] == list(range(1, 31))


def test_the_local_tier_saves_the_download_and_is_never_trusted(s3: Bucket, memory_path: Path):
    session = Session(s3.store(), memory_path)
    session.train()
    assert [path.name for path in (memory_path / "checkpoints").iterdir()] == ["step-00000010-a1"]

    s3.proxy.requests.clear()
    assert good_step(s3.store(), memory_path) == 10
    assert fetched(s3) == []
    (memory_path / "checkpoints/step-00000010-a1/model-00000.safetensors").write_bytes(b"?")
    assert good_step(s3.store(), memory_path) == 10
    assert len(fetched(s3)) == 1


@pytest.mark.parametrize("moment", ["partNumber=2", "uploadId=", "manifest.json", "DELETE"])
def test_a_kill_while_saving_uploading_committing_or_deleting_loses_nothing(
    s3: Bucket, memory_path: Path, moment: str
):
    """Scenarios 5, 7 and 8: the process is killed by its own request, which is not answered."""
    worker = start_in_bucket(s3.name, s3.proxy.url, memory_path / "a", memory_path / "progress")
    wait_for_progress(worker, memory_path / "progress")
    wait_for_progress(worker, memory_path / "progress")

    def decide(method: str, path: str) -> str | None:
        if moment in (method, "DELETE") and method != moment:
            return None
        if method in ("PUT", "POST", "DELETE") and (moment in path or moment == method):
            os.kill(worker.pid or 0, signal.SIGKILL)
            return "reset"
        return None

    s3.proxy.decide = decide
    worker.join(60)
    promised = durable_step(memory_path / "progress")
    s3.proxy.behave()

    assert worker.exitcode == -signal.SIGKILL
    assert good_step(s3.direct(), memory_path / "b") >= promised
    assert len(steps(s3.direct())) >= 2
    session = Session(s3.store(), memory_path / "b")
    assert session.step >= promised
    assert s3.open_uploads() == []
    session.train()
    report = verify_run(s3.direct(), memory_path / "c")
    assert all(checkpoint["ok"] for checkpoint in report["checkpoints"])
    folders = {key.split("/")[2] for key in s3.names() if "/checkpoints/" in key}
    assert folders == {checkpoint["name"] for checkpoint in report["checkpoints"]}


@pytest.mark.parametrize("fault", ["503", "reset", "lost_ack", "truncate"])
def test_a_bad_network_makes_saving_slower_and_nothing_else(
    s3: Bucket, memory_path: Path, fault: str
):
    """Scenarios 15 and 17."""
    s3.proxy.at_random(fault, 0.3)
    session = Session(s3.store(), memory_path)
    for _ in range(3):
        session.train()
    s3.proxy.behave()

    assert steps(s3.direct()) == [20, 30]
    assert good_step(s3.direct(), memory_path / "elsewhere") == 30


def test_bits_flipped_on_the_way_change_nothing(s3: Bucket, memory_path: Path):
    """Scenario 11."""
    session = Session(s3.store(), memory_path)
    session.train()
    flips = iter([True, False, False, True, False, False, False] * 100)
    s3.proxy.decide = lambda method, path: (
        "flip" if method == "GET" and ".safetensors" in path and next(flips) else None
    )

    for number in range(3):
        assert good_step(s3.store(), memory_path / f"{number}") == 10
    assert any(fault == "flip" for _, _, fault in s3.proxy.requests)


def test_a_lost_answer_to_the_commit_is_a_commit(s3: Bucket, memory_path: Path):
    """Scenario 17."""
    session = Session(s3.store(), memory_path)
    session.train()
    lost = iter([True, True, True])
    s3.proxy.decide = lambda method, path: (
        "lost_ack" if method == "PUT" and "manifest.json" in path and next(lost, False) else None
    )

    assert session.train() == CheckpointName(20, 1)
    assert steps(s3.direct()) == [10, 20]


def test_training_goes_on_while_the_store_is_down_and_says_how_old_the_last_save_is(
    s3: Bucket, memory_path: Path, caplog: pytest.LogCaptureFixture
):
    """Scenario 16."""
    session = Session(s3.store(), memory_path)
    session.train()
    s3.proxy.at_random("reset", 1.0)

    for step in (20, 30):
        session.step = step
        session.save()
        concurrent.futures.wait([session.writer._job])  # type: ignore[list-item]
    session.step = 40
    s3.proxy.behave()
    session.save()
    session.writer.wait()

    assert steps(s3.direct()) == [10, 40]
    warnings = [r.getMessage() for r in caplog.records if "did not reach" in r.getMessage()]
    assert len(warnings) == 2
    assert "training goes on, and the newest safe state (step-00000010-a1) is" in warnings[0]


def test_a_last_save_that_cannot_reach_the_store_is_an_error(s3: Bucket, memory_path: Path):
    session = Session(s3.store(), memory_path)
    s3.proxy.at_random("reset", 1.0)
    session.step = 10
    session.save()

    with pytest.raises(StoreError, match=r"failed 8 times .* check the network and the service"):
        session.writer.wait()


def test_expired_credentials_are_named_and_training_goes_on(
    s3: Bucket, memory_path: Path, caplog: pytest.LogCaptureFixture
):
    """Scenario 19."""
    session = Session(s3.store(), memory_path)
    session.train()
    s3.proxy.at_random("403", 1.0)

    session.step = 20
    session.save()
    concurrent.futures.wait([session.writer._job])  # type: ignore[list-item]
    session.step = 30
    session.save()

    assert "renew the credentials from the variables AWS_ACCESS_KEY_ID and" in caplog.text
    assert "testtest" not in caplog.text
    s3.proxy.behave()


def test_a_save_does_not_wait_for_a_slow_store(s3: Bucket, memory_path: Path):
    """Scenario 15: what training waits for is the copy."""
    session = Session(s3.store(), memory_path)
    session.train()
    s3.proxy.at_random("slow", 1.0)

    session.step = 20
    begin = time.monotonic()
    session.save()
    stall_seconds = time.monotonic() - begin

    assert stall_seconds < 0.9
    assert session.writer.is_busy
    s3.proxy.behave()
    session.writer.wait()


def test_a_full_drive_leaves_out_the_local_tier(
    s3: Bucket, small_drive: Path, memory_path: Path, caplog: pytest.LogCaptureFixture
):
    """Scenario 20, of a run in a bucket."""
    session = Session(s3.store(), small_drive)
    with contextlib.suppress(OSError), (small_drive / "other").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))

    session.train()

    assert "goes to s3://" in caplog.text
    assert "without a copy on this machine" in caplog.text
    assert " and 0 B are free: free some space" in caplog.text
    assert good_step(s3.direct(), memory_path) == 10
    assert not (small_drive / "checkpoints").exists()


def test_a_full_drive_stops_a_local_run_with_its_checkpoints_whole(
    small_drive: Path, tmp_path: Path
):
    """Scenario 20, of a run on this machine."""
    run = LocalStore(small_drive / "run")
    session = Session(run, tmp_path)
    session.train()
    (small_drive / "other").write_bytes(bytes(220_000))

    with pytest.raises(StoreError, match=r"free some space"):
        train_often(session)

    assert good_step(run, tmp_path) >= 10
    assert verify_run(run, tmp_path)["newest_good"] is not None


def test_damage_at_rest_is_found_and_an_older_checkpoint_used(
    s3_on_disk: tuple[Bucket, Path], memory_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Scenarios 10, 12 and 13, on a server that keeps plain files."""
    bucket, files = s3_on_disk
    monkeypatch.setattr("casallm.storage.remote.SETTLE_SECONDS", 0.01)
    session = Session(bucket.store(), memory_path / "a")
    session.train()
    session.train()
    path = files / "run/checkpoints/step-00000020-a1/model-00000.safetensors"
    data = path.read_bytes()
    older = files / "run/checkpoints/step-00000010-a1/model-00000.safetensors"
    flipped = data[:100] + bytes([data[100] ^ 4]) + data[101:]

    for number, damaged in enumerate((flipped, data[:-10], older.read_bytes(), None)):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        time.sleep(0.3)  # rclone remembers directories for 0.2 s
        assert good_step(bucket.store(), memory_path / f"{number}") == 10
        (problem,) = find_problems(bucket.store(), CheckpointName(20, 1))
        assert "step-00000020-a1/model-00000.safetensors" in problem


def test_a_process_that_wakes_up_late_commits_nothing(s3: Bucket, memory_path: Path):
    """Scenario 23: SIGSTOP, another start, SIGCONT."""
    progress = memory_path / "progress"
    zombie = start_in_bucket(s3.name, s3.proxy.url, memory_path / "a", progress)
    wait_for_progress(zombie, progress)
    os.kill(zombie.pid or 0, signal.SIGSTOP)

    session = Session(s3.direct(), memory_path / "b")
    session.train()
    os.kill(zombie.pid or 0, signal.SIGCONT)
    zombie.join(60)
    last = session.train()

    assert zombie.exitcode == FENCED
    assert good_step(s3.direct(), memory_path / "c") == last.step
    trained = merged_metrics(s3.direct())
    assert [line["step"] for line in trained] == list(range(1, last.step + 1))
    assert {name.attempt for name in list_checkpoints(s3.direct())} <= {1, session.attempt.number}


def test_of_sixteen_starts_in_a_bucket_one_leads(s3: Bucket, memory_path: Path):
    """Scenario 24."""
    Session(s3.direct(), memory_path / "first").train()
    together = threading.Barrier(16)
    bucket = S3Bucket(s3.name, endpoint_url=s3.proxy.url)

    class Simultaneous(RemoteStore):
        def create(self, name: str, data: bytes) -> None:
            together.wait()
            super().create(name, data)

    def start(number: int) -> bool:
        try:
            start_attempt(Simultaneous(bucket, "run/"), memory_path / f"{number}")
        except AttemptError:
            return False
        return True

    with concurrent.futures.ThreadPoolExecutor(16) as executor:
        assert sum(executor.map(start, range(16))) == 1
    assert attempt_numbers(s3.direct()) == [1, 2]


def test_metrics_of_a_bucket_run_are_published_before_the_commit(s3: Bucket, memory_path: Path):
    session = Session(s3.store(), memory_path)
    published_steps: list[int] = []

    def decide(method: str, path: str) -> str | None:
        if method == "PUT" and path.endswith("manifest.json"):
            published_steps.extend(line["step"] for line in read_lines(s3.direct(), 1, METRICS))
        return None

    s3.proxy.decide = decide
    session.train()

    assert published_steps[-1] == 10
