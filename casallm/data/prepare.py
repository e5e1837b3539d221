"""Documents into a dataset directory: split, tokenized and written unit by unit.

Every finished unit leaves a record in `.prepare/`; the manifest comes when all have one, and
`.prepare/` goes last. So a preparation that was stopped anywhere goes on with the units that have
no record, and every file equals that of a calm run, whatever the number of workers. A lock keeps
a second process out.

Held out are the files that the source names for it, else single documents, chosen by a hash of
their text (so that equal documents stay together): 0.5 %, or 5 % where the source lists less than
64 MB, and at least one. A vocabulary is trained on documents of the training split alone, 100 MB
of them at most, taken from the beginnings of up to 64 units spread evenly over the source.
"""

import contextlib
import errno
import fcntl
import functools
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from casallm.config import canonical_json, sha256_of
from casallm.data.documents import Oddities
from casallm.data.manifest import (
    SPLITS,
    VERSION,
    Manifest,
    Split,
    SplitRecord,
    TokenizerRecord,
    dtype_for,
)
from casallm.data.shards import Dataset, is_dataset, open_dataset, write_whole
from casallm.data.sources import DataConfig, Source, Unit, open_source
from casallm.data.tokenizer import (
    Tokenizer,
    TokenizerConfig,
    build_tokenizer,
    load_tokenizer,
    train_tokenizer,
)
from casallm.data.unit import (
    SMALL_SOURCE_BYTES,
    Job,
    Tally,
    UnitRecord,
    choose_val_fraction,
    documents_of,
    finished_record,
    prepare_unit,
)
from casallm.data.workers import run_units
from casallm.errors import DataError
from casallm.units import format_bytes

logger = logging.getLogger(__name__)

NO_TEXT = (
    "the source holds no text to train on besides what is held out: add documents, or name another"
    " source in data.source"
)
FEW_DOCUMENTS = 100
"""Held-out documents below which a person is warned."""

TOKENIZER_SAMPLE_BYTES = 100_000_000
TOKENIZER_SAMPLE_UNITS = 64


@dataclass(frozen=True)
class Progress:
    """How far a preparation is."""

    documents: int
    tokens: int
    bytes_of_text: int
    text_bytes: int
    """About how much text there is in all."""
    seconds: float
    """Since tokenizing began."""


OnProgress = Callable[[Progress], None]


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
    """
    if is_dataset(Path(data.source)):
        return open_dataset(Path(data.source))
    source = open_source(data.source, text_column=data.text_column)
    chosen = build_tokenizer(tokenizer)
    out = root / fingerprint(source, chosen, vocab_size)[:16]
    return prepare(source, out, tokenizer=chosen, vocab_size=vocab_size, on_progress=on_progress)


def fingerprint(source: Source, tokenizer: Tokenizer | None, vocab_size: int) -> str:
    """sha256 of all that decides the shards, known before any document is read."""
    return sha256_of(_plan(source, tokenizer, vocab_size))


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
    plan = _plan(source, tokenizer, vocab_size)
    if is_dataset(out):
        return _open_prepared(out, plan)
    with _faults_reported(out), _locked(out, plan):
        if is_dataset(out):
            return _open_prepared(out, plan)
        units = source.units(out / ".prepare" / "documents")
        workers, threads = _share_out(workers or count_cores(), units)
        fraction = choose_val_fraction(units, source.text_column)
        job = Job(out, source.text_column, fraction, threads)
        kept = _keep_tokenizer(job, units, tokenizer, vocab_size)
        records = _run(job, units, kept.vocab_size, workers, on_progress)
        if _plan(source, tokenizer, vocab_size) != plan:
            raise DataError(f"the files of {plan['source']['name']} changed while they were read")
        manifest = _manifest(records, kept, plan["source"])
        write_whole(out / "manifest.json", manifest.to_bytes())
        shutil.rmtree(job.scratch)
    return open_dataset(out)


def train_on_source(source: Source, vocab_size: int) -> Tokenizer:
    """A vocabulary trained on the documents of `source` that `prepare` would train it on."""
    with tempfile.TemporaryDirectory() as scratch:
        units = source.units(Path(scratch))
        fraction = choose_val_fraction(units, source.text_column)
        job = Job(Path(scratch), source.text_column, fraction, 1)
        return train_tokenizer(_sample_texts(job, units), vocab_size)


def count_cores() -> int:
    """The processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _plan(source: Source, tokenizer: Tokenizer | None, vocab_size: int) -> dict[str, Any]:
    trained = {"name": f"bpe-{vocab_size}"}
    given = {"fingerprint": tokenizer.fingerprint} if tokenizer else trained
    return {"version": VERSION, "source": source.identity, "tokenizer": given}


def _open_prepared(out: Path, plan: dict[str, Any]) -> Dataset:
    dataset = open_dataset(out)
    source, tokenizer = dataset.manifest.source, dataset.manifest.tokenizer.model_dump()
    is_same = source.get("fingerprint") == plan["source"]["fingerprint"] and all(
        tokenizer[key] == value for key, value in plan["tokenizer"].items()
    )
    if not is_same:
        raise DataError(
            f"{out} holds the shards of {source.get('name')!r} with the vocabulary"
            f" {tokenizer['name']!r}, not those asked for: choose another directory, or remove it"
        )
    shutil.rmtree(out / ".prepare", ignore_errors=True)
    return dataset


@contextlib.contextmanager
def _locked(out: Path, plan: dict[str, Any]) -> Iterator[None]:
    """`out` for this process alone, known to hold nothing or a stopped run of the same plan.

    Where not one unit was finished, nothing of it is left when this ends in an error.
    """
    scratch = out / ".prepare"
    if out.exists() and not scratch.is_dir() and any(out.iterdir()):
        raise DataError(f"{out} holds other files: choose an empty directory to prepare into")
    scratch.mkdir(parents=True, exist_ok=True)
    with (scratch / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"another process is preparing {out}: wait for it, then run this again"
            ) from None
        _check_plan(scratch, plan)
        for leftover in out.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        try:
            yield
        finally:
            if not is_dataset(out) and not any(scratch.glob("unit-*.json")):
                shutil.rmtree(out, ignore_errors=True)


def _check_plan(scratch: Path, plan: dict[str, Any]) -> None:
    path = scratch / "plan.json"
    if not path.exists():
        write_whole(path, canonical_json(plan).encode())
    elif path.read_text(encoding="utf-8") != canonical_json(plan):
        raise DataError(
            f"{scratch.parent} holds a stopped preparation of another source or vocabulary, or the"
            " source has changed since: remove that directory, or choose another"
        )


@contextlib.contextmanager
def _faults_reported(out: Path) -> Iterator[None]:
    """Turns what the system says about writing to `out` into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            message = (
                f"the disk that holds {out} is full: make room and run the same again (finished"
                " parts are kept)"
            )
        else:
            where = error.filename or out
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


def _keep_tokenizer(
    job: Job, units: Sequence[Unit], tokenizer: Tokenizer | None, vocab_size: int
) -> Tokenizer:
    """The vocabulary in `out/tokenizer`: as an earlier start left it, given, or trained now."""
    final = job.out / "tokenizer"
    if final.is_dir():
        return load_tokenizer(final)
    kept = tokenizer or train_tokenizer(_sample_texts(job, units), vocab_size)
    temporary = job.scratch / "tokenizer"
    shutil.rmtree(temporary, ignore_errors=True)
    kept.save(temporary)
    temporary.rename(final)
    return kept


def _sample_texts(job: Job, units: Sequence[Unit]) -> Iterator[str]:
    """Documents to train a vocabulary on, from units spread over the source."""
    units = [unit for unit in units if unit.split != "val"]
    n_units = min(len(units), TOKENIZER_SAMPLE_UNITS)
    n_bytes = 0
    for i in range(n_units):
        for document in documents_of(job, units[i * len(units) // n_units], Oddities()):
            if document.split == "train":
                yield document.text
                n_bytes += document.n_bytes
            if n_bytes >= TOKENIZER_SAMPLE_BYTES * (i + 1) // n_units:
                break
    if not n_bytes:
        raise DataError(NO_TEXT)
    logger.info("training a vocabulary on %s of text", format_bytes(n_bytes))


def _run(
    job: Job,
    units: Sequence[Unit],
    vocab_size: int,
    workers: int,
    on_progress: OnProgress | None,
) -> list[UnitRecord]:
    """Prepares every unit that has no sound record yet; the records of all, in order."""
    records = {unit.name: finished_record(job, unit, vocab_size) for unit in units}
    total = sum((record.tally for record in records.values() if record), Tally())
    text_bytes = sum(unit.text_bytes for unit in units)
    started = time.monotonic()
    left = [unit for unit in units if records[unit.name] is None]
    for added in run_units(functools.partial(prepare_unit, job), left, workers=workers):
        total += added
        if on_progress:
            done = (total.documents, total.tokens, total.bytes_of_text)
            on_progress(Progress(*done, text_bytes, time.monotonic() - started))
    return [
        records[unit.name] or UnitRecord.model_validate_json(job.record_path(unit).read_bytes())
        for unit in units
    ]


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
