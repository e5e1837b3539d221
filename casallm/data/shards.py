r"""The shard format: documents as token ids in `.npy` files, described by one manifest.

A dataset directory holds `manifest.json`, `tokenizer/` and shards named
`<split>-<unit>-<number>.npy`: split is `train` or `val`, unit (letters, digits, `.`, `_`) names the
unit of input, number counts its shards from 00000. A shard of n tokens is, byte by byte,

    0-7      \x93NUMPY, then 0x01 0x00 (version 1.0 of the .npy format)
    8-9      118 as little-endian uint16: the length of what follows up to the first token
    10-127   {'descr': '<u2', 'fortran_order': False, 'shape': (n,), } in ASCII, spaces, \n
    128-     n little-endian ids: uint16 ('<u2') where vocab_size <= 65,536, else uint32 ('<u4')

so `numpy.load(mmap_mode="r")` opens it. Every document begins with `<|bos|>`, every shard begins
with a document, and no document spans two shards.

The manifest (module `manifest`) is written last, so a directory without one is no dataset.

What is checked when: `open_dataset` checks the manifest's own hash, every shard's size and header,
and, where the shards are below 256 MB together, the sha256 of each. `verify_dataset` hashes
everything and counts documents and ids whatever the size.
"""

import contextlib
import functools
import hashlib
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from casallm.data.manifest import (
    HEADER_BYTES,
    Manifest,
    ShardRecord,
    Split,
    SplitRecord,
    dtype_for,
    little_endian,
    read_manifest,
)
from casallm.data.mirror import open_cache
from casallm.data.tokenizer import Ids, Tokenizer, load_tokenizer
from casallm.errors import DataError, StoreError
from casallm.storage.cache import Cache
from casallm.units import format_bytes

SHARD_TOKENS = 100_000_000
"""A shard ends with the document that reaches this many tokens."""

HASH_AT_OPEN_BYTES = 256_000_000
"""Shards that are smaller than this together are hashed whenever they are opened (0.2 s)."""

_MAX_OPEN_SHARDS = 64


class Dataset:
    """An opened dataset directory; shards are mapped into memory when first asked for.

    Those of a mirrored data set (module `mirror`) are fetched before.
    """

    def __init__(self, manifest: Manifest, directory: Path, cache: Cache | None = None) -> None:
        self.manifest = manifest
        self.directory = directory
        self._cache = cache
        self._expected: tuple[str, ...] = ()
        self.splits: Mapping[Split, SplitRecord] = MappingProxyType(manifest.splits)
        self._mapped = functools.lru_cache(maxsize=_MAX_OPEN_SHARDS)(self._map)

    def tokenizer(self) -> Tokenizer:
        """The vocabulary that made the ids; DataError if another lies beside the shards."""
        tokenizer = load_tokenizer(self.directory / "tokenizer")
        if tokenizer.fingerprint != self.manifest.tokenizer.fingerprint:
            raise DataError(
                f"{self.directory / 'tokenizer'} is not the vocabulary that made the shards beside"
                " it: prepare the data again"
            )
        return tokenizer

    def shard(self, split: Split, number: int) -> npt.NDArray[np.unsignedinteger[Any]]:
        """The ids of one shard, mapped from its file."""
        return self._mapped(split, number)

    def expect(self, split: Split, numbers: Sequence[int]) -> None:
        """Say which shards will be read from now on, first the first: they are fetched ahead."""
        names = tuple(self.splits[split].shards[number].name for number in numbers)
        if self._cache is not None and names != self._expected:
            self._expected = names
            self._mapped.cache_clear()  # what is not needed any more, and evicted, leaves the disk
            self._cache.expect(names)

    def close(self) -> None:
        """End the fetching of shards, where they are fetched."""
        if self._cache is not None:
            self._cache.close()

    def window_counts(self, split: Split, context_length: int) -> list[int]:
        """How many windows of `context_length` targets each shard of `split` holds."""
        return [(shard.tokens - 1) // context_length for shard in self.splits[split].shards]

    def require_vocab_size(self, vocab_size: int) -> None:
        """DataError unless the shards were made with a vocabulary of `vocab_size`."""
        made_with = self.manifest.tokenizer.vocab_size
        if vocab_size != made_with:
            raise DataError(
                f"model.vocab_size is {vocab_size} but the shards in {self.directory} were made"
                f" with {made_with}: train with model.vocab_size={made_with}, or prepare them again"
                " with --tokenizer"
            )

    def _map(self, split: Split, number: int) -> npt.NDArray[np.unsignedinteger[Any]]:
        shard = self.splits[split].shards[number]
        path = self.directory / shard.name
        dtype = little_endian(self.manifest.dtype)
        try:
            with self._cache.open(shard.name) if self._cache else path.open("rb") as file:
                mapped = np.memmap(file, dtype, "r", offset=HEADER_BYTES, shape=(shard.tokens,))
            return mapped.view(np.ndarray)
        except (OSError, ValueError) as error:
            raise DataError(_changed(path, str(error))) from None


class ShardWriter:
    """Writes the documents of one split of one unit as shards, whole or not at all."""

    def __init__(
        self, directory: Path, split: Split, unit: str, *, vocab_size: int, bos_id: int
    ) -> None:
        self._directory = directory
        self._prefix = f"{split}-{unit}"
        self._dtype = little_endian(dtype_for(vocab_size))
        self._bos_id = bos_id
        self._file: IO[bytes] | None = None
        self._tokens = 0
        self.shards: list[ShardRecord] = []

    def append(self, ids: Ids) -> None:
        """Adds whole documents; where a shard ends does not depend on how many come at a time."""
        while len(ids):
            if self._file is None:
                self._file = self._temporary.open("wb")
                self._file.write(bytes(HEADER_BYTES))
            n_tokens = self._room(ids)
            self._file.write(ids[:n_tokens].astype(self._dtype).data)
            self._tokens += n_tokens
            if self._tokens >= SHARD_TOKENS:
                self.finish()
            ids = ids[n_tokens:]

    def finish(self) -> list[ShardRecord]:
        """Publishes what has been added; every shard so far, hashed from what the disk holds."""
        if self._file is None:
            return self.shards
        self._file.seek(0)
        self._file.write(header(self._tokens, self._dtype))
        self._file.close()
        name = f"{self._prefix}-{len(self.shards):05d}.npy"
        record = ShardRecord(
            name=name,
            tokens=self._tokens,
            bytes=HEADER_BYTES + self._tokens * self._dtype.itemsize,
            sha256=_hash_file(self._temporary),
        )
        publish(self._temporary, self._directory / name)
        self.shards.append(record)
        self._file, self._tokens = None, 0
        return self.shards

    def discard(self) -> None:
        """Removes what has been added since the last shard was published."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk refuses what is still buffered
                self._file.close()
            self._temporary.unlink(missing_ok=True)
            self._file = None

    def _room(self, ids: Ids) -> int:
        """How many of `ids` belong into this shard: to the end of the document that fills it."""
        missing = SHARD_TOKENS - self._tokens
        beginnings = np.flatnonzero(ids[missing:] == self._bos_id)
        return missing + int(beginnings[0]) if len(beginnings) else len(ids)

    @property
    def _temporary(self) -> Path:
        return self._directory / f".{self._prefix}-{os.getpid()}.tmp"


def header(n_tokens: int, dtype: np.dtype[Any]) -> bytes:
    """The 128 bytes before the first id."""
    fields = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({n_tokens},), }}"
    length = HEADER_BYTES - 10
    text = fields.ljust(length - 1).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", length) + text


def publish(temporary: Path, path: Path) -> None:
    """Gives a whole temporary file its name, after its bytes and before its name are on disk."""
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def is_dataset(directory: Path) -> bool:
    """Whether `directory` holds a manifest of shards, sound or not."""
    return (directory / "manifest.json").is_file()


def open_dataset(directory: Path) -> Dataset:
    """The dataset in `directory`, checked as the module says; DataError if it is not sound."""
    manifest = read_manifest(directory)
    if cache := open_cache(directory, manifest):
        return Dataset(manifest, directory, cache)
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    with_hash = sum(shard.bytes for shard in shards) <= HASH_AT_OPEN_BYTES
    dtype = little_endian(manifest.dtype)
    for shard in shards:
        if problem := check_shard(directory / shard.name, shard, dtype, with_hash=with_hash):
            raise DataError(problem)
    return Dataset(manifest, directory)


def verify_dataset(directory: Path) -> list[str]:
    """Every fault of the dataset in `directory`, one sentence each; empty where it is sound."""
    try:
        manifest = read_manifest(directory)
        cache = open_cache(directory, manifest)
        dataset = Dataset(manifest, directory, cache)
        dataset.tokenizer()
    except DataError as error:
        return [str(error)]
    problems = []
    for split, record in manifest.splits.items():
        documents = 0
        for number, shard in enumerate(record.shards):
            path, dtype = directory / shard.name, little_endian(manifest.dtype)
            if cache and (problem := _fetch_problem(cache, shard)):
                problems.append(problem)
                continue
            if problem := check_shard(path, shard, dtype, with_hash=not cache):
                problems.append(problem)
                continue
            ids = dataset.shard(split, number)
            documents += int(np.count_nonzero(ids == manifest.tokenizer.bos_id))
            if ids[0] != manifest.tokenizer.bos_id or ids.max() >= manifest.tokenizer.vocab_size:
                problems.append(f"{path} holds ids that its vocabulary does not have")
        if documents != record.documents and not problems:
            problems.append(
                f"{directory} has {documents} documents in {split}, but its manifest says"
                f" {record.documents}: prepare it again"
            )
    return problems


def check_shard(
    path: Path, shard: ShardRecord, dtype: np.dtype[Any], *, with_hash: bool
) -> str | None:
    """What is wrong with the file at `path`, in a sentence; None if it is the shard described."""
    try:
        size = path.stat().st_size
        if size != shard.bytes:
            return _changed(path, f"{size:,} bytes, not the {shard.bytes:,} of its manifest")
        with path.open("rb") as file:
            if file.read(HEADER_BYTES) != header(shard.tokens, dtype):
                return _changed(path, "its header is not that of the manifest")
        if with_hash and _hash_file(path) != shard.sha256:
            return _changed(path, "its sha256 is not that of the manifest")
    except FileNotFoundError:
        return f"{path} is missing ({format_bytes(shard.bytes)}): fetch it or prepare again"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror}): check the file and the disk"
    return None


def _fetch_problem(cache: Cache, shard: ShardRecord) -> str | None:
    """Why the shard could not be brought here, whole and verified."""
    try:
        cache.open(shard.name).close()
    except StoreError as error:
        return str(error)
    return None


def _changed(path: Path, how: str) -> str:
    return f"{path} was cut or changed ({how}): fetch it again or prepare the data again"


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
