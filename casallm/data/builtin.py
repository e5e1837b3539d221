"""The built-in corpus: the reference documentation inside the installed botocore.

About 22 MB of unique technical English (Apache-2.0) that every installation already has, because
s3fs brings botocore: enough to try the whole pipeline, not a corpus to judge a model by.

A document is what the newest model of a service says about one operation and all that it takes
and returns, about a shape that no operation mentions, or about the service itself: markup
stripped, one paragraph or list item a line, lines of 60 characters or more, each line kept once
in the whole corpus. Whole services are held out, chosen by a hash of their names. The corpus
changes with botocore's version, so version and hash are part of its identity.
"""

import gzip
import hashlib
import html
import importlib.metadata
import importlib.util
import json
import logging
import re
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from casallm.errors import DataError, MissingExtraError

logger = logging.getLogger(__name__)

RULES_VERSION = 1
"""Of everything below that decides the documents; part of the corpus's identity."""

MIN_LINE_CHARS = 60
"""Shorter lines are labels and enumerations ("Default: 5"), not prose."""

VAL_SERVICES = 1 / 16
"""Share of services held out; about 5 % of the text."""

_BLOCK = re.compile(
    r"</?(?:p|br|li|ul|ol|div|h\d|dl|dt|dd|table|tr|td|th|thead|tbody|pre|note|important"
    r"|fullname|title|para|section|caution)\b[^>]*>",
    re.IGNORECASE,
)
_TAG = re.compile(r"</?[a-zA-Z][^>]*>|<!--.*?-->", re.DOTALL)


def builtin_identity() -> dict[str, Any]:
    """What the corpus is made of: botocore's version, the hash of its models, and the rules."""
    root, version = _botocore()
    digest = hashlib.sha256()
    for name, path in _newest_models(root):
        digest.update(f"{name}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return {"botocore": version, "sha256": digest.hexdigest(), "rules": RULES_VERSION}


def write_builtin(directory: Path) -> None:
    """Writes train.jsonl and val.jsonl ({"text": document} a line) into `directory`.

    Both are whole or absent: each is written beside its name and renamed.
    """
    root, version = _botocore()
    models = _newest_models(root)
    seen: set[str] = set()
    documents: dict[str, list[str]] = {"train": [], "val": []}
    for name, path in models:
        documents[split_of(name)] += _unseen(_extract(path), seen)
    if not documents["train"] or not documents["val"]:
        raise DataError(
            f"botocore {version} in {root} holds no documentation to make the built-in corpus of:"
            " install it again, or set data.source to files of yours"
        )
    directory.mkdir(parents=True, exist_ok=True)
    for split, texts in documents.items():
        temporary = directory / f".{split}-{secrets.token_hex(4)}.tmp"
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(f"{json.dumps({'text': text}, ensure_ascii=False)}\n" for text in texts)
        temporary.replace(directory / f"{split}.jsonl")
    logger.info("built-in corpus: documentation of %d services", len(models))


def split_of(service: str) -> str:
    """`val` for the services whose hashed name falls into the held-out share, else `train`."""
    number = int.from_bytes(hashlib.sha256(service.encode()).digest()[:8], "big")
    return "val" if number < VAL_SERVICES * 2**64 else "train"


def strip_markup(documentation: str) -> list[str]:
    """The lines of prose in a documentation field, its HTML removed, spaces collapsed."""
    text = html.unescape(_TAG.sub("", _BLOCK.sub("\n", documentation.replace("\n", " "))))
    lines = (" ".join(line.split()) for line in text.split("\n"))
    return [line for line in lines if len(line) >= MIN_LINE_CHARS]


def _botocore() -> tuple[Path, str]:
    """Where botocore's models are and its version, without importing it (0.3 s)."""
    spec = importlib.util.find_spec("botocore")
    if spec is None or spec.origin is None:
        raise MissingExtraError("botocore (the built-in corpus comes from it)", "train")
    version = importlib.metadata.version("botocore")
    return Path(spec.origin).parent / "data", version


def _newest_models(root: Path) -> list[tuple[str, Path]]:
    """Every service and its newest model, by service name."""
    newest: dict[str, Path] = {}
    for path in sorted(root.glob("*/*/service-2.json*")):
        newest[path.parent.parent.name] = path
    return sorted(newest.items())


def _extract(path: Path) -> list[list[str]]:
    """The documents of one service model, each as its lines."""
    raw = path.read_bytes()
    model = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)
    return [[line for field in fields for line in strip_markup(field)] for fields in _fields(model)]


def _fields(model: dict[str, Any]) -> Iterator[list[str]]:
    """The documentation fields that make up each document."""
    shapes = dict(model.get("shapes", {}))
    yield [model.get("documentation", "")]
    for operation in model.get("operations", {}).values():
        ends = [operation[end]["shape"] for end in ("input", "output") if end in operation]
        parts = [operation, *(part for end in ends for part in _take(end, shapes))]
        yield [part.get("documentation", "") for part in parts]
    for name in list(shapes):
        yield [part.get("documentation", "") for part in _take(name, shapes)]


def _take(name: str, shapes: dict[str, Any]) -> list[dict[str, Any]]:
    """The shape `name`, its members and all that they consist of, removed from `shapes`."""
    parts: list[dict[str, Any]] = []
    names = [name]
    while names:
        shape = shapes.pop(names.pop(), {})
        inner = [shape[key] for key in ("member", "key", "value") if key in shape]
        members = [*shape.get("members", {}).values(), *inner]
        parts += [shape, *members]
        names += [member["shape"] for member in reversed(members)]
    return parts


def _unseen(documents: Iterable[list[str]], seen: set[str]) -> list[str]:
    """The documents' text without the lines in `seen`, which grows; empty ones are left out."""
    texts = []
    for lines in documents:
        fresh = [line for line in dict.fromkeys(lines) if line not in seen]
        seen.update(fresh)
        if fresh:
            texts.append("\n".join(fresh))
    return texts
