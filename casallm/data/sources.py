"""Where documents come from: what a person names, as files cut into units of work.

`data.source` is `builtin`, files of this machine, a bucket or the web (module `listing`), or a data
set of the Hugging Face hub by name (module `hub`).

A unit is what one worker prepares at a time and what the names of shards derive from: consecutive
whole row groups of a parquet file, a byte range cut at line ends, or one compressed file, of about
400 MB of text; consecutive small ones of the same split together. Units follow from the source
alone (names, sizes, parquet footers), never from the number of workers.

A source's fingerprint covers the name of every file and what tells its content from another: on
the hub its hash, in a bucket or on the web its ETag, and on this machine a hash of its size and of
a sample, so that an edit in the middle of a large file that keeps its size may not be noticed.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import Field

from casallm.config import Config, canonical_json, sha256_of
from casallm.data.builtin import builtin_identity, write_builtin
from casallm.data.documents import Piece, format_of, open_parquet
from casallm.data.hub import HubSet, list_hub, parse_hub_name
from casallm.data.listing import SourceFile, is_url, list_files, sampled_hash
from casallm.data.manifest import Split

BUILTIN = "builtin"
UNIT_BYTES = 400_000_000
"""Text in a unit, about: 90M tokens, the size of one shard."""

COMPRESSION = 3
"""How much smaller compressed text is taken to be; only estimates depend on it."""


class DataConfig(Config):
    """Which documents a model is trained on."""

    source: str = BUILTIN
    """builtin; a file, directory, glob or URL of parquet, jsonl(.gz, .zst) or txt; fineweb-edu,
    climbmix or owner/name[:configuration][:split][:column] of the hub; or shards."""
    text_column: str = "text"
    """The column (parquet) or field (jsonl) that holds a document's text."""
    cache_gb: float = Field(default=100.0, gt=0)
    """The most that shards of a bucket may take on this machine's disk, in GB."""


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
        """The last part of the name, and what the fingerprint covers, as it is now."""
        if is_url(self.text):
            return _describe(self.text, list_files(self.text), self.text_column)
        return _describe(Path(self.text).name, self.files, self.text_column)

    def units(self, scratch: Path) -> list[Unit]:
        """Units over the files as they lie."""
        return plan_units(self.files, self.text_column)


@dataclass(frozen=True)
class HubSource:
    """Files of a data set of the hub at one commit, which never change."""

    hub_set: HubSet
    text_column: str

    @property
    def identity(self) -> dict[str, Any]:
        """Name, configuration and commit, and what the fingerprint covers."""
        name = self.hub_set.name
        described = _describe(name.repository, self._files(), self.text_column)
        chosen = {"configuration": name.configuration, "split": name.split}
        asked = {key: value for key, value in chosen.items() if value}
        return described | asked | {"commit": self.hub_set.commit}

    def units(self, scratch: Path) -> list[Unit]:
        """Units over the files as they lie on the hub."""
        return plan_units(self._files(), self.text_column)

    def _files(self) -> list[SourceFile]:
        return [
            SourceFile(
                self.hub_set.open(file),
                file.path,
                format_of(file.path) or "",
                file.n_bytes,
                split,
                file.sha256,
            )
            for split, file in self.hub_set.files
        ]


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
        return plan_units(list_files(str(scratch)), self.text_column)


_SUFFIXES = re.compile(r"\.(?:parquet|(?:jsonl?|txt)(?:\.(?:gz|zst))?)$")


def source_name(text: str) -> str:
    """A short name for documents: `org/name:config` and `s3://bucket/name/*.parquet` alike."""
    last = next((part for part in reversed(text.split("/")) if part and "*" not in part), "")
    return re.sub(r"[^A-Za-z0-9_]+", "-", _SUFFIXES.sub("", last)).strip("-") or "data"


def open_source(text: str, *, text_column: str = "text") -> Source:
    """The source that `text` names; DataError if there is nothing to read there."""
    if text == BUILTIN:
        return BuiltinSource()
    name = None if Path(text).exists() else parse_hub_name(text)
    if name is not None and format_of(text) is None:
        return HubSource(list_hub(name), name.column or text_column)
    return FileSource(text, list_files(text), text_column)


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


def _describe(name: str, files: Sequence[SourceFile], text_column: str) -> dict[str, Any]:
    digest = hashlib.sha256(canonical_json(text_column).encode())
    for file in files:
        version = file.version or sampled_hash(file.path)
        digest.update(canonical_json([file.name, version]).encode())
    return {
        "name": name,
        "files": len(files),
        "bytes": sum(file.n_bytes for file in files),
        "fingerprint": digest.hexdigest(),
    }
