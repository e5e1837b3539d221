"""The outer process of a run: claims the attempt, starts the ranks, and answers for how they end.

One generation of ranks is one torchrun with a fresh rendezvous id. torchrun never restarts
anything itself; when a rank dies or hangs, this process ends the generation and starts the next
from the newest good checkpoint, a bounded number of times. A stop signal becomes a note that the
ranks act on at a step boundary. Exit codes: 0 done, 1 a person must look, 75 run me again.
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from casallm.errors import TrainingError
from casallm.train.control import (
    Control,
    Outcome,
    Spec,
    StopRequest,
    environment_for_child,
)
from casallm.train.nodes import Follower, Leader, Place
from casallm.train.preemption import SignalWatch, heed_notices

log = logging.getLogger(__name__)

EXIT_DONE, EXIT_FAILED, EXIT_AGAIN = 0, 1, 75

MAX_RESTARTS = 3
"""Generations that may fail one after the other without a new checkpoint between them."""

POLL_SECONDS = 0.1
START_PATIENCE = 3.0
"""Before the first step (compiling, loading) a generation may take this many times as long."""

GRACE_SECONDS = 10.0
"""How long ranks may take to die before they are killed."""

EXIT_SECONDS = 60.0
"""How long after the outcome all processes may take; torchrun itself gives ranks thirty."""


@dataclass(frozen=True)
class Generation:
    """What the ranks of one node are to do; `spec` is read by every rank."""

    spec: Spec
    place: Place
    ranks: int
    """Of this node."""
    threads_per_rank: int
    stall_seconds: float


class Supervisor:
    """Runs generations until one finishes, stops, or fails beyond repair.

    `next_generation` is asked before each one for what its ranks are to do (it finds the newest
    good checkpoint); `newest_step` says how far the run is safely stored. With a `leader` the
    ranks of other nodes begin and end with those of this one.
    """

    def __init__(
        self,
        next_generation: Callable[[], Generation],
        newest_step: Callable[[], int],
        leader: Leader | None = None,
    ) -> None:
        self._next_generation = next_generation
        self._newest_step = newest_step
        self._leader = leader
        self._control: Control | None = None
        self._request: StopRequest | None = None
        self._signals = SignalWatch(self.request_stop)
        self._first = 0

    def request_stop(self, request: StopRequest) -> None:
        """Let the ranks save and end; called from signal handlers and notice pollers."""
        self._request = self._request or request
        if self._control:
            self._control.request_stop(request)

    def run(self) -> Outcome:
        """The outcome of the last generation; raises TrainingError when restarts are used up."""
        self._signals.install()
        self._first = self._newest_step()
        failures, stored = 0, self._first
        while True:
            with tempfile.TemporaryDirectory(prefix="casallm-") as directory:
                self._control = Control(Path(directory))
                if self._request:
                    self._control.request_stop(self._request)
                outcome = self._run_generation(self._next_generation(), self._control)
                if outcome:
                    return outcome
                words = last_words(self._control, self._leader)
                self._control = None
            newest = self._newest_step()
            failures = failures + 1 if newest <= stored else 1
            stored = max(newest, stored)
            if self._request:
                return Outcome("stopped", stored, f"{self._request.reason}, while ranks had failed")
            if failures > MAX_RESTARTS and stored > self._first:
                return Outcome("stopped", stored, f"ranks failed {failures} times: {words}")
            if failures > MAX_RESTARTS:
                raise TrainingError(f"ranks failed {failures} times in a row; the last: {words}")
            log.warning("%s; starting the ranks again from step %s", words, f"{stored:,}")

    def _run_generation(self, generation: Generation, control: Control) -> Outcome | None:
        """How the ranks ended, or None if they died or hung and may be started again."""
        port = self._gather(self._leader, generation.spec) if self._leader else None
        if isinstance(port, Outcome):
            return port
        process = start_torchrun(generation, control, port)
        try:
            self._watch(process, generation, control)
        finally:
            end_generation(process, control)
            if self._leader:
                self._leader.end()
        outcome = control.outcome()
        if outcome is None and self._signals.is_impatient:
            return Outcome("failed", self._newest_step(), "stopped at once, without a save")
        return outcome

    def _gather(self, leader: Leader, spec: Spec) -> int | Outcome:
        """The port at which the ranks of all nodes meet, or the end of a run that lacks a node."""
        stored = self._newest_step()
        try:
            port = leader.start(spec, lambda: self._request is not None)
        except TrainingError as error:
            if stored <= self._first:
                raise
            return Outcome("stopped", stored, str(error))
        return port or Outcome("stopped", stored, "stopped before all nodes were there")

    def _watch(
        self, process: "subprocess.Popen[bytes]", generation: Generation, control: Control
    ) -> None:
        """Wait until the ranks have ended, hang, or somebody insists."""
        started = time.monotonic()
        while process.poll() is None and not self._signals.is_impatient:
            time.sleep(POLL_SECONDS)
            if control.outcome():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(EXIT_SECONDS)
                return
            since_beat = control.seconds_since_beat()
            patience = generation.stall_seconds
            if since_beat is None:
                since_beat, patience = time.monotonic() - started, patience * START_PATIENCE
            if since_beat > patience and not control.is_in_last_save():
                _dump_stacks(control, since_beat)
                return
            if self._leader and self._leader.failure():
                return


def follow(
    follower: Follower,
    localize: Callable[[Spec], Generation],
    notices: Literal["off", "aws", "gcp"] = "off",
) -> int:
    """Run the generations that node 0 orders, on a node that is not node 0; the exit code.

    `localize` makes node 0's spec one for this machine, and `notices` says whose notices of
    preemption it gets: each machine hears only of its own.
    """
    ranks = _FollowedRanks(follower)
    SignalWatch(ranks.request_stop).install()
    with heed_notices(notices, ranks.request_stop):
        for order in follower.orders():
            ranks.end()
            if order["kind"] == "done":
                return int(order["code"])
            if order["kind"] == "start":
                ranks.start(localize(Spec(**order["spec"])), order["port"])
    ranks.end()
    log.warning("node 0 is gone: this node's ranks have ended, run the same command again")
    return EXIT_AGAIN


class _FollowedRanks:
    """The ranks of one node while another node decides when they begin and end."""

    def __init__(self, follower: Follower) -> None:
        self._follower = follower
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._control: Control | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._request: StopRequest | None = None
        self._is_ending = False

    def request_stop(self, request: StopRequest) -> None:
        self._request = self._request or request
        if self._control:
            self._control.request_stop(request)

    def start(self, generation: Generation, port: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="casallm-")
        self._control = Control(Path(self._folder.name))
        if self._request:
            self._control.request_stop(self._request)
        self._is_ending = False
        self._process = start_torchrun(generation, self._control, port)
        threading.Thread(target=self._report, args=(self._process,), daemon=True).start()

    def end(self) -> None:
        self._is_ending = True
        if self._process and self._control and self._folder:
            end_generation(self._process, self._control, patience_seconds=GRACE_SECONDS)
            self._folder.cleanup()
        self._process = self._control = self._folder = None

    def _report(self, process: "subprocess.Popen[bytes]") -> None:
        control = self._control
        if process.wait() != 0 and control and not self._is_ending:
            self._follower.report_failure(last_words(control))


def start_torchrun(
    generation: Generation, control: Control, port: int | None
) -> "subprocess.Popen[bytes]":
    """torchrun in a session of its own, so that Ctrl-C reaches only the supervisor."""
    control.write_spec(generation.spec)
    command = [
        *(sys.executable, "-m", "casallm.train.generation"),
        *(str(control.directory), str(generation.ranks)),
    ]
    place = generation.place
    if place.n_nodes > 1:
        command += [str(place.n_nodes), str(place.node), place.master_addr, str(port)]
    environment = environment_for_child(
        OMP_NUM_THREADS=str(generation.threads_per_rank), PYTHONUNBUFFERED="1"
    )
    return subprocess.Popen(command, env=environment, start_new_session=True)


def end_generation(
    process: "subprocess.Popen[bytes]", control: Control, patience_seconds: float = 0.0
) -> None:
    """End torchrun and every rank; ranks have sessions of their own, so each is killed by name."""
    deadline = time.monotonic() + (GRACE_SECONDS if control.outcome() else patience_seconds)
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


def last_words(control: Control, leader: Leader | None = None) -> str:
    """Why the ranks of this node failed, as the first of them said it, or another node's did."""
    outcome, error = control.outcome(), control.first_error()
    if outcome is not None:
        return outcome.reason
    if error is None and leader and leader.failure():
        return str(leader.failure())
    if error is None:
        return "the ranks ended without a word (killed, or out of memory)"
    rank, text = error
    summary, _, traceback = text.partition("\n")
    log.warning("rank %d said:\n%s", rank, traceback.rstrip())
    return f"rank {rank} failed: {summary}"
