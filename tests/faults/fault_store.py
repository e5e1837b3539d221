"""A store in memory whose every call can go wrong, for campaigns of thousands of faults.

    crash_before   the process dies before the call takes effect
    crash_after    the process dies after it took effect
    torn           half of the object becomes visible, and the process dies
    unavailable    the call fails and has no effect
    lost_ack       the call takes effect, and fails all the same
    delayed        the call fails; it takes effect at some later moment, after other calls
    overtaken      the process sleeps while another one starts, works and ends; then it goes on

Reads know crash_before, unavailable and overtaken alone. A journal is one object that is replaced
again and again: stores replace an object whole, and an older request does not overtake a newer of
the same connection, so that journals are neither torn nor delayed here. Everything that is written
once under its name is.
"""

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from casallm.errors import StoreDamagedError, StoreError, StoreExistsError, StoreNotFoundError
from casallm.storage.entry import Digest, Entry, check_name, digest_bytes
from casallm.storage.local import write_file

T = TypeVar("T")

CRASHES = ("crash_before", "crash_after", "torn")
KINDS = (*CRASHES, "unavailable", "lost_ack", "delayed", "overtaken")


class Crash(BaseException):
    """The process is no more: nothing of ours may catch this."""


class Turns:
    """Lets one of several processes, each a thread, make one store call at a time, at random.

    All wait at their next call before one is picked, so a seed gives one order of calls. The
    process that has just run mostly runs on: that makes the long sleeps that hurt.
    """

    def __init__(self, source: random.Random, processes: int) -> None:
        self._random = source
        self._changed = threading.Condition()
        self._alive = processes
        self._waiting: list[int] = []
        self._turn: int | None = None
        self._last = 0

    def take(self, process: int) -> None:
        """Wait until it is this process's turn to make a call."""
        with self._changed:
            self._waiting.append(process)
            self._pick()
            self._changed.wait_for(lambda: self._turn == process)
            self._turn = None
            self._waiting.remove(process)

    def leave(self) -> None:
        """A process has ended."""
        with self._changed:
            self._alive -= 1
            self._pick()

    def _pick(self) -> None:
        if self._waiting and len(self._waiting) == self._alive:
            goes_on = self._last in self._waiting and self._random.random() < 0.9
            self._turn = self._last if goes_on else self._random.choice(sorted(self._waiting))
            self._last = self._turn
            self._changed.notify_all()


@dataclass
class World:
    """What outlives processes: the objects, and calls that are still on their way."""

    random: random.Random
    objects: dict[str, bytes] = field(default_factory=dict)
    delayed: list[Callable[[], None]] = field(default_factory=list)
    on_create: Callable[[str], None] = lambda name: None
    """Told of every object that was created whole and at once."""

    def let_some_arrive(self) -> None:
        """Let each call that is on its way take effect with a chance of one in twenty."""
        for effect in list(self.delayed):
            if self.random.random() < 0.05:
                self.delayed.remove(effect)
                effect()


@dataclass
class Fault:
    """What happens in the call with index `at`; `overtake` is run where the kind says so."""

    at: int
    kind: str
    overtake: Callable[[], None] = lambda: None
    has_happened: bool = False


class FaultStore:
    """The world as one process sees it, with one fault in store for it."""

    def __init__(
        self,
        world: World,
        fault: Fault | None = None,
        *,
        turns: Turns | None = None,
        process: int = 0,
    ) -> None:
        self.local_path: Path | None = None
        self.url = "memory://world"
        self.calls = 0
        self._world = world
        self._fault = fault
        self._turns = turns
        self._process = process

    def join(self, name: str) -> "FaultStore":
        raise NotImplementedError("campaigns use one store")

    def read(self, name: str) -> bytes:
        return self._reading(lambda: self._content(name))

    def exists(self, name: str) -> bool:
        return self._reading(lambda: check_name(name) in self._world.objects)

    def list(self, prefix: str = "") -> list[Entry]:
        objects = self._world.objects
        return self._reading(
            lambda: sorted(Entry(n, len(d)) for n, d in objects.items() if n.startswith(prefix))
        )

    def matches(self, name: str, digest: Digest) -> bool:
        return self._reading(lambda: digest_bytes(self._content(name)) == digest)

    def get(self, name: str, path: Path, *, sha256: str | None = None) -> None:
        data = self._reading(lambda: self._content(name))
        if sha256 not in (None, digest_bytes(data).sha256):
            raise StoreDamagedError(f"{name} is damaged where it lies")
        write_file(path, [data])

    def put(self, name: str, path: Path, *, sha256: str | None = None) -> None:
        self.write(name, path.read_bytes())

    def write(self, name: str, data: bytes) -> None:
        check_name(name)

        def effect(content: bytes = data) -> None:
            self._world.objects[name] = content

        if name.startswith("attempts/"):
            self._writing(effect, None, delayed_effect=None)
        else:
            self._writing(effect, lambda: effect(data[: len(data) // 2]), delayed_effect=effect)

    def create(self, name: str, data: bytes) -> None:
        check_name(name)

        def effect(content: bytes = data) -> None:
            if self._world.objects.setdefault(name, content) not in (content, data):
                raise StoreExistsError(f"{name} exists already")

        def whole_effect() -> None:
            effect()
            self._world.on_create(name)

        self._writing(whole_effect, lambda: effect(data[: len(data) // 2]), delayed_effect=effect)

    def delete(self, name: str) -> None:
        check_name(name)

        def effect() -> None:
            self._world.objects.pop(name, None)

        self._writing(effect, None, delayed_effect=effect)

    def discard_unfinished(self, is_stale: Callable[[str], bool]) -> int:
        return self._reading(lambda: 0)

    def _content(self, name: str) -> bytes:
        if check_name(name) not in self._world.objects:
            raise StoreNotFoundError(f"there is no {name}")
        return self._world.objects[name]

    def _reading(self, effect: Callable[[], T]) -> T:
        kind = self._next_fault()
        if kind in CRASHES:
            raise Crash
        if kind in ("unavailable", "lost_ack", "delayed"):
            raise StoreError("the store cannot be reached")
        return effect()

    def _writing(
        self,
        effect: Callable[[], None],
        torn_effect: Callable[[], None] | None,
        *,
        delayed_effect: Callable[[], None] | None,
    ) -> None:
        kind = self._next_fault()
        if kind == "torn" and torn_effect:
            torn_effect()
        if kind in ("crash_before", "torn"):
            raise Crash
        if kind == "unavailable" or (kind == "delayed" and delayed_effect is None):
            raise StoreError("the store cannot be reached")
        if kind == "delayed" and delayed_effect:
            self._world.delayed.append(lambda: _quietly(delayed_effect))
            raise StoreError("the store did not answer")
        effect()
        if kind == "crash_after":
            raise Crash
        if kind == "lost_ack":
            raise StoreError("the store did not answer")

    def _next_fault(self) -> str | None:
        """Count a call, wait for its turn; the kind of fault that it suffers."""
        if self._turns:
            self._turns.take(self._process)
        self._world.let_some_arrive()
        fault, index = self._fault, self.calls
        self.calls += 1
        if fault is None or index != fault.at:
            return None
        fault.has_happened = True
        if fault.kind != "overtaken":
            return fault.kind
        fault.overtake()
        return None


def _quietly(effect: Callable[[], None]) -> None:
    try:
        effect()
    except StoreExistsError:
        return
