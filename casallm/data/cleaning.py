"""Which conversations must not be learned, and why.

The reasons, in the order in which they are looked for: `malformed` (no messages in the row),
`role_order`, `empty` (an answer or a question without content), `cut` (an answer that breaks off),
`another_assistant` (see `claims`), and, judged elsewhere, `excluded` (by the recipe's filters),
`duplicate` and `near_duplicate` (see `duplicates`) and `too_long`.

A cut answer is one that leaves a code block or a bracket open, ends in a comma, a colon, a hyphen,
a bare list mark, an operator, a table row that lacks cells or a word that nothing ends with
("the", "and"), or breaks off inside a sentence while the sentences before it are finished. Short
answers, lists, verse, headings, signatures and code end as they like.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from casallm.data.claims import find_foreign_claim
from casallm.data.conversation import Message, role_order_problem

DropReason = Literal[
    "malformed",
    "role_order",
    "empty",
    "cut",
    "another_assistant",
    "excluded",
    "duplicate",
    "near_duplicate",
    "too_long",
]


@dataclass(frozen=True, slots=True)
class Defect:
    """Why a conversation is not learned, and the text that shows it."""

    reason: DropReason
    evidence: str


def find_defect(messages: Sequence[Message], own_names: Collection[str] = ()) -> Defect | None:
    """The first reason not to learn a conversation, or None; `own_names` may be claimed."""
    problem = role_order_problem(messages)
    if problem is not None:
        return Defect("role_order", problem)
    for message in messages:
        if message.role != "system" and is_empty(message.content):
            return Defect("empty", f"the {message.role} says {message.content!r}")
    for message in messages:
        if message.role == "assistant" and is_cut(message.content):
            return Defect("cut", f"... {message.content.rstrip()[-80:]}")
    claim = find_foreign_claim(messages, own_names)
    return None if claim is None else Defect("another_assistant", claim)


def is_empty(text: str) -> bool:
    """Whether there is nothing in `text` but space, dots, dashes or a word for nothing."""
    bare = _INVISIBLE.sub("", text).strip()
    if not bare.strip(".\u2026-\u2013\u2014_* \n"):
        return True
    return bool(_EMPTY_BLOCK.fullmatch(bare) or _PLACEHOLDER.fullmatch(bare))


def is_cut(answer: str) -> bool:
    """Whether `answer` breaks off before its end."""
    text = answer.rstrip()
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    last = lines[-1] if lines else ""
    if last.startswith("```"):
        return len(lines) > 1 and lines[-2].endswith(":")
    if len(_FENCE.findall(text)) % 2 or _LIST_MARK.fullmatch(last) or _is_open_table_row(lines):
        return True
    return _ends_open(last) or _stops_in_sentence(lines) or bool(_CJK_TAIL.search(last))


_INVISIBLE = re.compile(r"[\u200b-\u200f\u2060\ufeff\u00ad]")
_EMPTY_BLOCK = re.compile(r"```\w*\s*```")
_PLACEHOLDER = re.compile(
    r"[<\[(]?\s*(?:no[ _-]?(?:output|response|answer|input|reply)|empty|null|nan|none given|n/?a"
    r"|(?:output|response|answer) (?:is )?(?:empty|missing|not available))\s*[>\])]?\.?",
    re.IGNORECASE,
)
_TABLE_RULE = re.compile(r"[|:\-\s]+")
_FENCE = re.compile(r"^\s*```", re.MULTILINE)
_LIST_MARK = re.compile(r"(?:\d{1,3}[.)]|[-*•+]|#+|\*\*|\|)")
_LIST_ITEM = re.compile(r"(?:\d{1,3}[.)]|[-*•+]|[a-zA-Z][.)])\s+")
_CODE = re.compile(r"[{}=;<>]|\(\)|^(?:def|class|import|from|return|for|if|SELECT|\$|>>>)\b")
_SENTENCE = re.compile(r"(?P<word>\w+)[.!?][\"'\u201d\u2019)]*\s+(?=[\"'\u201c\u2018(]?[A-ZÀ-Þ¿¡])")
_ABBREVIATED_WORDS = (
    "dr mr mrs ms st no vs prof jr sr inc co corp ltd e g i u s v al etc fig eq vol p pp gen col"
    " sgt lt ave approx"
)
_ABBREVIATIONS = frozenset(_ABBREVIATED_WORDS.split())
_FAREWELL = re.compile(
    r"\b(?:sincerely|regards|yours|love|cheers|best|signed|thanks|xoxo|respectfully|faithfully"
    r"|warmly|cordially|truly|hugs|wishes|author|source|confidence|answer)\b",
    re.IGNORECASE,
)
_NEVER_LAST_WORDS = (
    "the a an and or its their his my our your because than whose such very every between during"
    " including whereas although unless towards via if when while as who which und oder der dem"
    " den das ein eine einen mit für von zu et le les des une un dans pour avec qui el los las y"
    " que del con para por il gli della che com uma os dos nas \u0438 \u0432 \u043d\u0430"
    " \u0434\u043b\u044f \u0447\u0442\u043e \u043f\u043e"
)
_NEVER_LAST = frozenset(_NEVER_LAST_WORDS.split())
_OPEN_CLAUSE = re.compile(
    r"\b(?:the|an?|some|its?|this) \w+ of$|"
    r"^(?!.*\b(?:what|who|whom|which|where|that|how|to|you|i|we|they|he|she)\b[^.!?]*$)"
    r".*\b(?:with|of|for|from|at|into)$"
    r"|^(?!.*\b(?:what|who|whom|how|want|you|i|we|they|he|she)\b[^.!?]*$).*\bto$|"
    r"^(?!.*\b(?:how|what|who|where|why|than|as|it|that|which|all|there|i|you)\b[^.!?]*$)"
    r".*\b(?:is|was|were|be|has|have|had|would|could)$|"
    r"\b(?:is|are|be|was|were|it's|too|so|very|more) (?:too|so|very|more|most|less|also|not)$"
    r"|[\w)\]}] [=+\u00d7*/<\u2264\u2265\u2248\u2192&]$"
)
_CJK_TAIL = re.compile("\u3002[\u3040-\u30ff\u4e00-\u9fff\uff0c\u3001]{8,}$")
"""A sentence of Chinese or Japanese without an end, after one that has it."""

_TAIL_WORDS = 7
"""So many words tell whether the last clause is open."""
_FINISHED = re.compile(r"[.!?:\u2026\u3002\uff01\uff1f\"\u201d\u2019')*\]]$")
MIN_WORDS = 15
"""Shorter answers may end without a full stop."""


def _is_open_table_row(lines: Sequence[str]) -> bool:
    """Whether the last row of a table lacks cells, or the bar that the row before it ends with."""
    if len(lines) < 2 or not (lines[-1].startswith("|") and lines[-2].startswith("|")):
        return False
    if _TABLE_RULE.fullmatch(lines[-2]) is None and lines[-1].count("|") < lines[-2].count("|"):
        return True
    return lines[-2].endswith("|") and not lines[-1].endswith("|")


def _ends_open(last: str) -> bool:
    """Whether the last line ends in what nothing ends with."""
    if last.endswith(
        (",", "\uff0c", "\u3001", "\uff1a", "(", "[", "{", ":", ":=", "\u2013", "\u2014")
    ):
        return not last.endswith("::")
    words = last.split()
    if re.search(r"[a-z]{2}-$", last) or last.endswith(("<http", "<https")):
        return True
    if len(words) < 4 or last.endswith((".", "!", "?")):
        return False
    return (
        words[-1] in _NEVER_LAST or _OPEN_CLAUSE.search(" ".join(words[-_TAIL_WORDS:])) is not None
    )


def _stops_in_sentence(lines: Sequence[str]) -> bool:
    """Whether the last line ends in the middle of a sentence that follows finished ones."""
    last = lines[-1]
    if not _ends_in_a_word(last) or sum(len(line.split()) for line in lines) < MIN_WORDS:
        return False
    if _LIST_ITEM.match(last):
        return _breaks_the_pattern(lines)
    tail = _unfinished_sentence(last)
    if tail is not None:
        return _reads_as_prose(tail)
    return _follows_paragraphs(lines)


def _ends_in_a_word(line: str) -> bool:
    return bool(re.search(r"[A-Za-zÀ-ÿ]$", line)) and not _CODE.search(line)


def _breaks_the_pattern(lines: Sequence[str]) -> bool:
    """Whether all items before the last, two at least, are finished sentences and it is not."""
    items = [line for line in lines[:-1] if _LIST_ITEM.match(line)]
    return len(items) >= 2 and all(line.endswith((".", "!", "?")) for line in items)


def _unfinished_sentence(line: str) -> str | None:
    """What follows the last finished sentence in `line`; None where none is finished."""
    ends = [
        match.end()
        for match in _SENTENCE.finditer(line)
        if match["word"].lower() not in _ABBREVIATIONS and not match["word"].isdigit()
    ]
    return line[ends[-1] :] if ends else None


def _reads_as_prose(tail: str) -> bool:
    words = tail.split()
    if _FAREWELL.search(tail) or tail.startswith(("-", "\u2013", "\u2014", "http")) or ":" in tail:
        return False
    if words[-1].startswith("#") or re.search(r"[@./]", words[-1]):
        return False
    if len(words) == 1:
        return words[0].lower() in _NEVER_LAST or words[0].lower() in ("for", "in", "to", "this")
    capitalised = sum(word[0].isupper() for word in words)
    return capitalised <= len(words) / 2


def _follows_paragraphs(lines: Sequence[str]) -> bool:
    """Whether the last line is an unfinished paragraph after two finished ones or more."""
    last = lines[-1]
    if len(last.split()) < 5 or not _reads_as_prose(last):
        return False
    before = [line for line in lines[:-1] if len(line) >= 60 and not _LIST_ITEM.match(line)]
    return len(before) >= 2 and all(_FINISHED.search(line) for line in before)
