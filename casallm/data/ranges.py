"""A remote file, opened for reading: fetched in blocks, one of them ahead of a steady reader."""

import io
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO

BLOCK_BYTES = 8 << 20
"""What one request fetches."""

_KEPT_BLOCKS = 3

Fetch = Callable[[int, int], bytes]
"""The bytes of a file from one offset to another."""


def open_ranges(fetch: Fetch, n_bytes: int) -> BinaryIO:
    """A file of `n_bytes` whose parts `fetch` gets."""
    return io.BufferedReader(_Ranges(fetch, n_bytes), 1 << 16)


class _Ranges(io.RawIOBase):
    """The raw file: a position, and the last blocks that were fetched."""

    def __init__(self, fetch: Fetch, n_bytes: int) -> None:
        self._fetch = fetch
        self._n_bytes = n_bytes
        self._position = 0
        self._blocks: dict[int, Future[bytes]] = {}
        self._last = -2
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """The offset of what is read next."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to an offset, counted from the start, from here, or from the end."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._n_bytes}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: "memoryview | bytearray") -> int:  # type: ignore[override]
        """Fill `buffer` with what follows, as far as the block goes."""
        if self._position >= self._n_bytes:
            return 0
        number, start = divmod(self._position, BLOCK_BYTES)
        part = self._block(number)[start : start + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)

    def close(self) -> None:
        """Fetch nothing more."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        super().close()

    def _block(self, number: int) -> bytes:
        with self._lock:
            wanted = self._ask(number)
            if number == self._last + 1 and (number + 1) * BLOCK_BYTES < self._n_bytes:
                self._ask(number + 1)
            self._last = number
            while len(self._blocks) > _KEPT_BLOCKS:
                self._blocks.pop(next(iter(self._blocks)))
        return wanted.result()

    def _ask(self, number: int) -> Future[bytes]:
        if number not in self._blocks:
            self._pool = self._pool or ThreadPoolExecutor(2, thread_name_prefix="ranges")
            begin = number * BLOCK_BYTES
            end = min(begin + BLOCK_BYTES, self._n_bytes)
            self._blocks[number] = self._pool.submit(self._fetch, begin, end)
        self._blocks[number] = self._blocks.pop(number)  # the youngest goes last
        return self._blocks[number]
