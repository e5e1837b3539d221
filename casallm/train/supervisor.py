"""The outer process of a run: claims the attempt, starts the ranks, and answers for how they end.

One generation of ranks is one torchrun with a fresh rendezvous id. torchrun never restarts
anything itself; when a rank dies or hangs, this process ends the generation and starts the next
from the newest good checkpoint, a bounded number of times. A stop signal becomes a note that the
ranks act on at a step boundary. Exit codes: 0 done, 1 a person must look, 75 run me again.
"""

import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from casallm.errors import TrainingError
from casallm.train.control import (
    Control,
    Outcome,
    Spec,
    StopRequest,
    environment_for_child,
)
from casallm.train.preemption import SignalWatch

log = logging.getLogger(__name__)

EXIT_DONE, EXIT_FAILED, EXIT_AGAIN = 0, 1, 75

MAX_RESTARTS = 3
"""Generations that may fail one after the other without a new checkpoint between them."""

POLL_SECONDS = 0.1
START_PATIENCE = 3.0
"""Before the first step (compiling, loading) a generation may take this many times as long."""

GRACE_SECONDS = 10.0
"""How long ranks may take to die before they are killed."""


@dataclass(frozen=True)
class Generation:
    """What one torchrun is to do; `spec` is read by every rank."""

    spec: Spec
    ranks: int
    threads_per_rank: int
    stall_seconds: float


class Supervisor:
    """Runs generations until one finishes, stops, or fails beyond repair.

    `next_spec` is asked before each generation for what its ranks are to do (it finds the
    newest good checkpoint); `newest_step` says how far the run is safely stored.
    """

    def __init__(
        self,
        next_generation: Callable[[Path], Generation],
        newest_step: Callable[[], int],
    ) -> None:
        self._next_generation = next_generation
        self._newest_step = newest_step
        self._control: Control | None = None
        self._request: StopRequest | None = None
        self._signals = SignalWatch(self.request_stop)

    def request_stop(self, request: StopRequest) -> None:
        """Let the ranks save and end; called from signal handlers and notice pollers."""
        self._request = self._request or request
        if self._control:
            self._control.request_stop(request)

    def run(self) -> Outcome:
        """The outcome of the last generation; raises TrainingError when restarts are used up."""
        self._signals.install()
        failures, stored = 0, self._newest_step()
        while True:
            with tempfile.TemporaryDirectory(prefix="casallm-") as directory:
                self._control = Control(Path(directory))
                if self._request:
                    self._control.request_stop(self._request)
                generation = self._next_generation(Path(directory))
                outcome = self._run_generation(generation, self._control)
                if outcome:
                    return outcome
                words = _last_words(self._control)
                self._control = None
            newest = self._newest_step()
            failures = failures + 1 if newest <= stored else 1
            stored = max(newest, stored)
            if self._request:
                return Outcome("stopped", stored, f"{self._request.reason}, while ranks had failed")
            if failures > MAX_RESTARTS:
                raise TrainingError(f"ranks failed {failures} times in a row; the last: {words}")
            log.warning("%s; starting the ranks again from step %s", words, f"{stored:,}")

    def _run_generation(self, generation: Generation, control: Control) -> Outcome | None:
        """How the ranks ended, or None if they died or hung and may be started again."""
        control.write_spec(generation.spec)
        process = _start_torchrun(generation, control.directory)
        try:
            self._watch(process, generation, control)
        finally:
            _kill_generation(process, control)
        outcome = control.outcome()
        if outcome is None and self._signals.is_impatient:
            return Outcome("failed", self._newest_step(), "stopped at once, without a save")
        return outcome

    def _watch(
        self, process: "subprocess.Popen[bytes]", generation: Generation, control: Control
    ) -> None:
        """Wait until the ranks have ended, hang, or somebody insists."""
        started = time.monotonic()
        while process.poll() is None and not self._signals.is_impatient:
            time.sleep(POLL_SECONDS)
            since_beat = control.seconds_since_beat()
            patience = generation.stall_seconds
            if since_beat is None:
                since_beat, patience = time.monotonic() - started, patience * START_PATIENCE
            if since_beat > patience and control.outcome() is None:
                _dump_stacks(control, since_beat)
                return


def _start_torchrun(generation: Generation, directory: Path) -> "subprocess.Popen[bytes]":
    """torchrun in a session of its own, so that Ctrl-C reaches only the supervisor."""
    command = [
        sys.executable,
        "-m",
        "casallm.train.generation",
        str(directory),
        str(generation.ranks),
        uuid.uuid4().hex[:12],
    ]
    environment = environment_for_child(
        OMP_NUM_THREADS=str(generation.threads_per_rank), PYTHONUNBUFFERED="1"
    )
    return subprocess.Popen(command, env=environment, start_new_session=True)


def _kill_generation(process: "subprocess.Popen[bytes]", control: Control) -> None:
    """End torchrun and every rank; ranks have sessions of their own, so each is killed by name."""
    deadline = time.monotonic() + (GRACE_SECONDS if control.outcome() else 0)
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    if process.poll() is None:
        process.kill()
    process.wait()
    for pid in control.rank_pids():
        try:
            os.kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue


def _dump_stacks(control: Control, silent_seconds: float) -> None:
    for pid in control.rank_pids():
        try:
            os.kill(pid, signal.SIGUSR2)
        except ProcessLookupError:
            continue
    time.sleep(1.0)
    log.warning("no step for %.0f s; where the ranks were:", silent_seconds)
    for rank, text in control.stacks().items():
        log.warning("rank %d:\n%s", rank, text.strip() or "(stopped: it could not say)")


def _last_words(control: Control) -> str:
    error = control.first_error()
    if error is None:
        return "the ranks ended without a word (killed, or out of memory)"
    rank, text = error
    log.warning("rank %d said:\n%s", rank, text.rstrip())
    return f"rank {rank} failed: {text.strip().splitlines()[-1]}"
