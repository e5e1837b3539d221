"""The files of documents that a path, a glob or a URL names.

On this machine and in a bucket it is a file, a directory (searched to the bottom; hidden names left
out) or a glob; on the web, one file by https. A file whose name begins with `val-`, `val.`,
`validation` or `valid-` is the source's own held-out part when the source holds other files too.
"""

import functools
import glob
import hashlib
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal

from casallm.data.documents import FORMATS, Readable, format_of
from casallm.data.manifest import Split
from casallm.data.ranges import open_ranges
from casallm.data.web import open_web
from casallm.errors import DataError
from casallm.storage.bucket import Bucket
from casallm.storage.entry import Entry
from casallm.storage.store import open_bucket

logger = logging.getLogger(__name__)

BUCKETS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")
"""The schemes of URLs that are buckets."""

_SAMPLE_BLOCKS = 16
_SAMPLE_BYTES = 1 << 20
_VAL_NAME = re.compile(r"(val|valid|validation)[-_.]", re.IGNORECASE)
_WILD = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class SourceFile:
    """One file of documents; `name` is its path beneath what was named."""

    path: Readable
    name: str
    format: str
    n_bytes: int
    split: Split | None
    """None: documents are held out by hash."""
    version: str = ""
    """What tells its content from another; empty: it has to be read for that."""


@dataclass(frozen=True)
class BucketFile:
    """An object in a bucket; opened, it is read in parts."""

    bucket: str
    key: str
    n_bytes: int

    def __str__(self) -> str:
        return f"{self.bucket}/{self.key}"

    @property
    def name(self) -> str:
        """The last part of its key."""
        return PurePosixPath(self.key).name

    def open(self, mode: Literal["rb"] = "rb") -> BinaryIO:
        """Open it for reading."""
        return open_ranges(functools.partial(_bucket(self.bucket).fetch, self.key), self.n_bytes)


def is_url(text: str) -> bool:
    """Whether `text` names something that is not on this machine."""
    return "://" in text


def is_bucket(place: str) -> bool:
    """Whether `place` is the URL of something in a bucket."""
    scheme, separator, _ = place.partition("://")
    return bool(separator) and scheme in BUCKETS


def list_files(text: str) -> tuple[SourceFile, ...]:
    """The files of documents that `text` names; DataError if there are none."""
    if not is_url(text):
        return _list_local(text)
    scheme = text.partition("://")[0]
    if scheme in ("http", "https"):
        return _list_web(text)
    if not is_bucket(text):
        raise DataError(
            f"{scheme}:// is no kind of place that documents are read from: use https://, s3:// or"
            " gs://, or fetch the files"
        )
    return _list_bucket(text)


def sampled_hash(path: Readable) -> str:
    """The hash of a file's size and of 16 evenly spaced blocks of 1 MiB, first and last included.

    So all of a file of up to 16 MiB.
    """
    try:
        with path.open("rb") as raw:
            n_bytes = raw.seek(0, os.SEEK_END)
            digest = hashlib.sha256(f"{n_bytes}".encode())
            last = max(0, n_bytes - _SAMPLE_BYTES)
            for block in range(_SAMPLE_BLOCKS):
                raw.seek(block * last // (_SAMPLE_BLOCKS - 1))
                digest.update(raw.read(_SAMPLE_BYTES))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check the file") from None
    return digest.hexdigest()


def _list_local(text: str) -> tuple[SourceFile, ...]:
    root = Path(text)
    if root.is_file():
        if format_of(root.name) is None:
            raise DataError(f"{text} is no file of documents: its name must end in {_suffixes()}")
        found = [root]
    elif root.is_dir():
        found = [path for path in sorted(root.rglob("*")) if not _is_hidden(path, root)]
    else:
        found = [Path(match) for match in sorted(glob.glob(text, recursive=True))]  # noqa: PTH207
        if not found:
            raise DataError(
                f"there is no file or directory {text!r}, and as a glob it matches nothing: check"
                " data.source, or use builtin, or owner/name for a data set of the hub"
            )
    files = [path for path in found if path.is_file()]
    paths = [path for path in files if format_of(path.name) is not None]
    _say_left_out(text, len(files) - len(paths), len(paths))
    name = (lambda path: str(path.relative_to(root))) if root.is_dir() else (lambda path: path.name)
    return _with_splits([_local_file(path, name(path)) for path in paths])


def _list_bucket(url: str) -> tuple[SourceFile, ...]:
    """The objects at, beneath, or matched by `url`."""
    scheme, _, rest = url.partition("://")
    name, _, wanted = rest.partition("/")
    bucket = _bucket(f"{scheme}://{name}")
    wild = _WILD.search(wanted)
    base = wanted[: wild.start()] if wild else wanted.rstrip("/")
    entries = [entry for entry in bucket.scan(base) if _is_wanted(entry.name, wanted)]
    if not entries:
        raise DataError(f"there is nothing at {url}: check data.source")
    read = [entry for entry in entries if format_of(entry.name) is not None]
    _say_left_out(url, len(entries) - len(read), len(read))
    folder = base.rpartition("/")[0] if wild or read[0].name == base else base
    return _with_splits([_bucket_file(bucket, entry, folder) for entry in sorted(read)])


def _list_web(url: str) -> tuple[SourceFile, ...]:
    name = PurePosixPath(url.partition("?")[0]).name
    kind = format_of(name)
    if kind is None:
        raise DataError(f"{url} is no file of documents: its name must end in {_suffixes()}")
    file, version = open_web(url)
    return _with_splits([SourceFile(file, name, kind, file.n_bytes, None, version)])


def _local_file(path: Path, name: str) -> SourceFile:
    try:
        with path.open("rb"):
            n_bytes = path.stat().st_size
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}): check its permissions"
        ) from None
    return SourceFile(path, name, format_of(name) or "", n_bytes, None)


def _bucket_file(bucket: Bucket, entry: Entry, folder: str) -> SourceFile:
    name = entry.name.removeprefix(f"{folder}/")
    path = BucketFile(bucket.url, entry.name, entry.bytes)
    version = f"{entry.version} {entry.bytes}" if entry.version else ""
    return SourceFile(path, name, format_of(name) or "", entry.bytes, None, version)


def _is_wanted(key: str, wanted: str) -> bool:
    """Whether `key` is what was named, or beneath it, or matched by it, and not hidden."""
    if _WILD.search(wanted):
        return PurePosixPath(key).match(wanted) and key.count("/") == wanted.count("/")
    folder = wanted.rstrip("/")
    beneath = key.removeprefix(f"{folder}/" if folder else "")
    is_there = key == folder or not folder or key.startswith(f"{folder}/")
    return is_there and not any(part.startswith(".") for part in beneath.split("/"))


def _with_splits(files: Sequence[SourceFile]) -> tuple[SourceFile, ...]:
    if not any(file.n_bytes for file in files):
        raise DataError(f"{files[0].path} is empty, and so is all of the source: name another file")
    held_out = [_VAL_NAME.match(file.path.name) is not None for file in files]
    if not any(held_out) or all(held_out):
        return tuple(files)
    return tuple(
        replace(file, split="val" if is_val else "train")
        for file, is_val in zip(files, held_out, strict=True)
    )


def _say_left_out(text: str, n_other: int, n_read: int) -> None:
    if not n_read:
        raise DataError(f"{text} holds no documents: no file in it ends in {_suffixes()}")
    if n_other:
        logger.warning(
            "%s: %d files that end in none of %s are left out", text, n_other, _suffixes()
        )


def _is_hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _suffixes() -> str:
    return ", ".join(FORMATS)


@functools.lru_cache(maxsize=4)
def _bucket(url: str) -> Bucket:
    return open_bucket(url)
