"""A directory on this machine as a store.

Every file appears whole or not at all, also after a power cut: it is written under a temporary
name, synced, renamed into place, and the directory is synced. Temporary names begin with "." and
end with ".partial"; listings skip them, and `discard_unfinished` removes those that a kill left.
"""

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from casallm.errors import StoreDamagedError, StoreError, StoreExistsError, StoreNotFoundError
from casallm.storage.entry import CHUNK_BYTES, Digest, Entry, check_name, digest_file
from casallm.units import format_bytes

PARTIAL = ".partial"


class LocalStore:
    """The files below a local directory, which need not exist yet."""

    def __init__(self, root: Path) -> None:
        self.local_path: Path | None = root
        self._root = root

    @property
    def url(self) -> str:
        """The directory, as it was given."""
        return str(self._root)

    def __repr__(self) -> str:
        return f"LocalStore({self.url!r})"

    def join(self, name: str) -> "LocalStore":
        """The store of the sub-directory `name`."""
        return LocalStore(self._path(name))

    def read(self, name: str) -> bytes:
        """The whole content of `name`."""
        path = self._path(name)
        with _explained(path, "read"):
            return path.read_bytes()

    def write(self, name: str, data: bytes) -> None:
        """Make `data` the content of `name`, whole or not at all."""
        write_file(self._path(name), [data])

    def create(self, name: str, data: bytes) -> None:
        """Make `name` with `data` unless it exists; a hard link decides between two creators."""
        path = self._path(name)
        with _explained(path, "write", len(data)):
            path.parent.mkdir(parents=True, exist_ok=True)
            with _partial(path) as (file, partial):
                file.write(data)
                _sync(file)
                try:
                    _link(partial, path)
                except FileExistsError:
                    if path.read_bytes() != data:
                        raise StoreExistsError(f"{path} exists already") from None
            _sync_directory(path.parent)

    def get(self, name: str, path: Path, *, sha256: str | None = None) -> None:
        """Copy `name` to the local file `path`, checked against `sha256` where given."""
        source = self._path(name)
        with _explained(source, "read"):
            source.stat()
        write_file(path, _pieces(source), sha256=sha256, source=str(source))

    def put(self, name: str, path: Path, *, sha256: str | None = None) -> None:
        """Copy the local file `path` to `name`, checked against `sha256` where given."""
        write_file(self._path(name), _pieces(path), sha256=sha256, source=str(path))

    def matches(self, name: str, digest: Digest) -> bool:
        """Whether the content of `name` is what `digest` says."""
        path = self._path(name)
        with _explained(path, "read"):
            return path.stat().st_size == digest.bytes and digest_file(path) == digest

    def list(self, prefix: str = "") -> list[Entry]:
        """All files whose name begins with `prefix`, at any depth, sorted by name."""
        folder = prefix.rpartition("/")[0]
        root = self._path(folder) if folder else self._root
        with _explained(root, "list"):
            found = [entry for entry in self._walk(root) if entry.name.startswith(prefix)]
        return sorted(found)

    def exists(self, name: str) -> bool:
        """Whether there is a file `name`."""
        path = self._path(name)
        with _explained(path, "read"):
            return path.is_file()

    def delete(self, name: str) -> None:
        """Remove `name` and the directories that this leaves empty; missing is fine."""
        path = self._path(name)
        with _explained(path, "delete"):
            path.unlink(missing_ok=True)
        for folder in path.parents:
            if folder == self._root:
                break
            try:
                folder.rmdir()
            except OSError:
                break

    def discard_unfinished(self, is_stale: Callable[[str], bool]) -> int:
        """Remove what killed writes left of the names that are stale; how many there were."""
        discarded = 0
        with _explained(self._root, "delete"):
            for path in self._root.rglob(f".*{PARTIAL}"):
                target = path.name[1:].removesuffix(PARTIAL).rpartition(".")[0]
                if target and is_stale(path.with_name(target).relative_to(self._root).as_posix()):
                    path.unlink(missing_ok=True)
                    discarded += 1
        return discarded

    def _path(self, name: str) -> Path:
        return self._root / check_name(name)

    def _walk(self, folder: Path) -> Iterator[Entry]:
        for directory, _, names in os.walk(folder):
            for name in names:
                path = Path(directory, name)
                with contextlib.suppress(FileNotFoundError):
                    if not name.startswith("."):
                        yield Entry(path.relative_to(self._root).as_posix(), path.stat().st_size)


def write_file(
    path: Path,
    pieces: Iterable[bytes | memoryview],
    *,
    sha256: str | None = None,
    source: str = "the content",
) -> Digest:
    """Write `pieces` to `path`, whole or not at all; the digest of what was written.

    Where `sha256` is given and the pieces, read from `source`, are not what it says, nothing is
    written and StoreDamagedError says so.
    """
    hasher = hashlib.sha256()
    size = 0
    with _explained(path, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _partial(path) as (file, partial):
            for piece in pieces:
                file.write(piece)
                hasher.update(piece)
                size += len(piece)
            if sha256 not in (None, hasher.hexdigest()):
                raise StoreDamagedError(
                    f"{source} is damaged: its sha256 is {hasher.hexdigest()[:12]}… and should be"
                    f" {str(sha256)[:12]}…"
                )
            _sync(file)
            partial.replace(path)
        _sync_directory(path.parent)
    return Digest(size, hasher.hexdigest())


def free_bytes(path: Path) -> int:
    """What is free on the drive that holds `path` or will hold it."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free


@contextlib.contextmanager
def temporary_path(path: Path) -> Iterator[Path]:
    """A free name beside `path`, in which nothing is left afterwards unless it was renamed."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(6)}{PARTIAL}")
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _partial(path: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """A new file beside `path` under a temporary name, gone afterwards unless it was renamed."""
    with temporary_path(path) as partial, partial.open("xb") as file:
        yield file, partial


def _link(partial: Path, path: Path) -> None:
    try:
        os.link(partial, path)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        raise StoreError(
            f"the drive of {path.parent} has no hard links, by which two starts of a run are told"
            " apart: keep the run on another drive or in a bucket"
        ) from None


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(CHUNK_BYTES):
            yield piece


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _explained(path: Path, doing: str, needed_bytes: int = 0) -> Iterator[None]:
    """Turn an OSError into a StoreError that says what to do."""
    try:
        yield
    except FileNotFoundError as error:
        raise StoreNotFoundError(f"there is no {error.filename or path}") from None
    except OSError as error:
        raise StoreError(_advice(error, path, doing, needed_bytes)) from error


def _advice(error: OSError, path: Path, doing: str, needed_bytes: int) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        need = f"it needs {format_bytes(needed_bytes)}, " if needed_bytes else ""
        return (
            f"the drive is full: {path} cannot be written ({need}{format_bytes(free_bytes(path))}"
            " free): free some space or use another drive"
        )
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        return f"you may not {doing} {path} ({error.strerror}): change its rights or use another"
    return f"cannot {doing} {path} ({error.strerror}): check the path and the drive"
