"""Questions about the built-in corpus, answered with its own sentences.

What a service is, what an operation does and which service has it, from the newest models of the
installed botocore; services that the corpus holds out are left out here too.
"""

import gzip
import html
import importlib.util
import json
import logging
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

from casallm.data.builtin import split_of
from casallm.data.conversation import Conversation
from casallm.data.identity import exchange
from casallm.data.phrasing import expand, pick

logger = logging.getLogger(__name__)

MAX_WORDS = 24
"""Longer first sentences are not asked for: a tiny model would not come to their end."""

EVERY = 4
"""Only every fourth service is asked about: thousands of facts, read in half a second."""

_TAG = re.compile(r"<[^>]+>")
_SENTENCE = re.compile(r"[A-Z][^.]{20,}?\.(?=\s|$)")


@dataclass(frozen=True, slots=True)
class _Fact:
    question: str
    answer: str


def corpus_question(random: Random) -> Conversation:
    """One question about a service or an operation, with the corpus's own answer."""
    fact = pick(_facts(), random)
    return exchange(expand(fact.question, random), fact.answer)


def corpus_is_installed() -> bool:
    """Whether botocore, of which the corpus is made, is there."""
    return importlib.util.find_spec("botocore") is not None


@lru_cache(maxsize=1)
def _facts() -> tuple[_Fact, ...]:
    spec = importlib.util.find_spec("botocore")
    if spec is None or spec.origin is None:
        return ()
    newest: dict[str, Path] = {}
    for path in sorted((Path(spec.origin).parent / "data").glob("*/*/service-2.json.gz")):
        newest[path.parent.parent.name] = path
    paths = [path for name, path in newest.items() if split_of(name) == "train"]
    return tuple(fact for path in paths[::EVERY] for fact in _facts_of(path))


def _facts_of(path: Path) -> list[_Fact]:
    model: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
    service = model["metadata"].get("serviceFullName", path.parent.parent.name)
    facts = []
    about = _first_sentence(model.get("documentation", ""))
    if about and " is a" in about:
        facts.append(_Fact(f"[What is|Explain|Tell me about|Describe] {service}[?|.]", about))
    for name, operation in model.get("operations", {}).items():
        what = _first_sentence(operation.get("documentation", ""))
        if what:
            ask = f"[What does {name} do|What is {name} for|Explain {name}]"
            facts.append(_Fact(f"{ask}[?| in {service}?]", what))
            ask = f"[Which service has|What is the name of the service with|Who offers] {name}?"
            facts.append(_Fact(ask, f"{service}."))
    return facts


def _first_sentence(documentation: str) -> str | None:
    """The first sentence that is whole and short enough, without markup."""
    text = " ".join(html.unescape(_TAG.sub(" ", documentation)).split())
    match = _SENTENCE.match(text)
    return match[0] if match and len(match[0].split()) <= MAX_WORDS else None
