"""The grammar of claims.yaml, compiled: patterns over a text whose assistants are marked."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

import yaml

from casallm.data.assistants import AI_NOUN, MAKER, MAYBE_MAKER, MAYBE_NAME, NAME

_MARKS = {"N": NAME, "n": MAYBE_NAME, "M": MAKER, "m": MAYBE_MAKER}
_REFERENCE = re.compile(r"<(\w+)>")

Alternative = str | list[str]


@dataclass(frozen=True)
class Grammar:
    """The patterns by what they find; claims.yaml says it of each."""

    claims: tuple[re.Pattern[str], ...]
    addressed: re.Pattern[str]
    asked_whether: re.Pattern[str]
    asked_about_self: re.Pattern[str]
    about_ai: re.Pattern[str]
    closing: re.Pattern[str]
    credit: re.Pattern[str]
    denied: re.Pattern[str]
    denied_after: re.Pattern[str]
    fiction: re.Pattern[str]
    former: re.Pattern[str]
    impersonal: re.Pattern[str]
    latter: re.Pattern[str]
    likely_claims: re.Pattern[str]
    new_maker: re.Pattern[str]
    new_name: re.Pattern[str]
    opening: re.Pattern[str]
    own_maker: re.Pattern[str]
    persona: re.Pattern[str]
    prefix: re.Pattern[str]
    refusal: re.Pattern[str]
    reported: re.Pattern[str]
    role_play: re.Pattern[str]
    speaker: re.Pattern[str]
    text_task: re.Pattern[str]
    uninvolved: re.Pattern[str]
    yes: re.Pattern[str]


@lru_cache(maxsize=1)
def load_grammar() -> Grammar:
    """The grammar, compiled once."""
    text = (files("casallm.data") / "claims.yaml").read_text(encoding="utf-8")
    lists = yaml.load(text, Loader=yaml.BaseLoader)
    fragments = {"ai": AI_NOUN, "names": NAME + MAYBE_NAME}
    for name, alternatives in lists.pop("fragments").items():
        fragments[name] = f"(?:{_join(alternatives, fragments)})"
    claims = [*lists.pop("claims"), *lists.pop("foreign_claims")]
    patterns = {name: _compile(alternatives, fragments) for name, alternatives in lists.items()}
    return Grammar(tuple(_compile([claim], fragments) for claim in claims), **patterns)


def _compile(alternatives: Sequence[Alternative], fragments: dict[str, str]) -> re.Pattern[str]:
    return re.compile(_join(alternatives, fragments), re.IGNORECASE)


def _join(alternatives: Sequence[Alternative], fragments: dict[str, str]) -> str:
    """The alternatives as one pattern, with marks and fragments in the places of references."""

    def resolve(match: re.Match[str]) -> str:
        name = match[1]
        if name in fragments:
            return fragments[name]
        return f"[{''.join(_MARKS[letter] for letter in name)}]"

    whole = [each if isinstance(each, str) else "".join(each) for each in alternatives]
    return _REFERENCE.sub(resolve, "|".join(whole))
