import concurrent.futures
import json
import threading
from pathlib import Path

import pytest

from casallm.errors import AttemptError
from casallm.storage.local import LocalStore
from casallm.train.attempts import (
    Chain,
    CheckpointName,
    assert_leading,
    attempt_numbers,
    claim,
    read_attempt,
    read_chain,
)
from casallm.train.journal import AttemptLog


@pytest.fixture
def run(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "run")


def damage(run: LocalStore, name: str) -> None:
    path = Path(run.url, name)
    path.write_bytes(path.read_bytes().replace(b'"version":1', b'"version":2'))


def numbers(chain: Chain) -> list[tuple[int, int | None]]:
    return [(link.attempt.number, link.until) for link in chain.links]


def test_attempts_are_numbered_and_remember_who_started_them(run: LocalStore):
    first = claim(run, parent=None, world_size=8)
    second = claim(run, parent=CheckpointName(1000, 1))

    assert (first.number, second.number) == (1, 2)
    assert attempt_numbers(run) == [1, 2]
    assert read_attempt(run, 1) == first
    assert first.info["world_size"] == 8
    assert read_attempt(run, 2) == second
    assert second.directory == "attempts/000002"


def test_attempt_json_is_as_specified(run: LocalStore):
    claim(run, parent=CheckpointName(1000, 3))

    record = json.loads(run.read("attempts/000001/attempt.json"))

    assert sorted(record) == [
        "attempt", "attempt_sha256", "casallm", "format", "host", "parent", "pid", "time",
        "token", "version",
    ]  # fmt: skip
    assert record["format"] == "casallm-attempt"
    assert record["parent"] == "step-00001000-a3"


def test_of_sixteen_starts_at_one_moment_one_leads_and_the_others_say_so(run: LocalStore):
    together = threading.Barrier(16)

    class Simultaneous(LocalStore):
        def create(self, name: str, data: bytes) -> None:
            together.wait()
            super().create(name, data)

    def start(_: int) -> str:
        try:
            claim(Simultaneous(Path(run.url)), parent=None)
        except AttemptError as error:
            return str(error)
        return "leads"

    with concurrent.futures.ThreadPoolExecutor(16) as executor:
        outcomes = sorted(executor.map(start, range(16)))

    assert outcomes.count("leads") == 1
    assert attempt_numbers(run) == [1]
    assert all(
        "took attempt 1 of" in outcome and "this one stops" in outcome
        for outcome in outcomes
        if outcome != "leads"
    )


def test_an_older_attempt_is_told_that_a_newer_one_leads(run: LocalStore):
    first = claim(run, parent=None)
    assert_leading(run, first)
    second = claim(run, parent=None)

    with pytest.raises(AttemptError, match=r"attempt 2 \(host .*, pid \d+\) leads .* attempt 1 st"):
        assert_leading(run, first)
    assert_leading(run, second)


def test_a_run_that_was_removed_under_its_attempt_is_an_error(run: LocalStore):
    attempt = claim(run, parent=None)
    run.delete("attempts/000001/attempt.json")

    with pytest.raises(AttemptError, match="the run was removed"):
        assert_leading(run, attempt)


def test_the_history_is_the_chain_back_through_the_parents(run: LocalStore):
    claim(run, parent=None)
    claim(run, parent=CheckpointName(1000, 1))
    claim(run, parent=CheckpointName(1000, 1))
    claim(run, parent=CheckpointName(1500, 3))

    chain = read_chain(run)

    assert numbers(chain) == [(4, None), (3, 1500), (1, 1000)]
    assert chain.has(1000, 1)
    assert not chain.has(1001, 1)
    assert not chain.has(1200, 2)
    assert chain.has(10**9, 4)


def test_an_attempt_that_committed_nothing_leaves_no_history_to_continue(run: LocalStore):
    for parent in (None, CheckpointName(10, 1), CheckpointName(10, 1)):
        claim(run, parent=parent)
    for name in ("step-00000010-a1", "step-00000020-a1", "step-00000015-a2"):
        run.write(f"checkpoints/{name}/manifest.json", b"{}")

    assert numbers(read_chain(run)) == [(3, None), (1, 10)]
    assert numbers(read_chain(run, before=4)) == [(2, None), (1, 10)]
    assert numbers(read_chain(run, before=2)) == [(1, None)]
    assert numbers(read_chain(run, before=1)) == []


def test_an_attempt_that_began_anew_ends_the_history(run: LocalStore):
    claim(run, parent=None)
    claim(run, parent=None)

    assert numbers(read_chain(run)) == [(2, None)]


def test_no_clock_matters(run: LocalStore, monkeypatch: pytest.MonkeyPatch):
    for day in ("2026-11-22", "2026-11-21", "2026-11-23"):
        monkeypatch.setattr("casallm.train.attempts.utc_now", lambda day=day: f"{day}T00:00:00")
        attempt = claim(run, parent=None)

    assert attempt.number == 3
    assert numbers(read_chain(run)) == [(3, None)]


def test_a_damaged_attempt_is_read_from_its_first_event(run: LocalStore):
    claim(run, parent=None)
    AttemptLog(run, claim(run, parent=CheckpointName(1000, 1)))
    claim(run, parent=CheckpointName(2000, 2))

    damage(run, "attempts/000002/attempt.json")

    assert numbers(read_chain(run)) == [(3, None), (2, 2000), (1, 1000)]


def test_a_torn_claim_is_skipped_unless_it_has_checkpoints(
    run: LocalStore, caplog: pytest.LogCaptureFixture
):
    claim(run, parent=None)
    run.write("attempts/000002/attempt.json", b'{"attempt":')

    assert numbers(read_chain(run)) == [(1, None)]
    assert "attempt 2 of" in caplog.text
    assert claim(run, parent=None).number == 3
    run.delete("attempts/000003/attempt.json")
    run.write("checkpoints/step-00000010-a2/manifest.json", b"{}")
    assert numbers(read_chain(run)) == [(2, None)]


@pytest.mark.parametrize("parent", ["../../etc", "step-1-a1", 7, "step-00000005-a2"])
def test_a_forged_parent_leads_nowhere(run: LocalStore, parent: object):
    from casallm.storage.sealed import seal

    record = {"attempt": 1, "parent": parent}
    run.write("attempts/000001/attempt.json", seal(record, "attempt_sha256"))

    assert [link.attempt.number for link in read_chain(run).links] in ([], [1])


@pytest.mark.parametrize("text", ["step-00001000-a3", "step-123456789-a12", "step-00000000-a1"])
def test_checkpoint_names_come_back(text: str):
    assert str(CheckpointName.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "step-1000-a3", "step-00001000-a0", "step-00001000-a03", "step-000001000-a3", "x"]
)
def test_other_spellings_are_no_checkpoint_names(text: str):
    assert CheckpointName.parse(text) is None
