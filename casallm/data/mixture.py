"""The mixture of an SFT run: the selected conversations as tokens, with some held out.

A mixture is saved as one `.npz` file: the ids of all conversations end to end, the mask as one
bit a token, lengths, sources and rows by conversation, and a JSON header. Its fingerprint covers
every token and mask, their order and what is held out, and belongs to the run's identity.
"""

import hashlib
import io
import json
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from casallm.data.recipe import IdentityConfig, Recipe
from casallm.data.selection import JudgedRow, random_for, select
from casallm.data.tokenizer import Tokenizer
from casallm.errors import DataError

MIN_TO_HOLD_OUT = 10
"""A source with fewer conversations has none to spare for validation."""

_UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    TypeError,
    NotImplementedError,
    zipfile.BadZipFile,
)
"""What numpy and zipfile raise on a file that is cut or altered."""

Ids = NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True, slots=True)
class Sample:
    """One conversation: where it comes from, its ids, and which of them are learned."""

    source: str
    row: int
    ids: Ids
    is_target: NDArray[np.bool_]


@dataclass(frozen=True)
class SourceReport:
    """What became of the rows of one source."""

    name: str
    rows: int
    train: int
    validation: int
    shortened: int
    dropped: dict[str, int]
    """How many, by reason."""


@dataclass(frozen=True)
class Mixture:
    """Conversations to learn from and held-out ones, as tokens."""

    train: tuple[Sample, ...]
    validation: tuple[Sample, ...]
    reports: tuple[SourceReport, ...]
    identity: IdentityConfig
    tokenizer_fingerprint: str
    context_length: int
    pad_id: int
    fingerprint: str


def build_mixture(
    recipe: Recipe, tokenizer: Tokenizer, *, context_length: int, seed: int
) -> Mixture:
    """What `recipe` describes; DataError where a source cannot be read or nothing is left."""
    train: list[Sample] = []
    validation: list[Sample] = []
    reports: list[SourceReport] = []
    selected = select(recipe, tokenizer, context_length=context_length, seed=seed)
    for place, rows in enumerate(selected):
        samples = _to_samples(rows, tokenizer)
        held_out = _held_out(len(samples), recipe.validation_fraction, seed, place)
        validation += [samples[each] for each in sorted(held_out)]
        train += [sample for each, sample in enumerate(samples) if each not in held_out]
        reports.append(_report(recipe.sources[place].name, rows, len(held_out)))
    if not train:
        raise DataError(_nothing_left(reports))
    return Mixture(
        train=tuple(train),
        validation=tuple(validation),
        reports=tuple(reports),
        identity=recipe.identity,
        tokenizer_fingerprint=tokenizer.fingerprint,
        context_length=context_length,
        pad_id=tokenizer.pad_id,
        fingerprint=_fingerprint(train, validation, tokenizer.fingerprint, context_length),
    )


def save_mixture(mixture: Mixture, path: Path) -> None:
    """Writes `mixture` into one file, whole or not at all."""
    samples = [*mixture.train, *mixture.validation]
    names = [report.name for report in mixture.reports]
    header = {
        "reports": [asdict(report) for report in mixture.reports],
        "identity": mixture.identity.model_dump(),
        "tokenizer_fingerprint": mixture.tokenizer_fingerprint,
        "context_length": mixture.context_length,
        "pad_id": mixture.pad_id,
        "fingerprint": mixture.fingerprint,
        "train": len(mixture.train),
    }
    buffer = io.BytesIO()
    np.savez(
        buffer,
        ids=np.concatenate([sample.ids for sample in samples]),
        is_target=np.packbits(np.concatenate([sample.is_target for sample in samples])),
        lengths=np.array([len(sample.ids) for sample in samples], dtype=np.int64),
        sources=np.array([names.index(sample.source) for sample in samples], dtype=np.int32),
        rows=np.array([sample.row for sample in samples], dtype=np.int64),
        header=np.frombuffer(json.dumps(header).encode(), dtype=np.uint8),
    )
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(buffer.getvalue())
    temporary.replace(path)


def load_mixture(path: Path) -> Mixture:
    """The mixture that `save_mixture` wrote; DataError where it is damaged or something else."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return _from_arrays({name: arrays[name] for name in arrays.files}, path)
    except FileNotFoundError:
        raise DataError(f"there is no mixture {path}: build it again") from None
    except _UNREADABLE as error:
        raise DataError(f"{path} is damaged or no mixture ({error}): build it again") from None


def _to_samples(rows: Sequence[JudgedRow], tokenizer: Tokenizer) -> list[Sample]:
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    return [
        Sample(row.source, row.row, row.rendered.ids.astype(dtype), row.rendered.is_target)
        for row in rows
        if row.rendered is not None
    ]


def _held_out(n_samples: int, fraction: float, seed: int, place: int) -> set[int]:
    """Which samples of a source are kept for validation."""
    if n_samples < MIN_TO_HOLD_OUT or not fraction:
        return set()
    n_held_out = max(1, round(n_samples * fraction))
    order = random_for(seed, "held out", place).permutation(n_samples)
    return set(order[:n_held_out].tolist())


def _report(name: str, rows: Sequence[JudgedRow], n_held_out: int) -> SourceReport:
    n_kept = sum(row.kept for row in rows)
    dropped = Counter(str(row.reason) for row in rows if not row.kept)
    return SourceReport(
        name=name,
        rows=len(rows),
        train=n_kept - n_held_out,
        validation=n_held_out,
        shortened=sum(row.reason == "shortened" for row in rows),
        dropped=dict(dropped.most_common()),
    )


def _nothing_left(reports: Sequence[SourceReport]) -> str:
    dropped: Counter[str] = Counter()
    for report in reports:
        dropped.update(report.dropped)
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in dropped.most_common())
    return (
        f"the recipe leaves no conversation to train on ({reasons or 'its sources are empty'}):"
        " look at `casallm data preview RECIPE --dropped`"
    )


def _fingerprint(
    train: Sequence[Sample], validation: Sequence[Sample], tokenizer: str, context_length: int
) -> str:
    digest = hashlib.sha256(f"{tokenizer} {context_length} {len(train)}".encode())
    for sample in (*train, *validation):
        digest.update(f"\0{sample.source}\0{sample.row}\0{len(sample.ids)}\0".encode())
        digest.update(sample.ids.astype("<u4").tobytes())
        digest.update(np.packbits(sample.is_target).tobytes())
    return digest.hexdigest()


def _from_arrays(arrays: dict[str, NDArray[Any]], path: Path) -> Mixture:
    header = json.loads(arrays["header"].tobytes())
    reports = tuple(SourceReport(**report) for report in header["reports"])
    n_tokens = int(arrays["lengths"].sum())
    ends = np.cumsum(arrays["lengths"])[:-1]
    ids = np.split(arrays["ids"], ends)
    is_target = np.split(np.unpackbits(arrays["is_target"], count=n_tokens).astype(bool), ends)
    samples = [
        Sample(reports[source].name, row, ids[place], is_target[place])
        for place, (source, row) in enumerate(
            zip(arrays["sources"].tolist(), arrays["rows"].tolist(), strict=True)
        )
    ]
    train, validation = samples[: header["train"]], samples[header["train"] :]
    tokenizer, context_length = header["tokenizer_fingerprint"], header["context_length"]
    if _fingerprint(train, validation, tokenizer, context_length) != header["fingerprint"]:
        raise DataError(f"{path} is damaged, its fingerprint does not fit: build it again")
    return Mixture(
        train=tuple(train),
        validation=tuple(validation),
        reports=reports,
        identity=IdentityConfig(**header["identity"]),
        tokenizer_fingerprint=tokenizer,
        context_length=context_length,
        pad_id=header["pad_id"],
        fingerprint=header["fingerprint"],
    )
