"""Documents into a data set: split, tokenized and written unit by unit, wherever it is to lie.

Every finished unit leaves a record (module `destination`); the manifest comes when all have one,
and the records go last. So a preparation that was stopped anywhere goes on with the units that have
no record, and every file equals that of a calm run, whatever the number of workers and nodes. A
lock keeps a second process of this machine out.

Several nodes share a source out without talking to each other: node k of n takes every n-th unit,
and whichever finds that all are done writes the manifest.

Held out are the files that the source names for it, else single documents, chosen by a hash of
their text (so that equal documents stay together): 0.5 %, or 5 % where the source lists less than
64 MB, and at least one.
"""

import contextlib
import errno
import fcntl
import functools
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from casallm.config import sha256_of
from casallm.data.destination import Destination, Tally, UnitRecord, decisive, destination_at
from casallm.data.manifest import (
    SPLITS,
    VERSION,
    Manifest,
    Split,
    SplitRecord,
    TokenizerRecord,
    dtype_for,
)
from casallm.data.mirror import is_in_bucket, mirror_dataset
from casallm.data.progress import OnProgress, Progress
from casallm.data.shards import Dataset, is_dataset, open_dataset
from casallm.data.sources import DataConfig, Source, Unit, open_source
from casallm.data.tokenizer import Tokenizer, TokenizerConfig, build_tokenizer
from casallm.data.unit import SMALL_SOURCE_BYTES, Job, choose_val_fraction, prepare_unit
from casallm.data.vocabulary import NO_TEXT, settle_tokenizer
from casallm.data.workers import run_units
from casallm.errors import ConfigError, DataError, StoreError

logger = logging.getLogger(__name__)

FEW_DOCUMENTS = 100
"""Held-out documents below which a person is warned."""


@dataclass(frozen=True)
class Node:
    """Which of the machines that prepare one source together this one is."""

    rank: int = 0
    count: int = 1

    def __str__(self) -> str:
        return f"{self.rank + 1}/{self.count}"


def parse_node(text: str | None, environment: Mapping[str, str]) -> Node:
    """The node that "2/3" names; without a text, the one that SkyPilot says this machine is."""
    if text is None:
        rank, count = (environment.get(f"SKYPILOT_{name}") for name in ("NODE_RANK", "NUM_NODES"))
        text = f"{int(rank) + 1}/{count}" if rank and rank.isdigit() and count else "1/1"
    number, _, count = text.partition("/")
    if number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count):
        return Node(int(number) - 1, int(count))
    raise ConfigError(f"--node is {text!r}, which is no share: write 2/3 for the second of three")


def load_or_prepare(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    *,
    vocab_size: int,
    root: Path = Path("data"),
    on_progress: OnProgress | None = None,
) -> Dataset:
    """The shards of `data.source`: itself if it is a dataset, else prepared under `root`.

    The directory is `root/<fingerprint>`, of the source and the tokenizer, found again by the
    next call with the same settings. `vocab_size` counts only where a vocabulary is trained.
    A dataset in a bucket is mirrored, with no more than `data.cache_gb` of it on this machine.
    """
    if is_in_bucket(data.source):
        return open_dataset(mirror_dataset(data.source, limit_bytes=round(data.cache_gb * 1e9)))
    if is_dataset(Path(data.source)):
        return open_dataset(Path(data.source))
    source = open_source(data.source, text_column=data.text_column)
    chosen = build_tokenizer(tokenizer)
    out = root / fingerprint(source, chosen, vocab_size)[:16]
    return prepare(source, out, tokenizer=chosen, vocab_size=vocab_size, on_progress=on_progress)


def fingerprint(source: Source, tokenizer: Tokenizer | None, vocab_size: int) -> str:
    """sha256 of all that decides the shards, known before any document is read."""
    return sha256_of(decisive(_plan(source, tokenizer, vocab_size)))


def prepare(
    source: Source,
    out: Path,
    *,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    workers: int | None = None,
    on_progress: OnProgress | None = None,
) -> Dataset:
    """The dataset of `source` in `out`, made now or, where it is whole already, opened.

    Trains a vocabulary of `vocab_size` if `tokenizer` is None. `workers`: processes, by default
    one a core. DataError if `out` holds anything else, and for whatever is wrong with the source;
    then there is no manifest, and no file that is half written.
    """
    prepare_share(
        source,
        destination_at(str(out)),
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        workers=workers,
        on_progress=on_progress,
    )
    return open_dataset(out)


def prepare_share(
    source: Source,
    destination: Destination,
    *,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    workers: int | None = None,
    node: Node = Node(),
    on_progress: OnProgress | None = None,
) -> Manifest | None:
    """Do this node's part of preparing `source`; the manifest, or None while others are at work.

    As `prepare`, which is for one node and a directory.
    """
    plan = _plan(source, tokenizer, vocab_size)
    if manifest := _prepared(destination, plan):
        return manifest
    with _faults_reported(destination), _locked(destination, plan, node) as agreed:
        if manifest := _prepared(destination, plan):
            return manifest
        units = source.units(destination.scratch / "documents")
        workers, threads = _share_out(workers or count_cores(), units)
        fraction = choose_val_fraction(units, source.text_column)
        settled = settle_tokenizer(
            destination,
            units,
            tokenizer,
            text_column=source.text_column,
            val_fraction=fraction,
            vocab_size=vocab_size,
        )
        job = Job(destination, source.text_column, fraction, threads)
        _run(job, units[node.rank :: node.count], settled.vocab_size, workers, on_progress)
        records = destination.records([unit.name for unit in units], dtype_for(settled.vocab_size))
        if len(records) < len(units):
            return _prepared(destination, plan)
        if source.identity["fingerprint"] != agreed["source"]["fingerprint"]:
            raise DataError(f"the files of {plan['source']['name']} changed while they were read")
        manifest = _manifest([records[unit.name] for unit in units], settled, agreed["source"])
        destination.finish(manifest)
    return manifest


def count_cores() -> int:
    """The processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _plan(source: Source, tokenizer: Tokenizer | None, vocab_size: int) -> dict[str, Any]:
    trained = {"name": f"bpe-{vocab_size}"}
    given = {"fingerprint": tokenizer.fingerprint} if tokenizer else trained
    return {"version": VERSION, "source": source.identity, "tokenizer": given}


def _prepared(destination: Destination, plan: dict[str, Any]) -> Manifest | None:
    """The manifest where all is done; DataError if it is of something else."""
    manifest = destination.manifest()
    if manifest is None:
        return None
    source, tokenizer = manifest.source, manifest.tokenizer.model_dump()
    is_same = source.get("fingerprint") == plan["source"]["fingerprint"] and all(
        tokenizer[key] == value for key, value in plan["tokenizer"].items()
    )
    if not is_same:
        raise DataError(
            f"{destination.url} holds the shards of {source.get('name')!r} with the vocabulary"
            f" {tokenizer['name']!r}, not those asked for: choose another directory, or remove it"
        )
    destination.clear_away()
    return manifest


@contextlib.contextmanager
def _locked(destination: Destination, plan: dict[str, Any], node: Node) -> Iterator[dict[str, Any]]:
    """The plan of `destination`, which is this process's and holds nothing of another plan.

    Where not one unit was finished, nothing of it is left when this ends in an error.
    """
    destination.require_empty()
    destination.scratch.mkdir(parents=True, exist_ok=True)
    with (destination.scratch / f"lock-{node.rank}-of-{node.count}").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"another process is preparing {destination.url}: wait for it, then run this again"
            ) from None
        agreed = destination.agree(plan)
        try:
            yield agreed
        except BaseException:
            if node.count == 1:
                with contextlib.suppress(StoreError):  # there may be no network left
                    destination.abandon()
            raise


@contextlib.contextmanager
def _faults_reported(destination: Destination) -> Iterator[None]:
    """Turns what the system says about writing to `destination` into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            message = (
                f"the disk that holds {destination.work} is full: make room and run the same again"
                " (finished parts are kept)"
            )
        else:
            where = error.filename or destination.work
            message = f"{where} cannot be written ({error.strerror or error}): check the path"
        raise DataError(message) from None


def _share_out(workers: int, units: Sequence[Unit]) -> tuple[int, int]:
    """Processes, and threads in each.

    A small source is not worth starting processes for. Few units keep processes busy unevenly,
    so each then encodes with several threads; from four units a worker on, with one.
    """
    if sum(unit.text_bytes for unit in units) < SMALL_SOURCE_BYTES:
        return 1, workers
    return workers, min(workers, math.ceil(4 * workers / max(1, len(units))))


def _run(
    job: Job,
    units: Sequence[Unit],
    vocab_size: int,
    workers: int,
    on_progress: OnProgress | None,
) -> None:
    """Prepares every unit of `units` that has no sound record yet."""
    records = job.destination.records([unit.name for unit in units], dtype_for(vocab_size))
    before = total = sum((record.tally for record in records.values()), Tally())
    text_bytes = sum(unit.text_bytes for unit in units)
    left = [unit for unit in units if unit.name not in records]
    started = time.monotonic()
    with _without_leftovers(job.destination.work, left):
        for added in run_units(functools.partial(prepare_unit, job), left, workers=workers):
            total += added
            if on_progress:
                done = (total.documents, total.tokens, total.bytes_of_text)
                seconds = time.monotonic() - started
                on_progress(Progress(*done, text_bytes, seconds, before.bytes_of_text))


@contextlib.contextmanager
def _without_leftovers(work: Path, units: Sequence[Unit]) -> Iterator[None]:
    """`work` without the unfinished shards of `units` that killed workers leave."""

    def remove() -> None:
        for leftover in work.glob(".*.tmp"):
            if any(f"-{unit.name}-" in leftover.name for unit in units):
                leftover.unlink(missing_ok=True)

    remove()
    try:
        yield
    finally:
        remove()


def _manifest(
    records: Sequence[UnitRecord], tokenizer: Tokenizer, identity: dict[str, Any]
) -> Manifest:
    splits = {split: _join(records, split) for split in SPLITS}
    if not splits["train"].documents:
        raise DataError(NO_TEXT)
    if splits["val"].documents < FEW_DOCUMENTS:
        logger.warning(
            "only %d documents are held out, so validation figures will be rough: name a file"
            " val-* to hold out more",
            splits["val"].documents,
        )
    oddities = _count_oddities(records)
    return Manifest(
        tokenizer=TokenizerRecord(
            name=tokenizer.name,
            fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            bos_id=tokenizer.bos_id,
        ),
        dtype=dtype_for(tokenizer.vocab_size),
        source=identity | ({"oddities": oddities} if oddities else {}),
        splits=splits,
    )


def _join(records: Sequence[UnitRecord], split: Split) -> SplitRecord:
    parts = [record.splits[split] for record in records]
    shards = [shard for part in parts for shard in part.shards]
    return SplitRecord(
        tokens=sum(part.tokens for part in parts),
        documents=sum(part.documents for part in parts),
        bytes_of_text=sum(part.bytes_of_text for part in parts),
        shards=tuple(sorted(shards, key=lambda shard: shard.name)),
    )


def _count_oddities(records: Sequence[UnitRecord]) -> dict[str, int]:
    """Rows left out or repaired, by reason, over all units; said aloud."""
    counts: dict[str, int] = {}
    examples: dict[str, str] = {}
    for record in records:
        examples = record.examples | examples
        for reason, count in record.oddities.items():
            counts[reason] = counts.get(reason, 0) + count
    for reason, count in counts.items():
        logger.warning("%s rows: %s (the first: %s)", f"{count:,}", reason, examples[reason])
    return counts
