"""Rows of a data set for fine-tuning, one by one: from a file, or streamed from the hub.

A file is JSON Lines (`.jsonl`, `.json`; `.gz` and `.zst` around either), one JSON list of objects
(`.json`), or parquet. A hub name is read through `datasets` in streaming mode, so that only what
is taken is downloaded. A row's number is its place in the file or in the stream, from 0.
"""

import gzip
import io
import itertools
import json
import logging
import os
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from casallm.data.deadline import within
from casallm.errors import DataError, MissingExtraError

logger = logging.getLogger(__name__)

Row = dict[str, Any]

HUB_URL = "https://huggingface.co"
HUB_SECONDS = 8.0
"""An answer of the hub is waited for this long, name resolution included."""
SHUFFLE_BUFFER = 10_000
"""Rows among which a streamed source is shuffled, when only some of it is taken."""

_FORMATS = (".jsonl", ".json", ".parquet")


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Each row of a file and its number; DataError names the file and line that cannot be read."""
    if not path.is_file():
        hint = "it is a directory: name a file in it" if path.is_dir() else "check the path"
        raise DataError(f"there is no file {path} to take conversations from: {hint}")
    kind = Path(path.name.removesuffix(".gz").removesuffix(".zst")).suffix.lower()
    if kind not in _FORMATS:
        raise DataError(
            f"{path} is no file of conversations: its name must end in {', '.join(_FORMATS)}"
            " (.gz or .zst may follow)"
        )
    try:
        yield from enumerate(_read_parquet(path) if kind == ".parquet" else _read_json(path))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is cut or is not gzip ({error}): fetch it again") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason}): convert it") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}): check it") from None


def stream_hub(name: str, *, subset: str | None, split: str, seed: int) -> Iterator[Row]:
    """The rows of a data set on the hub, shuffled by `seed` within a buffer, as they arrive."""
    try:
        import datasets
        import httpx
    except ImportError:
        raise MissingExtraError("datasets", "data") from None
    try:
        stream = datasets.load_dataset(name, subset, split=split, streaming=True)
        yield from stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    except (datasets.exceptions.DatasetsError, FileNotFoundError, ValueError) as error:
        raise DataError(
            f"the hub has no data set {name} with split {split!r} ({_first_line(error)}): check"
            " the recipe's `hub`, `subset` and `split`"
        ) from None
    except (OSError, httpx.HTTPError) as error:
        raise DataError(
            f"{name} could not be read from the hub ({_first_line(error)}): try again, or give"
            " the recipe a `path` to a downloaded file"
        ) from None


def hub_is_reachable(*, seconds: float = HUB_SECONDS) -> bool:
    """Whether the hub answers within `seconds`; no where HF_HUB_OFFLINE is set."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    try:
        return within(seconds, lambda: _hub_answers(seconds))  # no urllib limit covers resolution
    except TimeoutError:
        return False


def _hub_answers(seconds: float) -> bool:
    endpoint = os.environ.get("HF_ENDPOINT", HUB_URL)
    try:
        request = urllib.request.Request(f"{endpoint}/api/datasets?limit=1")
        with urllib.request.urlopen(request, timeout=seconds) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError, ValueError):
        return False


def _read_json(path: Path) -> Iterator[Row]:
    """The objects of JSON Lines, or of one JSON list."""
    with _open_text(path) as text:
        first = next((line for line in text if line.strip()), "")
        if first.lstrip("\ufeff \t").startswith("["):
            yield from _read_list(first.lstrip("\ufeff") + text.read(), path)
            return
        for number, line in enumerate(itertools.chain([first], text)):
            if line.strip():
                yield _parse(line.lstrip("\ufeff"), f"{path}, row {number}")


def _read_list(text: str, path: Path) -> Iterator[Row]:
    items = _load(text, str(path))
    for number, item in enumerate(items):
        yield _checked(item, f"{path}, row {number}")


def _parse(line: str, where: str) -> Row:
    return _checked(_load(line, where), where)


def _load(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error}): mend or remove it") from None


def _checked(item: object, where: str) -> Row:
    if not isinstance(item, dict):
        raise DataError(f'{where} is not a JSON object: a row is {{"messages": [...]}}')
    return item


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise MissingExtraError("pyarrow", "data") from None
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise DataError(
            f"{path} is not a parquet file that can be read ({_first_line(error)}): fetch it again"
        ) from None


def _open_text(path: Path) -> IO[str]:
    if path.name.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8")
    if not path.name.endswith(".zst"):
        return path.open(encoding="utf-8")
    return io.TextIOWrapper(io.BytesIO(_unzstd(path)), encoding="utf-8")


def _unzstd(path: Path) -> bytes:
    """The content of all frames; read whole, because a stream would end quietly at a cut."""
    try:
        import zstandard
    except ImportError:
        raise MissingExtraError("zstandard", "data") from None
    rest, parts = path.read_bytes(), []
    while rest:
        frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            parts.append(frame.decompress(rest))
        except zstandard.ZstdError as error:
            raise DataError(f"{path} is not zstd ({error}): fetch it again") from None
        if not frame.eof:
            raise DataError(f"{path} is cut: it ends inside a zstd frame; fetch it again")
        rest = frame.unused_data
    return b"".join(parts)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0][:160]
