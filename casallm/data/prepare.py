"""Documents into shards: split, tokenized and written unit by unit, by any number of workers.

A unit's shards are published first and its record (`.prepare/<unit>.json`) after them; the
manifest comes when every unit has its record, and `.prepare/` goes last. So a preparation that was
stopped anywhere goes on with the units that have no record, and every file equals that of a calm
run, whatever the number of workers. A lock keeps a second process out.

Held out are the files that the source names for it, else single documents, chosen by a hash of
their text (so that equal documents stay together): 0.5 %, or 5 % where the source lists less than
64 MB. A vocabulary is trained on documents of the training split alone, 100 MB of them at most,
taken from the beginnings of up to 64 units spread evenly over the source.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from casallm.config import canonical_json, sha256_of
from casallm.data.documents import Oddities, read_documents
from casallm.data.shards import (
    VERSION,
    Dataset,
    Manifest,
    ShardRecord,
    ShardWriter,
    Split,
    SplitRecord,
    TokenizerRecord,
    check_shard,
    dtype_for,
    is_dataset,
    little_endian,
    open_dataset,
    write_whole,
)
from casallm.data.sources import DataConfig, Source, Unit, open_source
from casallm.data.tokenizer import (
    NAMED,
    Tokenizer,
    TokenizerConfig,
    load_tokenizer,
    named_tokenizer,
    replace_surrogates,
    train_tokenizer,
)
from casallm.data.workers import run_units
from casallm.errors import DataError
from casallm.units import format_bytes

logger = logging.getLogger(__name__)

SMALL_SOURCE_BYTES = 64_000_000
FEW_DOCUMENTS = 100
TOKENIZER_SAMPLE_BYTES = 100_000_000
TOKENIZER_SAMPLE_UNITS = 64

_BATCH_CHARS = 4 << 20
_SPLITS: tuple[Split, Split] = ("train", "val")


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


def load_or_prepare(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    *,
    vocab_size: int,
    root: Path = Path("data"),
    on_progress: Callable[[Progress], None] | None = None,
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


def build_tokenizer(config: TokenizerConfig) -> Tokenizer | None:
    """The vocabulary that `config` names; None where it is to be trained."""
    if config.name == "trained":
        return None
    if config.name not in NAMED and Path(config.name).is_dir():
        return load_tokenizer(Path(config.name))
    return named_tokenizer(config.name)


def fingerprint(source: Source, tokenizer: Tokenizer | None, vocab_size: int) -> str:
    """sha256 of all that decides the shards, known before any document is read."""
    return sha256_of(_plan(source.identity, tokenizer, vocab_size))


def prepare(
    source: Source,
    out: Path,
    *,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    workers: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Dataset:
    """The dataset of `source` in `out`, made now or, where it is whole already, opened.

    Trains a vocabulary of `vocab_size` if `tokenizer` is None. `workers`: processes, by default
    one a core. DataError if `out` holds anything else, and for whatever is wrong with the source;
    then there is no manifest, and nothing that is half written.
    """
    plan = _plan(source.identity, tokenizer, vocab_size)
    if is_dataset(out):
        return _open_prepared(out, plan)
    cores = os.process_cpu_count() if hasattr(os, "process_cpu_count") else os.cpu_count()
    workers = workers or cores or 1
    with _reported_faults(out), _locked(out, plan):
        if is_dataset(out):
            return _open_prepared(out, plan)
        scratch = out / ".prepare"
        units = source.units(scratch / "documents")
        if _text_bytes(units) < SMALL_SOURCE_BYTES:
            workers, threads = 1, workers
        else:
            threads = max(1, workers // len(units))
        job = Job(out, source.text_column, _val_fraction(units), threads)
        kept = _keep_tokenizer(job, units, tokenizer, vocab_size)
        _run(job, units, kept.vocab_size, workers, on_progress)
        manifest = _manifest(job, units, kept, plan)
        write_whole(out / "manifest.json", manifest.to_bytes())
        shutil.rmtree(scratch)
    return open_dataset(out)


def train_on_source(source: Source, vocab_size: int, scratch: Path) -> Tokenizer:
    """A vocabulary trained on `source` as `prepare` does it; `scratch` takes what must be made."""
    units = source.units(scratch)
    job = Job(scratch, source.text_column, _val_fraction(units), 1)
    return train_tokenizer(sample_texts(job, units, "train"), vocab_size)


def sample_texts(
    job: Job, units: list[Unit], split: Split, n_bytes: int = TOKENIZER_SAMPLE_BYTES
) -> Iterator[str]:
    """Documents of `split`, about `n_bytes` of them, from units spread over the source."""
    named = [unit for unit in units if unit.split in (split, None)]
    n_units = min(len(named), TOKENIZER_SAMPLE_UNITS)
    for i in range(n_units):
        left = n_bytes // n_units
        for text, of, size in _documents(job, named[i * len(named) // n_units], Oddities()):
            if of == split:
                yield text
                left -= size
            if left <= 0:
                break


def prepare_unit(job: Job, unit: Unit) -> Iterator[tuple[int, int, int]]:
    """Makes the shards of one unit, then its record; yields documents, tokens, bytes as it goes."""
    tokenizer = _tokenizer_at(job.out / "tokenizer")
    vocab_size = tokenizer.vocab_size
    writers = {
        each: ShardWriter(job.out, each, unit.name, vocab_size=vocab_size) for each in _SPLITS
    }
    tallies = {split: [0, 0, 0] for split in _SPLITS}
    oddities = Oddities()
    try:
        for batch in _batches(_documents(job, unit, oddities)):
            for split in _SPLITS:
                texts = [text for text, of, _ in batch if of == split]
                if not texts:
                    continue
                ids = tokenizer.encode_documents(texts, threads=job.threads)
                writers[split].append(ids)
                n_bytes = sum(size for _, of, size in batch if of == split)
                added = (len(texts), len(ids), n_bytes)
                tallies[split] = [a + b for a, b in zip(tallies[split], added, strict=True)]
                yield added
        records = {split: _record(tallies[split], writers[split].finish()) for split in _SPLITS}
    finally:
        for writer in writers.values():
            writer.discard()
    _write_record(job, unit, records, oddities)


def _plan(identity: dict[str, Any], tokenizer: Tokenizer | None, vocab_size: int) -> dict[str, Any]:
    trained = {"name": f"bpe-{vocab_size}"}
    given = {"fingerprint": tokenizer.fingerprint} if tokenizer else trained
    return {"version": VERSION, "source": identity, "tokenizer": given}


def _open_prepared(out: Path, plan: dict[str, Any]) -> Dataset:
    dataset = open_dataset(out)
    recorded = dataset.manifest.tokenizer.model_dump()
    is_same = dataset.manifest.source["fingerprint"] == plan["source"]["fingerprint"] and all(
        recorded[key] == value for key, value in plan["tokenizer"].items()
    )
    if not is_same:
        raise DataError(
            f"{out} holds the shards of {dataset.manifest.source['name']!r} with the vocabulary"
            f" {recorded['name']!r}, not those asked for: choose another directory, or remove it"
        )
    shutil.rmtree(out / ".prepare", ignore_errors=True)
    return dataset


@contextlib.contextmanager
def _locked(out: Path, plan: dict[str, Any]) -> Iterator[None]:
    """`out` for this process alone, known to hold nothing or a stopped run of the same plan."""
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
        yield


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
def _reported_faults(out: Path) -> Iterator[None]:
    """Turns what the system says about the output into one sentence."""
    try:
        yield
    except OSError as error:
        raise DataError(describe_fault(error, out)) from None


def describe_fault(error: OSError, out: Path) -> str:
    """What a person should know about an OSError while writing to `out`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = format_bytes(shutil.disk_usage(out).free) if out.exists() else "nothing"
        return (
            f"the disk that holds {out} is full ({free} free): make room and run the same again;"
            " finished units are kept"
        )
    return f"{error.filename or out} cannot be written ({error.strerror or error}): check the path"


def _val_fraction(units: list[Unit]) -> float:
    return 0.05 if _text_bytes(units) < SMALL_SOURCE_BYTES else 0.005


def _text_bytes(units: list[Unit]) -> int:
    return sum(unit.text_bytes for unit in units)


def _keep_tokenizer(
    job: Job, units: list[Unit], tokenizer: Tokenizer | None, vocab_size: int
) -> Tokenizer:
    """The vocabulary in `out/tokenizer`: as an earlier start left it, given, or trained now."""
    final = job.out / "tokenizer"
    if final.is_dir():
        return load_tokenizer(final)
    kept = tokenizer or train_tokenizer(sample_texts(job, units, "train"), vocab_size)
    temporary = job.scratch / "tokenizer"
    shutil.rmtree(temporary, ignore_errors=True)
    kept.save(temporary)
    temporary.rename(final)
    return kept


def _run(
    job: Job,
    units: list[Unit],
    vocab_size: int,
    workers: int,
    on_progress: Callable[[Progress], None] | None,
) -> None:
    """Prepares every unit that has no sound record yet."""
    finished = [unit for unit in units if _is_finished(job, unit, vocab_size)]
    records = [_read_record(job, unit) for unit in finished]
    totals = [
        sum(record["splits"][split][key] for record in records for split in _SPLITS)
        for key in ("documents", "tokens", "bytes_of_text")
    ]
    text_bytes = _text_bytes(units)
    started = time.monotonic()
    left = [unit for unit in units if unit not in finished]
    for added in run_units(functools.partial(prepare_unit, job), left, workers=workers):
        totals = [a + b for a, b in zip(totals, added, strict=True)]
        if on_progress:
            documents, tokens, n_bytes = totals
            seconds = time.monotonic() - started
            on_progress(Progress(documents, tokens, n_bytes, text_bytes, seconds))


def _documents(job: Job, unit: Unit, oddities: Oddities) -> Iterator[tuple[str, Split, int]]:
    """The unit's documents, their split and size in bytes."""
    for piece in unit.pieces:
        for text in read_documents(piece, text_column=job.text_column, oddities=oddities):
            try:
                raw = text.encode()
            except UnicodeEncodeError:
                oddities.add("lone surrogates replaced", str(piece.path))
                text = replace_surrogates(text)
                raw = text.encode()
            yield text, unit.split or split_of(raw, job.val_fraction), len(raw)


def split_of(document: bytes, val_fraction: float) -> Split:
    """The split of a document whose source names none, by the hash of its text."""
    number = int.from_bytes(hashlib.blake2b(document, digest_size=8).digest(), "big")
    return "val" if number < val_fraction * 2**64 else "train"


def _batches(
    documents: Iterator[tuple[str, Split, int]],
) -> Iterator[list[tuple[str, Split, int]]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += document[2]
        if size >= _BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@functools.lru_cache(maxsize=1)
def _tokenizer_at(directory: Path) -> Tokenizer:
    return load_tokenizer(directory)


def _record(tally: list[int], shards: list[ShardRecord]) -> SplitRecord:
    documents, tokens, n_bytes = tally
    return SplitRecord(
        documents=documents, tokens=tokens, bytes_of_text=n_bytes, shards=tuple(shards)
    )


def _write_record(
    job: Job, unit: Unit, records: dict[Split, SplitRecord], oddities: Oddities
) -> None:
    tree = {
        "splits": {split: record.model_dump(mode="json") for split, record in records.items()},
        "counts": oddities.counts,
        "examples": oddities.examples,
    }
    write_whole(job.scratch / f"{unit.name}.json", json.dumps(tree).encode())


def _read_record(job: Job, unit: Unit) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((job.scratch / f"{unit.name}.json").read_bytes())
    return record


def _is_finished(job: Job, unit: Unit, vocab_size: int) -> bool:
    if not (job.scratch / f"{unit.name}.json").exists():
        return False
    dtype = little_endian(dtype_for(vocab_size))
    splits = _read_record(job, unit)["splits"].values()
    shards = [ShardRecord.model_validate(each) for split in splits for each in split["shards"]]
    checks = [check_shard(job.out / each.name, each, dtype, with_hash=False) for each in shards]
    return not any(checks)


def _manifest(job: Job, units: list[Unit], tokenizer: Tokenizer, plan: dict[str, Any]) -> Manifest:
    records = [_read_record(job, unit) for unit in units]
    splits = {split: _sum_splits([each["splits"][split] for each in records]) for split in _SPLITS}
    if not splits["train"].documents:
        raise DataError(f"{plan['source']['name']} holds no documents to train on: name another")
    oddities = _sum_oddities(records)
    source = plan["source"] | ({"oddities": oddities} if oddities else {})
    if splits["val"].documents < FEW_DOCUMENTS:
        logger.warning(
            "only %d documents are held out: validation figures will be rough; name a file val-*"
            " to hold out more",
            splits["val"].documents,
        )
    record = TokenizerRecord(
        name=tokenizer.name,
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
    )
    dtype = dtype_for(tokenizer.vocab_size)
    return Manifest(tokenizer=record, dtype=dtype, source=source, splits=splits)


def _sum_splits(parts: list[dict[str, Any]]) -> SplitRecord:
    shards = [ShardRecord.model_validate(shard) for part in parts for shard in part["shards"]]
    keys = ("documents", "tokens", "bytes_of_text")
    return SplitRecord(
        **{key: sum(part[key] for part in parts) for key in keys},
        shards=tuple(sorted(shards, key=lambda shard: shard.name)),
    )


def _sum_oddities(records: list[dict[str, Any]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for record in records:
        for reason, count in record["counts"].items():
            if reason not in counts:
                logger.warning(
                    "rows with odd text (%s), first: %s", reason, record["examples"][reason]
                )
            counts[reason] = counts.get(reason, 0) + count
    return counts
