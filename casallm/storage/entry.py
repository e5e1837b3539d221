"""What a store holds: names that are safe anywhere, and the size and hash behind a name."""

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path

from casallm.errors import StoreError

CHUNK_BYTES = 1 << 20
"""How much is read, hashed and copied at a time."""

_SEGMENT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")


@dataclass(frozen=True, order=True)
class Entry:
    """One object in a listing: its name below the store, and its size."""

    name: str
    bytes: int
    version: str = field(default="", compare=False)
    """Of an object in a bucket: its ETag, where the store lists it."""


@dataclass(frozen=True)
class Digest:
    """The size and the lower-case sha256 of some bytes."""

    bytes: int
    sha256: str


def check_name(name: str) -> str:
    """`name` itself, if every "/"-separated part of it is safe; StoreError if not.

    A part has 1 to 200 letters, digits, ".", "_" or "-" and does not begin with "."; so there is
    no "..", no hidden or temporary file, no absolute path and nothing that a shell reads.
    """
    if not all(_SEGMENT.fullmatch(part) for part in name.split("/")):
        raise StoreError(
            f"{name[:200]!r} is not a name that a run may hold: use letters, digits, '.', '_' and"
            " '-', not first '.', in parts separated by '/'"
        )
    return name


def digest_bytes(data: bytes) -> Digest:
    """The digest of `data`."""
    return Digest(len(data), hashlib.sha256(data).hexdigest())


def digest_file(path: Path) -> Digest:
    """The digest of the file at `path`, read once in small pieces."""
    sha256 = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while piece := file.read(CHUNK_BYTES):
            sha256.update(piece)
            size += len(piece)
    return Digest(size, sha256.hexdigest())
