"""One unit of documents into its shards and its record: the work that processes share out.

A unit's shards are published first and its record, `.prepare/<unit>.json`, after them: a unit
with a sound record is never done again, one without is done from the start.
"""

import functools
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from casallm.config import Config
from casallm.data.documents import Oddities, read_documents
from casallm.data.manifest import SPLITS, Split, SplitRecord, dtype_for, little_endian
from casallm.data.shards import ShardWriter, check_shard, write_whole
from casallm.data.sources import Unit
from casallm.data.tokenizer import Tokenizer, load_tokenizer, replace_surrogates

SMALL_SOURCE_BYTES = 64_000_000
"""A source that lists less text than this is small: more of it is held out."""

_BATCH_BYTES = 4 << 20
"""Text that each thread encodes at a time."""


@dataclass(frozen=True)
class Job:
    """What every unit of one preparation shares."""

    out: Path
    text_column: str
    val_fraction: float
    """Share of documents held out of units whose split is not named."""
    threads: int
    """Threads that one worker encodes with."""

    @property
    def scratch(self) -> Path:
        """Where records and everything unfinished lie."""
        return self.out / ".prepare"

    def record_path(self, unit: Unit) -> Path:
        """Where the record of `unit` lies once it is finished."""
        return self.scratch / f"unit-{unit.name}.json"


@dataclass(frozen=True)
class Document:
    """One document, ready to be encoded."""

    text: str
    split: Split
    n_bytes: int


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
    def tally(self) -> Tally:
        """Both splits together."""
        parts = self.splits.values()
        tallies = (Tally(each.documents, each.tokens, each.bytes_of_text) for each in parts)
        return sum(tallies, Tally())


def prepare_unit(job: Job, unit: Unit) -> Iterator[Tally]:
    """Makes the shards of `unit`, then its record; yields what each batch added."""
    tokenizer = _tokenizer_at(job.out / "tokenizer")
    build_writer = functools.partial(
        ShardWriter, job.out, vocab_size=tokenizer.vocab_size, bos_id=tokenizer.bos_id
    )
    writers = {split: build_writer(split=split, unit=unit.name) for split in SPLITS}
    tallies = dict.fromkeys(SPLITS, Tally())
    oddities = Oddities()
    try:
        for split, documents in _batches(
            documents_of(job, unit, oddities), job.threads * _BATCH_BYTES
        ):
            texts = [document.text for document in documents]
            ids = tokenizer.encode_documents(texts, threads=job.threads)
            writers[split].append(ids)
            n_bytes = sum(document.n_bytes for document in documents)
            added = Tally(len(documents), len(ids), n_bytes)
            tallies[split] += added
            yield added
        splits = {split: _finish(writers[split], tallies[split]) for split in SPLITS}
    finally:
        for writer in writers.values():
            writer.discard()
    record = UnitRecord(splits=splits, oddities=oddities.counts, examples=oddities.examples)
    write_whole(job.record_path(unit), json.dumps(record.model_dump(mode="json")).encode())


def finished_record(job: Job, unit: Unit, vocab_size: int) -> UnitRecord | None:
    """The record of `unit` if an earlier start finished it and its shards are still there."""
    path = job.record_path(unit)
    if not path.exists():
        return None
    record = UnitRecord.model_validate_json(path.read_bytes())
    dtype = little_endian(dtype_for(vocab_size))
    shards = [shard for split in record.splits.values() for shard in split.shards]
    problems = [check_shard(job.out / each.name, each, dtype, with_hash=False) for each in shards]
    return None if any(problems) else record


def documents_of(job: Job, unit: Unit, oddities: Oddities) -> Iterator[Document]:
    """The documents of `unit` in order, each with its split."""
    for text, raw in _read(unit, job.text_column, oddities):
        split = unit.split or ("val" if place_of(raw) < job.val_fraction else "train")
        yield Document(text, split, len(raw))


def place_of(document: bytes) -> float:
    """The hash of a document's text as a number in [0, 1)."""
    digest = hashlib.blake2b(document, digest_size=7).digest()  # 56 bits
    return (int.from_bytes(digest, "big") >> 3) / 2**53


def choose_val_fraction(units: Sequence[Unit], text_column: str) -> float:
    """Which share of the documents is held out where the source names none.

    0.5 %, or 5 % of a small source. Where that would hold out nothing, as it may among a few
    documents, as much as it takes to hold out one. Reads until the first that is held out.
    """
    is_small = sum(unit.text_bytes for unit in units) < SMALL_SOURCE_BYTES
    usual = 0.05 if is_small else 0.005
    if any(unit.split for unit in units):
        return usual
    lowest = 1.0
    for unit in units:
        for _, raw in _read(unit, text_column, Oddities()):
            lowest = min(lowest, place_of(raw))
            if lowest < usual:
                return usual
    return math.nextafter(lowest, 1.0)


def _read(unit: Unit, text_column: str, oddities: Oddities) -> Iterator[tuple[str, bytes]]:
    """The texts of `unit`, each also as UTF-8."""
    for piece in unit.pieces:
        for text in read_documents(piece, text_column=text_column, oddities=oddities):
            try:
                yield text, text.encode()
            except UnicodeEncodeError:
                oddities.add("repaired, lone surrogates", str(piece.path))
                repaired = replace_surrogates(text)
                yield repaired, repaired.encode()


def _finish(writer: ShardWriter, tally: Tally) -> SplitRecord:
    return SplitRecord(
        documents=tally.documents,
        tokens=tally.tokens,
        bytes_of_text=tally.bytes_of_text,
        shards=tuple(writer.finish()),
    )


def _batches(
    documents: Iterator[Document], batch_bytes: int
) -> Iterator[tuple[Split, list[Document]]]:
    """The documents by split, in batches of about `batch_bytes`."""
    batches: dict[Split, list[Document]] = {split: [] for split in SPLITS}
    sizes = dict.fromkeys(SPLITS, 0)
    for document in documents:
        split = document.split
        batches[split].append(document)
        sizes[split] += document.n_bytes
        if sizes[split] >= batch_bytes:
            yield split, batches[split]
            batches[split], sizes[split] = [], 0
    yield from ((split, batch) for split, batch in batches.items() if batch)


@functools.lru_cache(maxsize=1)
def _tokenizer_at(directory: Path) -> Tokenizer:
    return load_tokenizer(directory)
