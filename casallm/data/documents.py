"""Documents read from one piece of a file: parquet, JSON lines (plain, gzip, zstd) or plain text.

A piece is what can be read on its own: consecutive row groups of a parquet file, a byte range of
lines, or a whole compressed file, which cannot be entered in the middle. A line belongs to the
piece in which it starts, so pieces that tile a file give each of its lines exactly once.

What is a document: a row of a parquet file's text column; the text field of a JSON line; a plain
text file, or, where it is longer than 8 KiB, parts of it that end at the first blank line after
8 KiB, or the first line end after 64 KiB.

Nothing is dropped in silence. A row whose text is null, not text (JSON only) or blank is left out
and counted in `Oddities`. Anything else that cannot be read is a DataError that names the file and
the line, row group or byte.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal, Protocol

from casallm.config import nearest
from casallm.errors import DataError, MissingExtraError

FORMATS = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl.gz",
    ".jsonl.zst": "jsonl.zst",
    ".txt": "txt",
}
"""What a file holds, by the end of its name."""

TEXT_DOCUMENT_BYTES = 8 << 10
TEXT_DOCUMENT_MAX_BYTES = 64 << 10

LARGE_LINE_BYTES = 32 << 20
"""Of JSON; from here on memory counts more than speed."""

_BATCH_BYTES = 8 << 20
_BOM = b"\xef\xbb\xbf"


class Readable(Protocol):
    """A file of this machine (a Path), of a bucket or of the web; str() of it names it."""

    @property
    def name(self) -> str:
        """The last part of its path."""

    def open(self, mode: Literal["rb"], /) -> BinaryIO:
        """Open it for reading, from any offset."""


@dataclass(frozen=True)
class Piece:
    """A part of one file: row groups or bytes from `start` to `stop` (compressed: all of it)."""

    path: Readable
    format: str
    start: int
    stop: int
    text_bytes: int
    """About how much text it holds, from the file's listing or footer alone."""


@dataclass
class Oddities:
    """How many rows were left out or repaired, by reason, and where the first of each was."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, where: str) -> None:
        """Counts one row at `where`."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.examples.setdefault(reason, where)


def format_of(name: str) -> str | None:
    """The format that a file's name stands for; None if it is none that can be read."""
    name = name.lower()
    return next((kind for suffix, kind in FORMATS.items() if name.endswith(suffix)), None)


def read_documents(piece: Piece, *, text_column: str, oddities: Oddities) -> Iterator[str]:
    """The documents of `piece` in order; rows that are not are counted in `oddities`."""
    readers = {"parquet": _read_parquet, "txt": _read_text}
    reader = readers.get(piece.format, _read_json_lines)
    try:
        for text, where in reader(piece, text_column):
            if not isinstance(text, str):
                oddities.add("left out, null" if text is None else "left out, not text", where)
            elif not text or text.isspace():
                oddities.add("left out, empty", where)
            else:
                yield text
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{piece.path} is cut or is not gzip ({error}): fetch or compress it again"
        ) from None
    except OSError as error:
        raise DataError(
            f"{piece.path} cannot be read ({error.strerror or error}): check the file"
        ) from None


def open_parquet(path: Readable, text_column: str) -> Any:
    """The opened parquet file, known to have a column of text called `text_column`."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise MissingExtraError("pyarrow", "data") from None
    try:
        file = pq.ParquetFile(path if isinstance(path, Path) else path.open("rb"))
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} is not a parquet file that can be read ({_one_line(error)}): fetch it again,"
            " or leave it out"
        ) from None
    schema = file.schema_arrow
    if text_column not in schema.names:
        hint = nearest(text_column, schema.names)
        raise DataError(
            f"{path} has no column {text_column!r}{hint} (columns: {', '.join(schema.names)}): set"
            " data.text_column"
        )
    kind = schema.field(text_column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if str(kind) not in ("string", "large_string", "string_view"):
        raise DataError(
            f"{path} has {kind} in column {text_column!r}, not text: set data.text_column to one"
            f" of {', '.join(schema.names)}"
        )
    return file


def _read_parquet(piece: Piece, text_column: str) -> Iterator[tuple[Any, str]]:
    import pyarrow as pa

    file = open_parquet(piece.path, text_column)
    for group in range(piece.start, piece.stop):
        n_rows = max(1, file.metadata.row_group(group).num_rows)
        bytes_per_row = 1 + piece.text_bytes // (n_rows * (piece.stop - piece.start))
        batch_size = min(max(1, _BATCH_BYTES // bytes_per_row), 4096)
        row = 0
        try:
            batches = file.iter_batches(
                batch_size, row_groups=[group], columns=[text_column], use_threads=False
            )
            for batch in batches:
                for text in batch.column(0).to_pylist():
                    yield text, f"{piece.path}, row {row} of row group {group}"
                    row += 1
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"row group {group} of {piece.path} cannot be read after row {row}"
                f" ({_one_line(error)}): fetch the file again, or leave it out"
            ) from None


def _read_json_lines(piece: Piece, text_column: str) -> Iterator[tuple[Any, str]]:
    first = piece.start == 0
    for number, line in _lines(piece):
        where = _line_name(piece, number)
        if not line.strip():
            continue
        try:
            row = _parse(line.removeprefix(_BOM if number == 1 else b""))
        except UnicodeDecodeError as error:
            raise DataError(f"{where} is not UTF-8 ({_bad_byte(error)}): convert it") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is not JSON ({error}): mend or remove the line") from None
        if not isinstance(row, dict):
            raise DataError(f"{where} is not a JSON object: write {{{text_column!r}: ...}} a line")
        if first and text_column not in row:
            raise DataError(
                f"{where} has no field {text_column!r}{nearest(text_column, row)} (fields:"
                f" {', '.join(row)}): set data.text_column"
            )
        first = False
        yield row.get(text_column), where


def _parse(line: bytes) -> Any:
    """The value of a line of JSON.

    One character beyond the first plane makes Python keep all others in four bytes as well, twice
    over while a text is parsed. So a large line is parsed as if each byte were a character, and its
    strings become text one by one; where it spells characters by number, it has to be as it is.
    """
    if len(line) < LARGE_LINE_BYTES or b"\\u" in line:
        return json.loads(line.decode("utf-8"))
    row = json.loads(line.decode("latin-1"))
    return {_mend(key): _mend(row.pop(key)) for key in list(row)} if isinstance(row, dict) else row


def _mend(value: Any) -> Any:
    return value.encode("latin-1").decode("utf-8") if isinstance(value, str) else value


def _read_text(piece: Piece, _: str) -> Iterator[tuple[Any, str]]:
    lines: list[bytes] = []
    size = 0
    offset = piece.start
    for number, line in _lines(piece):
        lines.append(line)
        size += len(line)
        is_blank = not line.strip()
        if (is_blank and size > TEXT_DOCUMENT_BYTES) or size > TEXT_DOCUMENT_MAX_BYTES:
            yield _decode(b"".join(lines), piece.path, offset), _line_name(piece, number)
            offset += size
            lines, size = [], 0
    if lines:
        yield _decode(b"".join(lines), piece.path, offset), _line_name(piece, number)


def _decode(raw: bytes, path: Readable, offset: int) -> str:
    try:
        return raw.removeprefix(b"" if offset else _BOM).decode("utf-8").strip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text ({_bad_byte(error, offset)}): convert it, or leave it out"
        ) from None


def _lines(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """The lines that start inside the piece, numbered from 1 within it."""
    with piece.path.open("rb") as raw:
        if piece.format.endswith((".gz", ".zst")):
            opener = _gunzip if piece.format.endswith(".gz") else _unzstd
            yield from enumerate(opener(raw, piece.path), 1)
            return
        if piece.start:
            raw.seek(piece.start - 1)
            raw.readline()
        offset = raw.tell()
        for number, line in enumerate(raw, 1):
            if offset >= piece.stop:
                return
            yield number, line
            offset += len(line)


def _gunzip(raw: IO[bytes], _: Readable) -> Iterator[bytes]:
    with gzip.open(raw, "rb") as file:
        yield from file


def _unzstd(raw: IO[bytes], path: Readable) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise MissingExtraError("zstandard", "data") from None
    parts: list[bytes] = []
    try:
        for chunk in _decompress(raw, zstandard.ZstdDecompressor()):
            *whole, last = chunk.split(b"\n")
            for line in whole:
                yield b"".join((*parts, line, b"\n"))
                parts = []
            parts.append(last)
    except (zstandard.ZstdError, EOFError) as error:
        raise DataError(
            f"{path} is cut or is not zstd ({error}): fetch or compress it again"
        ) from None
    if last := b"".join(parts):
        yield last


def _decompress(raw: IO[bytes], decompressor: Any) -> Iterator[bytes]:
    """The frames of a zstd file, one after the other; EOFError if the last one is not whole."""
    frame = None
    while chunk := raw.read(64 << 10):
        while chunk:
            frame = frame or decompressor.decompressobj()
            yield frame.decompress(chunk)
            chunk = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("it ends inside a frame")


def _line_name(piece: Piece, number: int) -> str:
    """file:line, exact where the piece begins at the start of the file."""
    if piece.start == 0:
        return f"{piece.path}:{number}"
    return f"{piece.path}, line {number} after byte {piece.start}"


def _bad_byte(error: UnicodeDecodeError, offset: int = 0) -> str:
    return f"byte 0x{error.object[error.start]:02x} at offset {offset + error.start}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
