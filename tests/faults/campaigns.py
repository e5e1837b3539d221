"""The fault campaigns of `make chaos` that concern storage, attempts and checkpoints.

Each is a function of how many faults, a seed and an empty directory; it returns what it found.
The short forms that `make test` runs are in `test_campaigns`.
"""

import random
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from casallm.errors import AttemptError, CasallmError, CheckpointError, StoreError
from casallm.storage.local import LocalStore
from casallm.train.attempts import CheckpointName, assert_leading, attempt_numbers, claim
from casallm.train.checkpoint import fetch, list_checkpoints, newest_good
from casallm.train.journal import merged_metrics
from tests.faults.fault_store import KINDS, Crash, Fault, FaultStore, Turns, World
from tests.faults.tiny_run import STEPS, Session, is_right
from tests.faults.worker import durable_step, start_local, wait_for_progress

CALLS = 90
"""Faults strike within the first so many calls of a process: a start and three saves."""

STARTS = 12
"""Starts of one run before the next run begins."""


@dataclass
class Result:
    """What a campaign did and every promise that it saw broken."""

    faults: int = 0
    broken: list[str] = field(default_factory=list)
    details: dict[str, int] = field(default_factory=dict)

    def count(self, what: str) -> None:
        """One more of `what`."""
        self.details[what] = self.details.get(what, 0) + 1


Campaign = Callable[[int, int, Path], Result]


def commit_protocol(count: int, seed: int, directory: Path) -> Result:
    """A fault at any store call of any start: nothing lost, nothing wrong, history linear."""
    source = random.Random(seed)
    result = Result()
    while result.faults < count:
        run = _SimulatedRun(source, directory, result)
        for _ in range(STARTS):
            run.start_with_a_fault()
            if result.faults >= count:
                break
    return result


def interleaving(count: int, seed: int, directory: Path) -> Result:
    """Two or three processes that all think they lead: the history stays linear and whole."""
    source = random.Random(seed)
    result = Result()
    while result.faults < count:
        run = _SimulatedRun(source, directory, result)
        for _ in range(min(4, count - result.faults)):
            run.start_at_once(source.randint(2, 3))
    return result


def bit_flips(count: int, seed: int, directory: Path) -> Result:
    """One bit of one file of the newest checkpoint flipped: named, and the older one used."""
    source = random.Random(seed)
    result = Result()
    run = LocalStore(directory / "run")
    session = Session(run, directory / "scratch", keep=2)
    session.train()
    newest = session.train()
    session.close()
    paths = sorted(Path(run.url, "checkpoints", str(newest)).iterdir())
    for _ in range(count):
        path = source.choice(paths)
        data = path.read_bytes()
        position = source.randrange(8 * len(data))
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        path.write_bytes(flipped)
        _check_flip(run, path, position, directory, result)
        path.write_bytes(data)
    return result


def kill_while_saving(count: int, seed: int, directory: Path) -> Result:
    """SIGKILL at a random instant of a process that does nothing but save to a local disk."""
    source = random.Random(seed)
    result = Result()
    run, progress = directory / "run", directory / "progress"
    while result.faults < count:
        process = start_local(run, progress)
        wait_for_progress(process, progress)
        time.sleep(source.uniform(0.0, 0.05))
        process.kill()
        process.join()
        result.faults += 1
        _check_killed(LocalStore(run), durable_step(progress), directory, result)
    return result


def claim_race(count: int, seed: int, directory: Path) -> Result:
    """Sixteen starts that all want the same attempt at one moment: one gets it."""
    result = Result()
    for number in range(count):
        run = LocalStore(directory / f"run-{number}")
        together = threading.Barrier(16)
        outcomes: list[str] = []
        threads = [
            threading.Thread(target=_claim_together, args=(run, together, outcomes))
            for _ in range(16)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        result.faults += 1
        if sorted(outcomes) != ["leads", *["lost"] * 15]:
            result.broken.append(f"race {number}: {sorted(outcomes)}")
    return result


class _SimulatedRun:
    """A run whose processes die, sleep and overtake each other; remembers what was promised."""

    def __init__(self, source: random.Random, directory: Path, result: Result) -> None:
        self.world = World(source, on_create=self._remember)
        self.directory = directory
        self.result = result
        self.promised: set[int] = set()
        """Steps whose manifest was created by the attempt that led at that moment."""

    def start_with_a_fault(self) -> None:
        """One process: starts, trains a little, and suffers one fault somewhere."""
        source = self.world.random
        fault = Fault(source.randrange(CALLS), source.choice(KINDS), self._overtake)
        outcome = self._live(FaultStore(self.world, fault), "own")
        if fault.has_happened:
            self.result.faults += 1
            self.result.count(fault.kind)
        self.check(f"{fault.kind} at call {fault.at}, then {outcome}")

    def start_at_once(self, processes: int) -> None:
        """Several processes whose calls are interleaved at random."""
        turns = Turns(self.world.random, processes)

        def live(process: int) -> str:
            store = FaultStore(self.world, turns=turns, process=process)
            try:
                return self._live(store, f"machine-{process}")
            finally:
                turns.leave()

        with ThreadPoolExecutor(processes) as executor:
            outcomes = list(executor.map(live, range(processes)))
        self.result.faults += 1
        self.check(f"{processes} processes at once, ending as {outcomes}")

    def check(self, what: str) -> None:
        """Note every promise that is broken by now."""
        view = FaultStore(self.world)
        newest = newest_good(view, self.directory / "own")
        step = newest.name.step if newest else 0
        if newest and not is_right(newest):
            self.result.broken.append(f"{what}: {newest.name} is accepted and wrong")
        if step < max(self.promised, default=0):
            self.result.broken.append(f"{what}: {max(self.promised)} was promised, {step} is left")
        if len(self.promised) >= 2 and self._n_good(view) < 2:
            self.result.broken.append(f"{what}: fewer than two good checkpoints are left")
        trained = [line["step"] for line in merged_metrics(view)]
        if trained != sorted(set(trained)) or not set(range(1, step + 1)) <= set(trained):
            self.result.broken.append(f"{what}: the metrics do not tell each step once")

    def _overtake(self) -> None:
        self._live(FaultStore(self.world), "another")

    def _live(self, store: FaultStore, machine: str) -> str:
        """The life of one process: start, save one to three times, end or die."""
        try:
            session = Session(store, self.directory / machine)
        except Crash:
            return "crash"
        except CasallmError as error:
            return type(error).__name__
        try:
            return self._train(session)
        except Crash:
            return "crash"
        finally:
            session.close()

    def _train(self, session: Session) -> str:
        if session.start is not None and not is_right(session.start):
            self.result.broken.append(f"{session.start.name} was accepted and is wrong")
        outcome = "end"
        for _ in range(self.world.random.randint(1, 3)):
            try:
                session.train()
            except AttemptError:
                return "fenced"
            except StoreError:
                outcome = "a save failed"
        return outcome

    def _remember(self, created: str) -> None:
        match = re.fullmatch(r"checkpoints/(step-.*)/manifest\.json", created)
        name = CheckpointName.parse(match[1]) if match else None
        if name and max(attempt_numbers(FaultStore(self.world))) == name.attempt:
            self.promised.add(name.step)

    def _n_good(self, view: FaultStore) -> int:
        good = 0
        for name in list_checkpoints(view):
            try:
                good += is_right(fetch(view, name, self.directory / "own"))
            except CheckpointError:
                continue
        return good


def _check_killed(run: LocalStore, promised: int, directory: Path, result: Result) -> None:
    newest = newest_good(run, directory)
    step = newest.name.step if newest else 0
    if step < promised or (newest and not is_right(newest)):
        result.broken.append(f"kill {result.faults}: {promised} was promised, {step} is left")
    trained = [line["step"] for line in merged_metrics(run)]
    if trained[:step] != list(range(1, step + 1)):
        result.broken.append(f"kill {result.faults}: the metrics do not tell each step once")
    result.details["steps"] = step


def _check_flip(
    run: LocalStore, path: Path, position: int, directory: Path, result: Result
) -> None:
    result.faults += 1
    result.count(path.name)
    where = f"bit {position} of {path.name}"
    try:
        fetch(run, list_checkpoints(run)[-1], directory)
        result.broken.append(f"{where}: not noticed")
    except CheckpointError as error:
        if path.name not in str(error):
            result.broken.append(f"{where}: the file is not named ({error})")
    older = newest_good(run, directory)
    if older is None or older.name.step != STEPS or not is_right(older):
        result.broken.append(f"{where}: the older checkpoint is not used")


def _claim_together(run: LocalStore, together: threading.Barrier, outcomes: list[str]) -> None:
    class Simultaneous(LocalStore):
        def create(self, name: str, data: bytes) -> None:
            together.wait()
            super().create(name, data)

    try:
        assert_leading(run, claim(Simultaneous(Path(run.url)), parent=None))
        outcomes.append("leads")
    except AttemptError:
        outcomes.append("lost")


CAMPAIGNS: dict[str, tuple[Campaign, int]] = {
    "commit-protocol": (commit_protocol, 10_000),
    "interleaving": (interleaving, 1_000),
    "bit-flips": (bit_flips, 1_000),
    "kill-while-saving": (kill_while_saving, 100),
    "claim-race": (claim_race, 100),
}
"""Each campaign, and how many faults it injects unless told otherwise."""
