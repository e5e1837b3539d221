"""What `RemoteStore` asks of an object store: requests that are made, repeated and timed.

A bucket moves bytes and promises nothing about them: whether they are right is checked by
`RemoteStore`, with the MD5 that many stores compute on arrival where there is one.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from casallm.storage.entry import Entry

PART_BYTES = 16 << 20
"""What one request carries: small enough to repeat, large enough to be fast."""

PARALLEL_REQUESTS = 4
"""Requests of one transfer that run at a time: 64 MiB of memory, and cores left for training."""

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Stat:
    """An object's size, and the MD5 of its content where the store tells it."""

    bytes: int
    md5: str | None


@dataclass(frozen=True)
class Source:
    """Bytes to upload, read piece by piece and more than once if need be."""

    n_bytes: int
    read: Callable[[int, int], bytes]
    """From one offset to another."""

    @classmethod
    def of_bytes(cls, data: bytes) -> "Source":
        """A source in memory."""
        return cls(len(data), lambda begin, end: data[begin:end])

    @classmethod
    def of_file(cls, path: Path) -> "Source":
        """A source on disk."""

        def read(begin: int, end: int) -> bytes:
            with path.open("rb") as file:
                file.seek(begin)
                return file.read(end - begin)

        return cls(path.stat().st_size, read)


class Bucket(Protocol):
    """An object store below a prefix; keys are names as `entry.check_name` allows them."""

    url: str

    def stat(self, key: str) -> Stat:
        """The size of `key`; StoreNotFoundError if there is none."""

    def fetch(self, key: str, begin: int, end: int) -> bytes:
        """The bytes of `key` from `begin` to `end`, or as far as it goes."""

    def upload(self, key: str, source: Source) -> bool:
        """Replace `key`, whole or not at all; True if the store confirmed the content's MD5."""

    def create(self, key: str, data: bytes) -> bool:
        """Make `key`, StoreExistsError if it exists; True if the store confirmed the MD5.

        Some stores ignore the condition: RemoteStore finds out.
        """

    def scan(self, prefix: str) -> list[Entry]:
        """All objects whose key begins with `prefix`."""

    def remove(self, key: str) -> None:
        """Delete `key`; missing is fine."""

    def discard_unfinished(self, prefix: str, is_stale: Callable[[str], bool]) -> int:
        """Abort open uploads below `prefix` whose key is stale; how many."""


def ranges(size: int, part_bytes: int) -> list[tuple[int, int]]:
    """`size` bytes cut into parts: begin and end of each."""
    return [(begin, min(begin + part_bytes, size)) for begin in range(0, size, part_bytes)]


def in_parallel(function: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
    """`function` of each item, in order, a few of them ahead of the reader on threads."""
    with ThreadPoolExecutor(PARALLEL_REQUESTS, thread_name_prefix="transfer") as executor:
        ahead: list[Future[U]] = []
        try:
            for item in items:
                ahead.append(executor.submit(function, item))
                if len(ahead) >= PARALLEL_REQUESTS:
                    yield ahead.pop(0).result()
            while ahead:
                yield ahead.pop(0).result()
        finally:
            for future in ahead:
                future.cancel()
