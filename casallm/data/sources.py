"""Where documents come from: what a person names, as files cut into units of work.

`data.source` is `builtin`, a file, a directory (searched to the bottom; hidden names left out) or
a glob. A file whose name begins with `val-`, `val.`, `validation` or `valid-` is the source's own
held-out part when the source holds other files too.

A unit is what one worker prepares at a time and what the names of shards derive from: consecutive
whole row groups of a parquet file, a byte range cut at line ends, or one compressed file, of about
400 MB of text; consecutive small ones of the same split together. Units follow from the source
alone (names, sizes, parquet footers), never from the number of workers.

A source's fingerprint covers the relative name, size and content of every file: 16 evenly spaced
blocks of 1 MiB, the first and the last included, so all of a file of up to 16 MiB. An edit
elsewhere in a large file that keeps its size is not noticed.
"""

import glob
import hashlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from casallm.config import Config, canonical_json, sha256_of
from casallm.data.builtin import builtin_identity, write_builtin
from casallm.data.documents import FORMATS, Piece, format_of, open_parquet
from casallm.data.manifest import Split
from casallm.errors import DataError

logger = logging.getLogger(__name__)

BUILTIN = "builtin"
UNIT_BYTES = 400_000_000
"""Text in a unit, about: 90M tokens, the size of one shard."""

COMPRESSION = 3
"""How much smaller compressed text is taken to be; only estimates depend on it."""

_SAMPLE_BLOCKS = 16
_SAMPLE_BYTES = 1 << 20
_VAL_NAME = re.compile(r"(val|valid|validation)[-_.]", re.IGNORECASE)


class DataConfig(Config):
    """Which documents a model is trained on."""

    source: str = BUILTIN
    """builtin, or a file, directory or glob of parquet, jsonl(.gz, .zst) or txt; or shards."""
    text_column: str = "text"
    """The column (parquet) or field (jsonl) that holds a document's text."""


@dataclass(frozen=True)
class SourceFile:
    """One file of documents; `name` is its path beneath what was named."""

    path: Path
    name: str
    format: str
    n_bytes: int
    split: Split | None
    """None: documents are held out by hash."""


@dataclass(frozen=True)
class Unit:
    """Pieces of files that one worker prepares together."""

    name: str
    split: Split | None
    pieces: tuple[Piece, ...]

    @property
    def text_bytes(self) -> int:
        """About how much text it holds."""
        return sum(piece.text_bytes for piece in self.pieces)


class Source(Protocol):
    """Documents that can be prepared; `identity` goes into the manifest."""

    @property
    def text_column(self) -> str:
        """The column or field that holds a document's text."""

    @property
    def identity(self) -> dict[str, Any]:
        """`name` and `fingerprint`, and what else tells a person what this was."""

    def units(self, scratch: Path) -> list[Unit]:
        """The units of work; documents that must be made first go into `scratch`."""


@dataclass(frozen=True)
class FileSource:
    """Files that a person named."""

    text: str
    files: tuple[SourceFile, ...]
    text_column: str

    @property
    def identity(self) -> dict[str, Any]:
        """The last part of the name, and what the fingerprint covers."""
        digest = hashlib.sha256(canonical_json(self.text_column).encode())
        for file in self.files:
            digest.update(canonical_json([file.name, _sampled_hash(file)]).encode())
        return {
            "name": Path(self.text).name,
            "files": len(self.files),
            "bytes": sum(file.n_bytes for file in self.files),
            "fingerprint": digest.hexdigest(),
        }

    def units(self, scratch: Path) -> list[Unit]:
        """Units over the files as they lie."""
        return plan_units(self.files, self.text_column)


@dataclass(frozen=True)
class BuiltinSource:
    """The corpus made of botocore's documentation."""

    text_column: str = "text"

    @property
    def identity(self) -> dict[str, Any]:
        """botocore's version and hash, and the fingerprint over both."""
        made_of = builtin_identity()
        return {"name": BUILTIN, **made_of, "fingerprint": sha256_of(made_of)}

    def units(self, scratch: Path) -> list[Unit]:
        """Units over the corpus, which is written into `scratch` if it is not there."""
        if not all((scratch / f"{split}.jsonl").exists() for split in ("train", "val")):
            write_builtin(scratch)
        return FileSource(BUILTIN, _list_files(str(scratch)), self.text_column).units(scratch)


def open_source(text: str, *, text_column: str = "text") -> Source:
    """The source that `text` names; DataError if there is nothing to read there."""
    if text == BUILTIN:
        return BuiltinSource()
    return FileSource(text, _list_files(text), text_column)


def plan_units(files: Sequence[SourceFile], text_column: str) -> list[Unit]:
    """`files` as units of about UNIT_BYTES of text, in order."""
    units: list[Unit] = []
    name, split, pieces, size = "", None, list[Piece](), 0
    for i, file in enumerate(files):
        for j, piece in enumerate(_pieces(file, text_column)):
            if pieces and (size + piece.text_bytes > UNIT_BYTES or split != file.split):
                units.append(Unit(name, split, tuple(pieces)))
                pieces, size = [], 0
            if not pieces:
                name, split = f"f{i:05d}p{j:04d}", file.split
            pieces.append(piece)
            size += piece.text_bytes
    return [*units, Unit(name, split, tuple(pieces))] if pieces else units


def _pieces(file: SourceFile, text_column: str) -> Iterator[Piece]:
    if file.format == "parquet":
        yield from _row_groups(file, text_column)
    elif file.format in ("jsonl", "txt"):
        for start in range(0, file.n_bytes, UNIT_BYTES):
            stop = min(start + UNIT_BYTES, file.n_bytes)
            yield Piece(file.path, file.format, start, stop, stop - start)
    else:
        yield Piece(file.path, file.format, 0, file.n_bytes, file.n_bytes * COMPRESSION)


def _row_groups(file: SourceFile, text_column: str) -> Iterator[Piece]:
    """Consecutive row groups of about UNIT_BYTES of text together."""
    metadata = open_parquet(file.path, text_column).metadata
    start = size = 0
    for group in range(metadata.num_row_groups):
        columns = map(metadata.row_group(group).column, range(metadata.num_columns))
        text_bytes = sum(
            column.total_uncompressed_size
            for column in columns
            if column.path_in_schema == text_column
        )
        if group > start and size + text_bytes > UNIT_BYTES:
            yield Piece(file.path, file.format, start, group, size)
            start, size = group, 0
        size += text_bytes
    if metadata.num_row_groups > start:
        yield Piece(file.path, file.format, start, metadata.num_row_groups, size)


def _list_files(text: str) -> tuple[SourceFile, ...]:
    root = Path(text)
    if root.is_file():
        if format_of(root) is None:
            raise DataError(f"{text} is no file of documents: its name must end in {_suffixes()}")
        found = [root]
    elif root.is_dir():
        found = [path for path in sorted(root.rglob("*")) if not _is_hidden(path, root)]
    else:
        found = [Path(match) for match in sorted(glob.glob(text, recursive=True))]  # noqa: PTH207
        if not found:
            raise DataError(
                f"there is no file or directory {text!r}, and as a glob it matches nothing: check"
                f" data.source, or use {BUILTIN}"
            )
    paths = [path for path in found if path.is_file() and format_of(path) is not None]
    n_other = sum(path.is_file() for path in found) - len(paths)
    if not paths:
        raise DataError(f"{text} holds no documents: no file in it ends in {_suffixes()}")
    if n_other:
        logger.warning(
            "%s: %d files that end in none of %s are left out", text, n_other, _suffixes()
        )
    return _with_splits(paths, root if root.is_dir() else None)


def _with_splits(paths: list[Path], root: Path | None) -> tuple[SourceFile, ...]:
    held_out = [_VAL_NAME.match(path.name) is not None for path in paths]
    has_split = any(held_out) and not all(held_out)
    files = []
    for path, is_val in zip(paths, held_out, strict=True):
        split: Split | None = ("val" if is_val else "train") if has_split else None
        name = str(path.relative_to(root)) if root else path.name
        n_bytes = _size(path)
        files.append(SourceFile(path, name, format_of(path) or "", n_bytes, split))
    if not any(file.n_bytes for file in files):
        raise DataError(f"{paths[0]} is empty, and so is all of the source: name another file")
    return tuple(files)


def _size(path: Path) -> int:
    try:
        with path.open("rb"):
            return path.stat().st_size
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}): check its permissions"
        ) from None


def _sampled_hash(file: SourceFile) -> str:
    """The hash of the file's size now and of its sampled content."""
    try:
        with file.path.open("rb") as raw:
            n_bytes = raw.seek(0, os.SEEK_END)
            digest = hashlib.sha256(f"{n_bytes}".encode())
            last = max(0, n_bytes - _SAMPLE_BYTES)
            for block in range(_SAMPLE_BLOCKS):
                raw.seek(block * last // (_SAMPLE_BLOCKS - 1))
                digest.update(raw.read(_SAMPLE_BYTES))
    except OSError as error:
        raise DataError(f"{file.path} cannot be read ({error.strerror}): check the file") from None
    return digest.hexdigest()


def _is_hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _suffixes() -> str:
    return ", ".join(FORMATS)
