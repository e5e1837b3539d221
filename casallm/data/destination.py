"""Where shards go while they are made: a directory, or a bucket by way of one.

Beside the shards lie, until the manifest is written, `_prepare/plan.json` (what is being prepared)
and `_prepare/unit-<name>.json`, the record of each finished unit, written after its shards. Records
are all that several starts, and several nodes, know of each other: a unit with a sound record is
never done again, and whoever finds a record of every unit writes the manifest.

Shards for a bucket are written into a directory of this machine first, uploaded when their unit is
done, each verified, and then removed here.
"""

import contextlib
import functools
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from casallm.config import Config, canonical_json, sha256_of
from casallm.data.manifest import (
    Dtype,
    Manifest,
    ShardRecord,
    Split,
    SplitRecord,
    little_endian,
    parse_manifest,
)
from casallm.data.shards import check_shard
from casallm.data.tokenizer import TOKENIZER_FILES
from casallm.errors import DataError, StoreNotFoundError
from casallm.storage.store import Store, open_store

PREPARE = "_prepare"
_PLAN = f"{PREPARE}/plan.json"


@dataclass(frozen=True)
class Tally:
    """How much was done: since the last one, or in all."""

    documents: int = 0
    tokens: int = 0
    bytes_of_text: int = 0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            self.documents + other.documents,
            self.tokens + other.tokens,
            self.bytes_of_text + other.bytes_of_text,
        )


class UnitRecord(Config):
    """What a finished unit holds."""

    splits: dict[Split, SplitRecord]
    """As in the manifest, of this unit alone."""
    oddities: dict[str, int] = Field(default_factory=dict)
    """Rows left out or repaired, by reason."""
    examples: dict[str, str] = Field(default_factory=dict)
    """Where the first of each was."""

    @property
    def shards(self) -> list[ShardRecord]:
        """Of both splits."""
        return [shard for split in self.splits.values() for shard in split.shards]

    @property
    def tally(self) -> Tally:
        """Both splits together."""
        parts = self.splits.values()
        tallies = (Tally(each.documents, each.tokens, each.bytes_of_text) for each in parts)
        return sum(tallies, Tally())


@dataclass(frozen=True)
class Destination:
    """The place `url`, and the directory of this machine in which its shards are written."""

    url: str
    work: Path
    """`url` itself where that is a directory."""

    @property
    def scratch(self) -> Path:
        """Where everything unfinished of this machine lies."""
        return self.work / PREPARE

    @property
    def is_bucket(self) -> bool:
        """Whether shards are uploaded."""
        return self._store.local_path is None

    def manifest(self) -> Manifest | None:
        """The manifest, where all is done."""
        try:
            raw = self._store.read("manifest.json")
        except StoreNotFoundError:
            return None
        return parse_manifest(raw, where=f"{self.url}/manifest.json")

    def require_empty(self) -> None:
        """DataError if there is anything that no preparation has left."""
        if self.is_bucket:
            is_other = not self._store.exists(_PLAN) and bool(self._store.list())
        else:
            is_new = self.work.exists() and not self.scratch.is_dir()
            is_other = is_new and any(self.work.iterdir())
        if is_other:
            raise DataError(
                f"{self.url} holds other files: choose an empty directory to prepare into"
            )

    def agree(self, plan: dict[str, Any]) -> dict[str, Any]:
        """Leave word that `plan` is being prepared here; what the first start left word of.

        DataError if that is another vocabulary, or a source of another fingerprint.
        """
        if not self._store.exists(_PLAN):
            self._store.write(_PLAN, canonical_json(plan).encode())
            return plan
        agreed: dict[str, Any] = json.loads(self._store.read(_PLAN))
        if decisive(agreed) != decisive(plan):
            raise DataError(
                f"{self.url} holds a stopped preparation of another source or vocabulary, or the"
                " source has changed since: remove that directory, or choose another"
            )
        return agreed

    def keep(self, unit: str, record: UnitRecord) -> None:
        """Store the shards of a finished unit, then its record."""
        if self.is_bucket:
            for shard in record.shards:
                self._store.put(shard.name, self.work / shard.name, sha256=shard.sha256)
                (self.work / shard.name).unlink()
        content = json.dumps(record.model_dump(mode="json")).encode()
        self._store.write(_record_name(unit), content)

    def records(self, units: Sequence[str], dtype: Dtype) -> dict[str, UnitRecord]:
        """The records of those of `units` that are finished and whose shards are there."""
        sizes = {entry.name: entry.bytes for entry in self._store.list()}
        found = {}
        for unit in units:
            if _record_name(unit) not in sizes:
                continue
            with contextlib.suppress(StoreNotFoundError, ValidationError):
                record = UnitRecord.model_validate_json(self._store.read(_record_name(unit)))
                if all(self._holds(shard, dtype, sizes) for shard in record.shards):
                    found[unit] = record
        return found

    def keep_tokenizer(self) -> None:
        """Store the vocabulary that lies in `work`."""
        if not self.is_bucket:
            return
        for name in TOKENIZER_FILES:
            self._store.put(f"tokenizer/{name}", self.work / "tokenizer" / name)

    def fetch_tokenizer(self) -> bool:
        """Have in `work` the vocabulary that an earlier start stored; False if there is none."""
        directory = self.work / "tokenizer"
        if self.is_bucket and not directory.is_dir():
            if not all(self._store.exists(f"tokenizer/{name}") for name in TOKENIZER_FILES):
                return False
            for name in TOKENIZER_FILES:
                self._store.get(f"tokenizer/{name}", self.scratch / "tokenizer" / name)
            (self.scratch / "tokenizer").rename(directory)
        return directory.is_dir()

    def finish(self, manifest: Manifest) -> None:
        """Write the manifest, and remove what is not needed any more."""
        self._store.write("manifest.json", manifest.to_bytes())
        self.clear_away()

    def clear_away(self) -> None:
        """Remove plan and records."""
        self._remove(PREPARE)
        shutil.rmtree(self.work if self.is_bucket else self.scratch, ignore_errors=True)

    def abandon(self) -> None:
        """Remove everything, where not one unit is finished."""
        if self._store.exists("manifest.json") or self._store.list(f"{PREPARE}/unit-"):
            return
        if self.is_bucket:
            self._remove(PREPARE)
            self._remove("tokenizer")
        shutil.rmtree(self.work, ignore_errors=True)

    def _remove(self, folder: str) -> None:
        if self.is_bucket:
            for entry in self._store.list(f"{folder}/"):
                self._store.delete(entry.name)

    def _holds(self, shard: ShardRecord, dtype: Dtype, sizes: dict[str, int]) -> bool:
        if self.is_bucket:
            return sizes.get(shard.name) == shard.bytes
        path = self.work / shard.name
        return check_shard(path, shard, little_endian(dtype), with_hash=False) is None

    @property
    def _store(self) -> Store:
        return _opened(self.url)


def destination_at(place: str) -> Destination:
    """The destination that a path or URL names."""
    store = open_store(place)
    if store.local_path is not None:
        return Destination(place, store.local_path)
    name = sha256_of(store.url)[:16]
    return Destination(store.url, Path.home() / ".cache" / "casallm" / "prepare" / name)


def decisive(plan: dict[str, Any]) -> dict[str, Any]:
    """What must be the same: a commit of the hub, for one, may be newer with the same files."""
    return plan | {"source": plan["source"]["fingerprint"]}


@functools.lru_cache(maxsize=1)
def _opened(url: str) -> Store:
    return open_store(url)


def _record_name(unit: str) -> str:
    return f"{PREPARE}/unit-{unit}.json"
