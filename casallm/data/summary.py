"""What is in a data set, and how vocabularies split text, as plain values to be printed."""

import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from casallm.data.manifest import SPLITS, Split
from casallm.data.shards import Dataset, open_dataset
from casallm.data.tokenizer import Tokenizer

MEASURED_DOCUMENTS = 10_000
"""Lengths are taken of so many documents, the first of a split."""

_SAMPLE_CHARS = 300
_CHUNK_TOKENS = 1_000_000

Ids = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class Compression:
    """How many tokens a vocabulary makes of a text."""

    name: str
    vocab_size: int
    tokens: int
    bytes_of_text: int

    @property
    def bytes_per_token(self) -> float:
        """Of text; more is better."""
        return self.bytes_of_text / max(1, self.tokens)


def describe_dataset(directory: Path, *, n_samples: int = 3) -> dict[str, Any]:
    """What a person wants to know of the dataset in `directory`, fit for JSON.

    `splits`: for each, `tokens`, `documents`, `bytes_of_text`, `shards`, `bytes_per_token` (without
    `<|bos|>`), `document_tokens` (`median`, `mean`, `longest`, of the first 10,000) and
    `samples`, the beginnings of documents, decoded.
    """
    dataset = open_dataset(directory)
    tokenizer = dataset.tokenizer()
    manifest = dataset.manifest
    return {
        "directory": str(directory),
        "source": manifest.source,
        "tokenizer": manifest.tokenizer.model_dump(),
        "dtype": manifest.dtype,
        "sha256": manifest.sha256,
        "splits": {
            split: _describe_split(dataset, tokenizer, split, n_samples) for split in SPLITS
        },
    }


def documents_in(dataset: Dataset, split: Split) -> Iterator[Ids]:
    """The ids of each document of `split` in order, `<|bos|>` included."""
    bos_id = dataset.manifest.tokenizer.bos_id
    for number in range(len(dataset.splits[split].shards)):
        ids = dataset.shard(split, number)
        start = 0
        for offset in range(0, len(ids), _CHUNK_TOKENS):
            found = np.flatnonzero(ids[offset : offset + _CHUNK_TOKENS] == bos_id) + offset
            for begin in found.tolist():
                if begin > start:
                    yield ids[start:begin]
                start = begin
        yield ids[start:]


def compare_tokenizers(texts: Sequence[str], tokenizers: Sequence[Tokenizer]) -> list[Compression]:
    """Bytes a token of each vocabulary on the same texts."""
    n_bytes = sum(len(text.encode()) for text in texts)
    return [
        Compression(each.name, each.vocab_size, sum(map(len, each.encode_batch(texts))), n_bytes)
        for each in tokenizers
    ]


def split_into_tokens(tokenizer: Tokenizer, text: str) -> list[tuple[int, str]]:
    """Each id that `text` becomes and what it stands for, broken characters as U+FFFD."""
    return [(id_, tokenizer.decode([id_])) for id_ in tokenizer.encode(text)]


def _describe_split(
    dataset: Dataset, tokenizer: Tokenizer, split: Split, n_samples: int
) -> dict[str, Any]:
    record = dataset.splits[split]
    measured = list(itertools.islice(documents_in(dataset, split), MEASURED_DOCUMENTS))
    lengths = [len(ids) for ids in measured]
    of_text = record.tokens - record.documents
    return {
        "tokens": record.tokens,
        "documents": record.documents,
        "bytes_of_text": record.bytes_of_text,
        "shards": len(record.shards),
        "bytes_per_token": record.bytes_of_text / of_text if of_text else 0.0,
        "document_tokens": {
            "median": statistics.median(lengths) if lengths else 0,
            "mean": statistics.mean(lengths) if lengths else 0,
            "longest": max(lengths, default=0),
        },
        "samples": [
            tokenizer.decode(ids[: 2 * _SAMPLE_CHARS].tolist())[:_SAMPLE_CHARS]
            for ids in measured[:n_samples]
        ],
    }
