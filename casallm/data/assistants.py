"""The names of assistants and their makers in a text, replaced by one mark each.

assistants.yaml lists them: the certain ones, which mean an assistant or its maker wherever they
stand, and the ambiguous ones, which are also people, animals, winds or makers of other things.
"""

import re
from collections.abc import Collection
from functools import lru_cache
from importlib.resources import files
from typing import Any

import yaml

NAME = "\ue000"
"""Stands for a name that is surely an assistant's: ChatGPT."""
MAYBE_NAME = "\ue001"
"""Stands for a name that may be an assistant's: Claude, Llama."""
MAKER = "\ue002"
"""Stands for a maker of assistants and hardly anything else: OpenAI."""
MAYBE_MAKER = "\ue003"
"""Stands for a maker of assistants and of other things: Google."""

AI_NOUN = (
    r"(?:ai|a\.i\.|artificial intelligences?|(?:\w+ )?language models?|llms?|(?:ai )?assistants?"
    r"|chat ?bots?|bots?|models?|gpt|virtual|digital|program|software)"
)

_ARTICLE = re.compile(r"\b(?:an?|the|my|his|her|their|our|some|each|every)\s+$", re.IGNORECASE)
_AI_NEXT = re.compile(rf"[\s-]+(?:{AI_NOUN}|family|series)\b", re.IGNORECASE)
_MODEL_NEXT = re.compile(
    r"[\s-]+(?:(?:ai|large|language|chat)\s+)*(?:models?|llms?|chat ?bots?|ai|assistants?)\b",
    re.IGNORECASE,
)
_SURNAME_NEXT = re.compile(r"[ -](?!I\b|AI\b)[A-Z]\w")
_LETTERS = re.compile(r"[a-z]+")
_HAS_UPPER = re.compile(r"[A-Z]")


def mark_assistants(text: str, own_names: Collection[str] = (), *, any_case: bool = False) -> str:
    """`text` with each assistant and maker but `own_names` (casefolded) replaced by its mark.

    An ambiguous name must be capitalised as a name is, unless `any_case` or the whole text is in
    lower case, and is left alone as a common noun ("a llama") or with a surname. Before the word
    for a model ("Gemini models") it is certain.
    """
    any_case = any_case or not _HAS_UPPER.search(text)

    def mark(match: re.Match[str]) -> str:
        group = str(match.lastgroup)
        found = match[0]
        if found.casefold() in own_names:
            return found
        if group == "maker" or group == "name":
            return MAKER if group == "maker" else NAME
        if found.islower() and not any_case:
            return found
        if group == "maybe_maker":
            return MAYBE_MAKER
        if _is_common_noun(text, match):
            return found
        return NAME if _MODEL_NEXT.match(text, match.end()) else MAYBE_NAME

    return _pattern().sub(mark, text)


def may_name_assistant(text: str) -> bool:
    """Whether `text` may name an assistant or call something one: quick, and never wrongly no."""
    words, cjk = _words()
    if not words.isdisjoint(_LETTERS.findall(text.lower())):
        return True
    return "{{" in text or (not text.isascii() and any(name in text for name in cjk))


def _is_common_noun(text: str, match: re.Match[str]) -> bool:
    """Whether an ambiguous name is an animal, a wind or a person with a surname here."""
    if _SURNAME_NEXT.match(text, match.end()) and match[0] != match[0].upper():
        return not _AI_NEXT.match(text, match.end())
    before = text[max(0, match.start() - 8) : match.start()]
    return bool(_ARTICLE.search(before)) and not _AI_NEXT.match(text, match.end())


@lru_cache(maxsize=1)
def _lists() -> dict[str, Any]:
    path = files("casallm.data") / "assistants.yaml"
    return dict(yaml.safe_load(path.read_text(encoding="utf-8")))


@lru_cache(maxsize=1)
def _words() -> tuple[frozenset[str], list[str]]:
    """The words of which one stands in every text with a name, and the Chinese names."""
    lists = _lists()
    names, makers = lists["names"], lists["makers"]
    ambiguous = _LETTERS.findall(" ".join([*names["ambiguous"], *makers["ambiguous"]]))
    return frozenset([*" ".join(lists["words"]).split(), *ambiguous]), names["cjk"] + makers["cjk"]


@lru_cache(maxsize=1)
def _pattern() -> re.Pattern[str]:
    """One alternation, the certain before the ambiguous and makers before names."""
    names, makers = _lists()["names"], _lists()["makers"]
    groups = {
        "maker": _alternatives(makers, "certain"),
        "name": _alternatives(names, "certain"),
        "maybe_maker": _alternatives(makers, "ambiguous"),
        "maybe_name": _alternatives(names, "ambiguous"),
    }
    body = "|".join(f"(?P<{group}>{pattern})" for group, pattern in groups.items())
    return re.compile(body, re.IGNORECASE)


def _alternatives(lists: dict[str, list[str]], kind: str) -> str:
    """The words of one kind, whole as ASCII words go: Chinese stands beside them unspaced."""
    words = "|".join(lists[kind])
    if kind == "ambiguous":
        return rf"(?<![A-Za-z0-9_-])(?:{words})(?![A-Za-z0-9_])"
    cased = "".join(f"|(?-i:{word})" for word in lists["cased"])
    return rf"(?<![A-Za-z0-9_-])(?:{words}{cased})(?![A-Za-z0-9_])|{'|'.join(lists['cjk'])}"
