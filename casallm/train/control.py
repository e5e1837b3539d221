"""The folder in which a supervisor and the ranks of its node leave each other notes.

It lives on the machine's own disk for one generation of ranks:

    spec.json        what to train, written by the supervisor
    stop.json        please stop: why, and when the machine is gone
    heartbeat-R      touched by rank R at every step; its content is the step
    last-save        from here on ranks take no step: rank 0 stores the last checkpoint
    error-R.txt      the last words of rank R: the error's first line, then the traceback
    pid-R            the process of rank R
    stacks-R.txt     where every thread of rank R was, dumped on SIGUSR2
    outcome.json     how the generation ended: written by rank 0, or by a rank that has a sentence
                     for the person

torchrun turns every failure into exit code 1, so the outcome has to travel here.
"""

import ctypes
import faulthandler
import json
import os
import signal
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

PR_SET_PDEATHSIG = 1
"""prctl's request for a signal at the parent's death (Linux, prctl(2))."""

SHORTEST_NOTICE_SECONDS = 30.0
"""The least that a cloud gives: what is left when the wish to stop came from another node."""

PARENT_VARIABLE = "CASALLM_PARENT_PID"


@dataclass(frozen=True)
class StopRequest:
    """Somebody wants the run to stop."""

    reason: str
    ends_at: float | None = None
    """When this machine is gone, by its own clock; None if nobody said so."""

    @property
    def seconds_left(self) -> float | None:
        """How long the machine still lives."""
        return None if self.ends_at is None else max(0.0, self.ends_at - time.time())


@dataclass(frozen=True)
class Outcome:
    """How a generation ended: finished, stopped after a save, or failed."""

    kind: Literal["finished", "stopped", "failed"]
    step: int
    reason: str


@dataclass(frozen=True)
class Spec:
    """What the supervisor tells every rank; travels as JSON."""

    run_url: str
    config: dict[str, Any]
    machine: dict[str, Any]
    """The fields of a `Machine`: this node."""
    data_directory: str
    scratch: str
    attempt: int
    start_from: str | None
    identity_sha256: str
    usd_before: float
    billed_since: float
    run_started: float
    elapsed_before: float


class Control:
    """The notes of one generation, in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._seen_stop: StopRequest | None = None
        self._beats: dict[str, tuple[int, float]] = {}

    def write_spec(self, spec: Spec) -> None:
        """Leave word of what the ranks are to do."""
        _write_whole(self.directory / "spec.json", json.dumps(asdict(spec)))

    def spec(self) -> Spec:
        """What the supervisor wants done."""
        return Spec(**json.loads((self.directory / "spec.json").read_text()))

    def request_stop(self, request: StopRequest) -> None:
        """Ask the ranks to save and end; the first request stands."""
        path = self.directory / "stop.json"
        if not path.exists():
            _write_whole(path, json.dumps(asdict(request)))

    def stop_request(self) -> StopRequest | None:
        """The request to stop, if there is one; cheap enough for every step."""
        path = self.directory / "stop.json"
        if self._seen_stop is None and path.exists():
            self._seen_stop = StopRequest(**json.loads(path.read_text()))
        return self._seen_stop

    def beat(self, rank: int, step: int) -> None:
        """Say that `rank` has reached `step`."""
        (self.directory / f"heartbeat-{rank}").write_text(str(step))

    def seconds_since_beat(self) -> float | None:
        """How long ago the slowest rank was last seen to move; None before any has.

        Counts between calls of this method, by a clock that nobody sets.
        """
        now = time.monotonic()
        for path in self.directory.glob("heartbeat-*"):
            beat = path.stat().st_mtime_ns
            if self._beats.get(path.name, (None,))[0] != beat:
                self._beats[path.name] = (beat, now)
        return now - min(seen for _, seen in self._beats.values()) if self._beats else None

    def begin_last_save(self) -> None:
        """Say that no step follows, however long the store takes."""
        (self.directory / "last-save").touch()

    def is_in_last_save(self) -> bool:
        """Whether all steps are done and only the last checkpoint is on its way."""
        return (self.directory / "last-save").exists()

    def write_outcome(self, outcome: Outcome) -> None:
        """Leave word of how the generation ended."""
        _write_whole(self.directory / "outcome.json", json.dumps(asdict(outcome)))

    def outcome(self) -> Outcome | None:
        """What was left word of, or None if no rank could."""
        path = self.directory / "outcome.json"
        return Outcome(**json.loads(path.read_text())) if path.exists() else None

    def write_error(self, rank: int, error: BaseException) -> None:
        """Keep the last words of a failing rank."""
        summary = traceback.format_exception_only(error)[-1].splitlines()[0]
        text = "".join(traceback.format_exception(error))
        _write_whole(self.directory / f"error-{rank}.txt", f"{summary}\n{text}")

    def first_error(self) -> tuple[int, str] | None:
        """The rank that failed first and its last words, if any rank left some.

        The first line is the error's own; what libraries add beneath it is advice to programmers.
        """
        paths = sorted(self.directory.glob("error-*.txt"), key=lambda path: path.stat().st_mtime_ns)
        if not paths:
            return None
        return int(paths[0].stem.split("-")[1]), paths[0].read_text()

    def dump_stacks_on_signal(self, rank: int) -> None:
        """From now on SIGUSR2 writes every thread's stack to stacks-R.txt."""
        file = (self.directory / f"stacks-{rank}.txt").open("w")
        faulthandler.register(signal.SIGUSR2, file=file, all_threads=True, chain=False)
        _write_whole(self.directory / f"pid-{rank}", str(os.getpid()))

    def rank_pids(self) -> list[int]:
        """The processes of the ranks that have started."""
        return [int(path.read_text()) for path in self.directory.glob("pid-*")]

    def stacks(self) -> dict[int, str]:
        """What the ranks dumped on SIGUSR2, by rank."""
        paths = sorted(self.directory.glob("stacks-*.txt"))
        return {int(path.stem.split("-")[1]): path.read_text() for path in paths}


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent dies, even by SIGKILL (Linux).

    A parent that died before this call is noticed by its number, which `environment_for_child`
    handed down.
    """
    libc: Any = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "prctl"):
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.environ.get(PARENT_VARIABLE, str(os.getppid())) != str(os.getppid()):
        os._exit(1)


def environment_for_child(**more: str) -> dict[str, str]:
    """This process's environment and `more`, for a child that calls `die_with_parent`."""
    return {**os.environ, PARENT_VARIABLE: str(os.getpid()), **more}


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)
