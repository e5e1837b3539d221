"""Many wordings from few lines: templates, and the ways in which people type.

In a template `[a|b|]` is one of the alternatives, which may be empty and nested, and `{key}` one
of the values that are filled in. Everything is drawn from a `random.Random`, by `random()` alone,
whose sequence Python promises to keep for a seed.
"""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from random import Random
from typing import Any, TypeVar

import yaml

T = TypeVar("T")
Fills = Mapping[str, Sequence[str]]

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_KEY = re.compile(r"\{(\w+)\}")
_NOT_WORDS = re.compile(r"[^\w]+")


@lru_cache(maxsize=8)
def load_phrases(name: str) -> dict[str, Any]:
    """The content of one of the package's YAML files of phrases."""
    text = (files("casallm.data") / name).read_text(encoding="utf-8")
    return dict(yaml.load(text, Loader=yaml.BaseLoader))


def pick(items: Sequence[T], random: Random) -> T:
    """One of `items`."""
    return items[int(random.random() * len(items))]


def expand(template: str, random: Random, fills: Fills | None = None) -> str:
    """`template` with every choice made and every key filled, spaces tidied."""
    fills = fills or {}
    while match := _CHOICE.search(template) or _KEY.search(template):
        found = match[1]
        options = fills[found] if match.re is _KEY else found.split("|")
        template = f"{template[: match.start()]}{pick(options, random)}{template[match.end() :]}"
    return _tidy(template)


def restyle(text: str, random: Random, *, slips: float = 0.08) -> str:
    """`text` as somebody may type it: with a capital, without, in capitals, or with a slip."""
    draw = random.random()
    if draw < slips:
        return _with_slip(text, random)
    if draw < 0.12:
        return text.upper()
    if draw < 0.2:
        return text.rstrip("?.!")
    return text if draw < 0.5 else capitalised(text)


def capitalised(text: str) -> str:
    """`text` with a capital at its beginning, after each full stop, and in "I"."""
    text = re.sub(r"\bi\b", "I", text)
    return re.sub(r"(^|[.!?] )([a-z])", lambda match: match[1] + match[2].upper(), text)


def normalised(text: str) -> str:
    """`text` without case and punctuation: what two wordings are compared by."""
    return " ".join(_NOT_WORDS.sub(" ", text.replace("'", "")).lower().split())


def _with_slip(text: str, random: Random) -> str:
    """`text` with two letters swapped or one left out."""
    place = 1 + int(random.random() * max(1, len(text) - 2))
    if random.random() < 0.5:
        return text[:place] + text[place + 1 :]
    return text[: place - 1] + text[place : place + 1] + text[place - 1 : place] + text[place + 1 :]


def _tidy(text: str) -> str:
    text = re.sub(r" +([,.!?])", r"\1", " ".join(text.split()))
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
