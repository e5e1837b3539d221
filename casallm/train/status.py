"""What became of runs: whether one is over and why, how far it is, what it has cost.

`finished.json` at the root of a run is canonical JSON: `attempt`, `step`, `reason`, `time` and
whatever the trainer adds. It is made by conditional create, by the leading attempt; one whose
attempt and step are off the run's history is ignored.
"""

import json
import os
import re
import socket
from dataclasses import dataclass
from typing import Any, Literal

from casallm.config import canonical_json
from casallm.errors import StoreExistsError, StoreNotFoundError
from casallm.storage.store import Store
from casallm.train.attempts import Attempt, assert_leading, read_chain, utc_now
from casallm.train.checkpoint import list_checkpoints
from casallm.train.journal import EVENTS, Line, merged_metrics, read_lines, spent_usd

FINISHED = "finished.json"

_RUN_OF = re.compile(r"(.*?)/?attempts/\d{6}/attempt\.json")


@dataclass(frozen=True)
class RunStatus:
    """One run at a glance, for `casallm runs`."""

    url: str
    state: Literal["finished", "stopped", "running"]
    """running: the newest attempt has not said that it ended (it may have been killed)."""
    step: int
    attempts: int
    usd: float
    checkpoint: str | None
    """The newest committed checkpoint."""
    reason: str
    """Why it is over, or what the newest attempt said last."""
    seen: str
    """When it said so, by its own clock."""


def finish(run: Store, attempt: Attempt, *, step: int, reason: str, **more: Any) -> None:
    """Record that the run is over; AttemptError if another attempt leads it."""
    assert_leading(run, attempt)
    record = {**more, "attempt": attempt.number, "step": step, "reason": reason, "time": utc_now()}
    data = canonical_json(record).encode()
    try:
        run.create(FINISHED, data)
    except StoreExistsError:
        if read_finished(run) is None:
            run.delete(FINISHED)
            run.create(FINISHED, data)


def read_finished(run: Store) -> dict[str, Any] | None:
    """The record that the run is over; None if it is not, or one who did not lead said so."""
    try:
        record = json.loads(run.read(FINISHED))
        attempt, step = int(record["attempt"]), int(record["step"])
    except (StoreNotFoundError, ValueError, TypeError, KeyError):
        return None
    return record if read_chain(run).has(step, attempt) else None


def read_status(run: Store) -> RunStatus:
    """How far the run is, and what it has cost."""
    chain = read_chain(run)
    finished = read_finished(run)
    checkpoints = list_checkpoints(run)
    metrics = merged_metrics(run)
    newest = chain.links[0].attempt if chain.links else None
    last = _last_event(run, newest.number) if newest else {}
    is_over = last.get("kind") == "end" or (newest is not None and _is_dead_here(newest))
    return RunStatus(
        url=run.url,
        state="finished" if finished else "stopped" if is_over else "running",
        step=int(finished["step"]) if finished else metrics[-1]["step"] if metrics else 0,
        attempts=newest.number if newest else 0,
        usd=spent_usd(run),
        checkpoint=str(checkpoints[-1]) if checkpoints else None,
        reason=str(finished["reason"] if finished else last.get("reason", last.get("kind", ""))),
        seen=str((finished or last).get("time", "")),
    )


def list_runs(store: Store) -> list[RunStatus]:
    """Every run in a directory or bucket, by name."""
    matches = (_RUN_OF.fullmatch(entry.name) for entry in store.list())
    names = sorted({match[1] for match in matches if match})
    return [read_status(store.join(name) if name else store) for name in names]


def _last_event(run: Store, attempt: int) -> Line:
    lines = read_lines(run, attempt, EVENTS)
    return lines[-1] if lines else {}


def _is_dead_here(attempt: Attempt) -> bool:
    """Whether the attempt ran on this machine under a process id that is free by now."""
    pid = attempt.info.get("pid")
    if attempt.info.get("host") != socket.gethostname() or type(pid) is not int:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False
