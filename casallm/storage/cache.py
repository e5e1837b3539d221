"""Files of a store on this machine's disk: ahead of their reader, verified, evicted by need.

Any number of processes share one directory. One file is fetched at a time, under a lock that a
killed process lets go, so what lies there never exceeds the limit. Every file is verified on its
way in; one that was there before this process came is hashed when it is first opened, and fetched
again if it is not what it should be.

Evicted is what was opened longest ago and is not expected; where a reader needs more than that
leaves, what is expected last. A reader keeps what it has open, whatever is evicted.
"""

import contextlib
import fcntl
import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from casallm.errors import StoreError
from casallm.storage.entry import Digest, digest_file
from casallm.storage.local import PARTIAL, free_bytes
from casallm.storage.store import Store
from casallm.units import format_bytes

log = logging.getLogger(__name__)

_OPEN_TRIES = 10
_SPARE_BYTES = 64 << 20
"""Left free on the drive: for whatever else is written there."""


class Cache:
    """The `files` of `store`, in `directory` as far as `limit_bytes` goes."""

    def __init__(
        self, store: Store, directory: Path, files: Mapping[str, Digest], *, limit_bytes: int
    ) -> None:
        self._store = store
        self._directory = directory
        self._files = files
        self._limit_bytes = limit_bytes
        self._sound: set[str] = set()
        self._expected: tuple[str, ...] = ()
        self._news = threading.Event()
        self._is_closed = False
        self._thread: threading.Thread | None = None
        directory.mkdir(parents=True, exist_ok=True)

    def open(self, name: str) -> BinaryIO:
        """The whole, verified file `name`, opened; waits until it is here.

        StoreError if the store does not give it.
        """
        for _ in range(_OPEN_TRIES):
            self._bring(name, is_needed=True)
            with contextlib.suppress(FileNotFoundError):  # another process has evicted it
                file = (self._directory / name).open("rb")
                os.utime(file.fileno())
                return file
        raise StoreError(
            f"{self._directory / name} is evicted as often as it is fetched: its readers need more"
            f" than the {format_bytes(self._limit_bytes)} that they may keep"
        )

    def expect(self, names: Sequence[str]) -> None:
        """Say what will be opened, in the order of need: it is fetched behind the reader's back."""
        self._expected = tuple(names)
        self._news.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._fetch_ahead, name="cache", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End the fetching, after the file that is on its way."""
        self._is_closed = True
        self._news.set()
        if self._thread is not None:
            self._thread.join()

    def _fetch_ahead(self) -> None:
        """The body of the thread: what is expected and fits, again whenever that changes."""
        while self._news.wait() and not self._is_closed:
            self._news.clear()
            with contextlib.suppress(StoreError):  # the reader that needs it will say it
                for name in self._expected:
                    if self._news.is_set() or not self._bring(name, is_needed=False):
                        break

    def _bring(self, name: str, *, is_needed: bool) -> bool:
        """Have `name` here and sound; False if it would not fit and is not needed yet."""
        path = self._directory / name
        while True:
            found = _inode(path)
            if found and self._is_sound(name):
                return True
            with self._locked():
                if _inode(path) != found:  # another process was faster: what did it bring?
                    continue
                if found:
                    log.warning("%s is not what it was and is fetched again", path)
                    path.unlink()
                if not self._make_room(name, is_needed=is_needed):
                    return False
                self._store.get(name, path, sha256=self._files[name].sha256)
                self._sound.add(name)
                return True

    def _is_sound(self, name: str) -> bool:
        """Whether `name` is here as it should be; hashed the first time that this is asked."""
        path, digest = self._directory / name, self._files[name]
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_size == digest.bytes and (
                name in self._sound or digest_file(path) == digest
            ):
                self._sound.add(name)
                return True
        return False

    def _make_room(self, name: str, *, is_needed: bool) -> bool:
        """Evict until `name` fits; False, and nothing evicted, if it would not."""
        for leftover in self._directory.glob(f".*{PARTIAL}"):  # of a killed process
            leftover.unlink(missing_ok=True)
        here = {each.name: each.stat() for each in self._directory.iterdir() if self._is_ours(each)}
        expected = [each for each in self._expected if each in here]
        evicted = sorted(here.keys() - expected, key=lambda each: here[each].st_mtime_ns)
        if is_needed:
            evicted += reversed(expected)
        size = self._files[name].bytes
        taken = sum(stat.st_size for stat in here.values())
        missing = max(
            taken + size - self._limit_bytes, size + _SPARE_BYTES - free_bytes(self._directory)
        )
        chosen = []
        while missing > 0 and evicted:
            chosen.append(evicted.pop(0))
            missing -= here[chosen[-1]].st_size
        if missing > 0 and not is_needed:
            return False
        for each in chosen:
            self._sound.discard(each)
            (self._directory / each).unlink(missing_ok=True)
        return True

    def _is_ours(self, path: Path) -> bool:
        return path.name in self._files

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with (self._directory / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _inode(path: Path) -> int | None:
    """What tells a file from one that took its place; None if there is none."""
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None
