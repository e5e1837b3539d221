import json
import os
import signal
import time
from pathlib import Path

import pytest

from casallm.errors import StoreError
from casallm.storage.local import LocalStore
from casallm.storage.store import Store, open_store
from casallm.train.attempts import CheckpointName, claim
from casallm.train.journal import (
    EVENTS,
    METRICS,
    AttemptLog,
    lifetimes_seconds,
    merged_metrics,
    merged_samples,
    read_lines,
    spent_usd,
)


@pytest.fixture(params=["local", "bucket"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    local = request.param == "local"
    return open_store(str(tmp_path / "run") if local else f"memory://journal/{tmp_path.name}")


def write(run: Store, parent: CheckpointName | None, steps: range, **more: float) -> AttemptLog:
    journal = AttemptLog(run, claim(run, parent=parent), publish_every_seconds=None)
    for step in steps:
        journal.metric({"step": step, **more})
    journal.publish()
    return journal


def steps(run: Store) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in merged_metrics(run)]


def test_the_first_event_repeats_the_attempt(run: Store):
    attempt = claim(run, parent=CheckpointName(1000, 1), world_size=2)
    AttemptLog(run, attempt, publish_every_seconds=None).close()

    (event,) = read_lines(run, 1, EVENTS)

    assert event["kind"] == "start"
    assert event["parent"] == "step-00001000-a1"
    assert event["world_size"] == 2


def test_a_journal_opened_again_goes_on(run: Store):
    attempt = claim(run, parent=None)
    for step in (1, 2):
        journal = AttemptLog(run, attempt, publish_every_seconds=None)
        journal.metric({"step": step})
        journal.close()

    assert [line["step"] for line in read_lines(run, 1, METRICS)] == [1, 2]
    assert len(read_lines(run, 1, EVENTS)) == 1


def test_the_merged_view_has_each_step_once_along_the_chain(run: Store):
    write(run, None, range(1, 16), loss=1.0)
    write(run, CheckpointName(10, 1), range(11, 14), loss=2.0)
    write(run, CheckpointName(10, 1), range(11, 26), loss=3.0)
    write(run, CheckpointName(20, 3), range(21, 23), loss=4.0)

    assert steps(run) == (
        [(step, 1.0) for step in range(1, 11)]
        + [(step, 3.0) for step in range(11, 21)]
        + [(step, 4.0) for step in range(21, 23)]
    )


def test_what_restarted_ranks_do_again_replaces_what_they_did(run: Store):
    journal = write(run, None, range(1, 8), loss=1.0)
    for step in range(6, 7):
        journal.metric({"step": step, "loss": 2.0})
    journal.publish()

    assert steps(run) == [*((step, 1.0) for step in range(1, 6)), (6, 2.0)]


def test_a_step_may_be_trained_and_evaluated(run: Store):
    journal = write(run, None, range(1, 3), loss=1.0)
    for _ in range(2):
        journal.metric({"step": 2, "loss": 1.5})
        journal.metric({"step": 2, "val_loss": 2.0})
    journal.publish()

    lines = [line for line in merged_metrics(run) if line["step"] == 2]
    assert lines == [{"step": 2, "loss": 1.5}, {"step": 2, "val_loss": 2.0}]


def test_each_prompt_is_sampled_once_a_step_in_the_merged_view(run: Store):
    journal = AttemptLog(run, claim(run, parent=None), publish_every_seconds=None)
    for text in ("old", "new"):
        for prompt in ("a", "b"):
            journal.sample(step=5, tokens=50, prompt=prompt, text=text)
    journal.close()

    assert merged_samples(run) == [
        {"step": 5, "tokens": 50, "prompt": prompt, "text": "new"} for prompt in ("a", "b")
    ]


def test_dollars_count_attempts_off_the_history_too(run: Store):
    write(run, None, range(1, 3), usd=1.0)
    write(run, None, range(1, 3), usd=3.5)
    write(run, None, range(1, 3), loss=1.0)

    assert spent_usd(run) == 3.5


def test_an_attempt_that_died_before_its_first_step_was_paid_for_from_boot(run: Store):
    paid = {"usd_before": 2.0, "usd_per_hour": 12.0}
    claim(run, parent=None, billed_since=time.time() - 600, **paid)

    assert spent_usd(run) == pytest.approx(2.0 + 12.0 * 600 / 3600, abs=0.01)


def test_an_attempt_whose_price_is_unknown_costs_nothing_known(run: Store):
    claim(run, parent=None, billed_since=time.time() - 600, usd_before=0.0, usd_per_hour=None)

    assert spent_usd(run) == 0.0


def test_a_silent_attempt_in_a_bucket_says_that_it_is_alive(tmp_path: Path):
    run = open_store(f"memory://alive/{tmp_path.name}")
    journal = AttemptLog(run, claim(run, parent=None), publish_every_seconds=0.01)

    for _ in range(500):
        kinds = [line["kind"] for line in read_lines(run, 1, EVENTS)]
        if "alive" in kinds:
            break
        time.sleep(0.01)
    journal.close()

    assert kinds[:2] == ["start", "alive"]


def test_lifetimes_of_past_attempts_are_read_from_their_events(tmp_path: Path):
    run = LocalStore(tmp_path)
    for number, times in enumerate((["10:00:00", "10:30:00"], ["09:00:00"], ["x"], []), start=1):
        lines = [f'{{"kind":"save","time":"2026-11-22T{time}+00:00"}}' for time in times]
        run.write(f"attempts/{number:06d}/attempt.json", b"")
        run.write(f"attempts/{number:06d}/events.jsonl", "\n".join(lines).encode())

    assert lifetimes_seconds(run, before=5) == [1800.0, 0.0]
    assert lifetimes_seconds(run, before=2) == [1800.0]


def test_a_line_cut_off_by_a_kill_is_left_out_and_the_next_is_whole(tmp_path: Path):
    run = LocalStore(tmp_path)
    attempt = claim(run, parent=None)
    AttemptLog(run, attempt).metric({"step": 1, "loss": 1.0})
    path = tmp_path / attempt.directory / METRICS
    path.write_bytes(path.read_bytes() + b'{"step":2,"lo')

    AttemptLog(run, attempt).metric({"step": 2, "loss": 1.0})

    assert steps(run) == [(1, 1.0), (2, 1.0)]


def test_foreign_lines_do_not_disturb(tmp_path: Path):
    run = LocalStore(tmp_path)
    claim(run, parent=None)
    lines = [
        b"[1]",
        b"null",
        b'{"step":"x"}',
        b'{"step":true}',
        b"[" * 10_000,
        b'{"step":1,"loss":1}',
    ]
    run.write("attempts/000001/metrics.jsonl", b"\n".join(lines))

    assert steps(run) == [(1, 1)]


def test_on_a_local_disk_a_kill_loses_no_line(tmp_path: Path):
    run = LocalStore(tmp_path)
    attempt = claim(run, parent=None)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        journal = AttemptLog(run, attempt)
        for step in range(1, 10**6):
            journal.metric({"step": step, "loss": 0.0})
            os.write(writer, b"%d\n" % step)
    time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(writer)

    said = int(os.read(reader, 1 << 20).split()[-1])
    assert len(merged_metrics(run)) >= said > 0


def test_in_a_bucket_lines_are_published_by_the_clock(tmp_path: Path):
    run = open_store(f"memory://journal/{tmp_path.name}")
    journal = AttemptLog(run, claim(run, parent=None), publish_every_seconds=0.02)
    journal.metric({"step": 1, "loss": 1.0})

    deadline = time.monotonic() + 10
    while not merged_metrics(run) and time.monotonic() < deadline:
        time.sleep(0.01)

    assert steps(run) == [(1, 1.0)]
    journal.close()


def test_a_full_or_forbidden_disk_is_said(tmp_path: Path):
    run = LocalStore(tmp_path)
    journal = AttemptLog(run, claim(run, parent=None))
    Path(run.url, "attempts/000001/metrics.jsonl").mkdir()

    with pytest.raises(StoreError, match=r"metrics\.jsonl cannot be written \(Is a directory\)"):
        journal.metric({"step": 1})


def test_lines_are_canonical_json(tmp_path: Path):
    run = LocalStore(tmp_path)
    journal = AttemptLog(run, claim(run, parent=None))
    journal.metric({"step": 1, "loss": 0.1 + 0.2})

    (text,) = Path(run.url, "attempts/000001/metrics.jsonl").read_text().splitlines()

    assert text == '{"loss":0.30000000000000004,"step":1}'
    assert json.loads(text)["loss"] == 0.1 + 0.2
