"""Who leads a run, and which checkpoints count.

Each start of a run is an *attempt*. It is obtained by creating `attempts/000003/attempt.json`,
which only one starter can, and names the checkpoint that it starts from: its parent. The valid
history of a run is the chain from the newest attempt back through the parents; what a process
that was thought dead writes under an older attempt lies beyond the point where its successor
left it, and is ignored. Order is by attempt number alone: clocks are recorded, never compared.

`attempt.json` is sealed JSON (key `attempt_sha256`): `format` ("casallm-attempt"), `version`,
`attempt`, `parent` (a checkpoint name or null), `host`, `pid`, `token` (random), `time`,
`casallm` (version) and whatever the starter adds. The parent stands in the attempt's first event
too, so that a damaged `attempt.json` costs nothing.
"""

import json
import logging
import os
import re
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from casallm import __version__
from casallm.errors import AttemptError, StoreExistsError, StoreNotFoundError
from casallm.storage.sealed import seal, unseal
from casallm.storage.store import Store

log = logging.getLogger(__name__)

SEAL = "attempt_sha256"

_ATTEMPT = re.compile(r"attempts/(\d{6})/attempt\.json")
_CHECKPOINT = re.compile(r"step-(\d{8,})-a([1-9]\d*)")


@dataclass(frozen=True, order=True)
class CheckpointName:
    """`step-00001000-a3`: the state after step 1000, written by attempt 3."""

    step: int
    attempt: int

    def __str__(self) -> str:
        return f"step-{self.step:08d}-a{self.attempt}"

    @classmethod
    def parse(cls, text: str) -> "CheckpointName | None":
        """The name that `text` spells, or None if it spells none."""
        match = _CHECKPOINT.fullmatch(text)
        name = cls(int(match[1]), int(match[2])) if match else None
        return name if str(name) == text else None


@dataclass(frozen=True)
class Attempt:
    """One start of a run: its number, what it started from, and what it said of itself."""

    number: int
    parent: CheckpointName | None
    info: Mapping[str, Any]

    @property
    def directory(self) -> str:
        """Where in the run the attempt keeps its objects."""
        return _directory(self.number)

    @property
    def starter(self) -> str:
        """Who started it, as messages name it."""
        return f"host {self.info.get('host', '?')}, pid {self.info.get('pid', '?')}"


@dataclass(frozen=True)
class Link:
    """An attempt of the chain, and the last of its steps that counts (None: all do)."""

    attempt: Attempt
    until: int | None


@dataclass(frozen=True)
class Chain:
    """The valid history of a run: its attempts, newest first, each up to where it was left."""

    links: tuple[Link, ...]

    def has(self, step: int, attempt: int) -> bool:
        """Whether what `attempt` did in `step` is part of the history."""
        for link in self.links:
            if link.attempt.number == attempt:
                return link.until is None or step <= link.until
        return False


def claim(
    run: Store, *, parent: CheckpointName | None, number: int | None = None, **info: Any
) -> Attempt:
    """The run's next attempt, starting from `parent`; AttemptError if another start won it.

    With `number`, that attempt and no later one.
    """
    number = number or next_number(run)
    record = {
        **info,
        "format": "casallm-attempt",
        "version": 1,
        "attempt": number,
        "parent": None if parent is None else str(parent),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "token": secrets.token_hex(8),
        "time": utc_now(),
        "casallm": __version__,
    }
    try:
        run.create(f"{_directory(number)}/attempt.json", seal(record, SEAL))
    except StoreExistsError:
        raise AttemptError(_lost_race(run, number)) from None
    attempt = Attempt(number, parent, record)
    assert_leading(run, attempt)
    return attempt


def assert_leading(run: Store, attempt: Attempt) -> None:
    """Raise AttemptError unless `attempt` is the run's newest; called before every commit."""
    newest = max(attempt_numbers(run), default=0)
    if newest > attempt.number:
        successor = read_attempt(run, newest)
        starter = f" ({successor.starter})" if successor else ""
        raise AttemptError(
            f"attempt {newest}{starter} leads {run.url} by now, so attempt {attempt.number} stops;"
            " nothing is lost: the run goes on there"
        )
    if newest < attempt.number:
        raise AttemptError(
            f"{run.url} no longer holds attempt {attempt.number}, which is running: the run was"
            " removed; start it again to begin anew"
        )


def list_committed(run: Store) -> list[CheckpointName]:
    """Every checkpoint that has a manifest, oldest first, those off the history included."""
    parts = (entry.name.split("/") for entry in run.list("checkpoints/"))
    folders = [part[1] for part in parts if len(part) == 3 and part[2] == "manifest.json"]
    return sorted(name for name in map(CheckpointName.parse, folders) if name)


def attempt_numbers(run: Store) -> list[int]:
    """The numbers of all attempts, ascending."""
    matches = (_ATTEMPT.fullmatch(entry.name) for entry in run.list("attempts/"))
    return sorted(int(match[1]) for match in matches if match)


def next_number(run: Store) -> int:
    """The number that the next start will try to claim."""
    return max(attempt_numbers(run), default=0) + 1


def read_attempt(run: Store, number: int) -> Attempt | None:
    """Attempt `number`; None if it left nothing that can be read and no checkpoint.

    Where `attempt.json` is damaged, the parent is taken from the first event; if that is gone
    too, the attempt's checkpoints still count, and what came before them is forgotten.
    """
    try:
        content = run.read(f"{_directory(number)}/attempt.json")
        return _parse_attempt(number, unseal(content, SEAL))
    except (StoreNotFoundError, ValueError) as error:
        log.warning("attempt %d of %s is damaged: %s", number, run.url, error)
    record = _first_event(run, number)
    if record is not None:
        return _parse_attempt(number, record)
    has_committed = any(name.attempt == number for name in list_committed(run))
    return Attempt(number, None, {}) if has_committed else None


def read_chain(run: Store, *, before: int | None = None) -> Chain:
    """The history from the newest attempt back; empty for a run that was never started.

    With `before`, the history that attempt `before` continues: an older attempt that committed
    nothing left none, though it may have claimed to start from an older state than there is.
    """
    numbers = attempt_numbers(run)
    if before is not None:
        authors = {name.attempt for name in list_committed(run)}
        numbers = [number for number in numbers if number < before and number in authors]
    attempt = _newest_readable(run, numbers)
    if attempt is None:
        return Chain(())
    links = [Link(attempt, None)]
    while attempt.parent and attempt.parent.attempt < attempt.number:
        step, number = attempt.parent.step, attempt.parent.attempt
        attempt = read_attempt(run, number) or Attempt(number, None, {})
        links.append(Link(attempt, step))
    return Chain(tuple(links))


def utc_now() -> str:
    """The time, for people to read; nothing compares it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _directory(number: int) -> str:
    return f"attempts/{number:06d}"


def _newest_readable(run: Store, numbers: list[int]) -> Attempt | None:
    for number in reversed(numbers):
        attempt = read_attempt(run, number)
        if attempt is not None:
            return attempt
    return None


def _lost_race(run: Store, number: int) -> str:
    winner = read_attempt(run, number)
    starter = f" ({winner.starter})" if winner else ""
    return (
        f"another start{starter} took attempt {number} of {run.url} at the same moment and leads"
        " it: this one stops"
    )


def _first_event(run: Store, number: int) -> dict[str, Any] | None:
    """The attempt's "start" event, which repeats its parent; None if there is none."""
    try:
        line = run.read(f"{_directory(number)}/events.jsonl").partition(b"\n")[0]
        event = json.loads(line)
        _parse_attempt(number, event)
    except (StoreNotFoundError, ValueError, RecursionError):
        return None
    return event if event.get("kind") == "start" else None


def _parse_attempt(number: int, record: Any) -> Attempt:
    """The attempt that `record` describes; ValueError if it describes another or none."""
    if not isinstance(record, dict) or record.get("attempt") != number or "parent" not in record:
        raise ValueError("it describes another attempt")
    parent = record["parent"]
    name = CheckpointName.parse(str(parent))
    if parent is not None and name is None:
        raise ValueError(f"its parent {str(parent)[:80]!r} is no checkpoint")
    return Attempt(number, name, record)
