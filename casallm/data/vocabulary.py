"""The vocabulary of a preparation: given, or trained on a sample of the source.

A vocabulary is trained on documents of the training split alone, 100 MB of them at most, taken
from the beginnings of up to 64 units spread evenly over the source: every node that prepares the
same source trains the same one.
"""

import contextlib
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from casallm.data.destination import Destination
from casallm.data.documents import Oddities
from casallm.data.manifest import Split
from casallm.data.sources import Source, Unit
from casallm.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from casallm.data.unit import choose_val_fraction, documents_of
from casallm.errors import DataError
from casallm.units import format_bytes

log = logging.getLogger(__name__)

NO_TEXT = (
    "the source holds no text to train on besides what is held out: add documents, or name another"
    " source in data.source"
)
SAMPLE_BYTES = 100_000_000
SAMPLE_UNITS = 64


def train_on_source(source: Source, vocab_size: int) -> Tokenizer:
    """A vocabulary trained on the documents of `source` that `prepare` would train it on."""
    with tempfile.TemporaryDirectory() as scratch:
        units = source.units(Path(scratch))
        fraction = choose_val_fraction(units, source.text_column)
        return _train(units, source.text_column, fraction, vocab_size)


def held_out_texts(source: Source, *, most_bytes: int) -> list[str]:
    """Documents of `source` that `prepare` would hold out, `most_bytes` of them at most."""
    with tempfile.TemporaryDirectory() as scratch:
        units = source.units(Path(scratch))
        fraction = choose_val_fraction(units, source.text_column)
        return list(_sample(units, "val", source.text_column, fraction, most_bytes))


def settle_tokenizer(
    destination: Destination,
    units: Sequence[Unit],
    tokenizer: Tokenizer | None,
    *,
    text_column: str,
    val_fraction: float,
    vocab_size: int,
) -> Tokenizer:
    """The vocabulary in `destination`: as an earlier start left it, given, or trained now."""
    final = destination.work / "tokenizer"
    if destination.fetch_tokenizer():
        return load_tokenizer(final)
    settled = tokenizer or _train(units, text_column, val_fraction, vocab_size)
    with tempfile.TemporaryDirectory(dir=destination.scratch) as temporary:
        settled.save(Path(temporary) / "tokenizer")
        with contextlib.suppress(OSError):  # another node has been faster
            (Path(temporary) / "tokenizer").rename(final)
    destination.keep_tokenizer()
    return load_tokenizer(final)


def _train(
    units: Sequence[Unit], text_column: str, val_fraction: float, vocab_size: int
) -> Tokenizer:
    return train_tokenizer(
        _sample(units, "train", text_column, val_fraction, SAMPLE_BYTES), vocab_size
    )


def _sample(
    units: Sequence[Unit], split: Split, text_column: str, val_fraction: float, most_bytes: int
) -> Iterator[str]:
    """Documents of `split`, from units spread over the source; DataError if there are none."""
    units = [unit for unit in units if unit.split in (None, split)]
    n_units = min(len(units), SAMPLE_UNITS)
    n_bytes = 0
    for i in range(n_units):
        unit = units[i * len(units) // n_units]
        for document in documents_of(unit, text_column, val_fraction, Oddities()):
            if document.split == split:
                yield document.text
                n_bytes += document.n_bytes
            if n_bytes >= most_bytes * (i + 1) // n_units:
                break
    if not n_bytes:
        raise DataError(NO_TEXT)
    log.info("read %s of text from %d units", format_bytes(n_bytes), n_units)
