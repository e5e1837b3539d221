"""One unit of documents into its shards and its record: the work that processes share out.

A unit's shards are stored first and its record after them (`destination`): a unit with a sound
record is never done again, one without is done from the start.
"""

import functools
import hashlib
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from casallm.data.destination import Destination, Tally, UnitRecord
from casallm.data.documents import Oddities, read_documents
from casallm.data.manifest import SPLITS, Split, SplitRecord
from casallm.data.shards import ShardWriter
from casallm.data.sources import Unit
from casallm.data.tokenizer import Tokenizer, load_tokenizer, replace_surrogates

T = TypeVar("T")

SMALL_SOURCE_BYTES = 64_000_000
"""A source that lists less text than this is small: more of it is held out."""

_BATCH_BYTES = 4 << 20
"""Text that each thread encodes at a time."""


@dataclass(frozen=True)
class Job:
    """What every unit of one preparation shares."""

    destination: Destination
    text_column: str
    val_fraction: float
    """Share of documents held out of units whose split is not named."""
    threads: int
    """Threads that one worker encodes with."""


@dataclass(frozen=True)
class Document:
    """One document, ready to be encoded."""

    text: str
    split: Split
    n_bytes: int


def prepare_unit(job: Job, unit: Unit) -> Iterator[Tally]:
    """Makes the shards of `unit`, then its record; yields what each batch added."""
    work = job.destination.work
    tokenizer = _tokenizer_at(work / "tokenizer")
    build_writer = functools.partial(
        ShardWriter, work, vocab_size=tokenizer.vocab_size, bos_id=tokenizer.bos_id
    )
    writers = {split: build_writer(split=split, unit=unit.name) for split in SPLITS}
    tallies = dict.fromkeys(SPLITS, Tally())
    oddities = Oddities()
    try:
        found = documents_of(unit, job.text_column, job.val_fraction, oddities)
        for split, documents in _read_ahead(_batches(found, job.threads * _BATCH_BYTES)):
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
    job.destination.keep(unit.name, record)


def documents_of(
    unit: Unit, text_column: str, val_fraction: float, oddities: Oddities
) -> Iterator[Document]:
    """The documents of `unit` in order, each with its split."""
    for text, raw in _read(unit, text_column, oddities):
        split = unit.split or ("val" if place_of(raw) < val_fraction else "train")
        document = Document(text, split, len(raw))
        del text, raw  # a document may be large: its bytes need not wait until it is encoded
        yield document


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


def _read_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, the next of which is made while the last one is used."""
    with ThreadPoolExecutor(1, thread_name_prefix="reader") as pool:
        following = pool.submit(next, items, None)
        while (item := following.result()) is not None:
            following = pool.submit(next, items, None)
            yield item


@functools.lru_cache(maxsize=1)
def _tokenizer_at(directory: Path) -> Tokenizer:
    return load_tokenizer(directory)
