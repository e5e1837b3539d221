"""Does the assistant say, in its own voice, that it is another assistant or another's product?

What others say does not count: quoted speech, code and the lines of a script are taken out
first. Names that are also a person's, an animal's or a wind's (Claude, Llama, Mistral), and
makers of other things (Google), count only in a sentence about an AI, or where the user asked the
assistant about itself, and not in a story.

A sentence that joins a first person to a sure name or maker is a claim unless a comparison, a
denial or an opinion stands between them. Of a text or a persona that the user asked for, in which
a program speaks, only the opening and the closing are the assistant's own voice.

Decided: a denial alone stays ("I am not ChatGPT"); a denial with a claim goes ("I am not
ChatGPT, I am Claude"). A mere "as an AI language model, I ..." claims no one's name and stays. A
"yes" to "are you ChatGPT?" goes. An assistant name of no list goes where a sentence introduces it
as one ("I am Zorb, an AI assistant"), unless the user or the system message gave it that name.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property

from casallm.data.assistants import (
    MAKER,
    MAYBE_MAKER,
    MAYBE_NAME,
    NAME,
    mark_assistants,
    may_name_assistant,
)
from casallm.data.claim_patterns import load_grammar
from casallm.data.conversation import Message

_ENDS_CHARS = 600
"""Of a long question only this much of its beginning and of its end is read."""

_SENTENCE_CHARS = 1000
"""Of a sentence no more is read."""

_SURE = re.compile(f"[{NAME}{MAKER}]")
_ANY = re.compile(f"[{NAME}{MAYBE_NAME}{MAKER}{MAYBE_MAKER}]")
_THIRD_PERSON = re.compile(
    rf"{_ANY.pattern}(?:\s+(?:is|was|are|were|has|have|had|can|does|will|fue|es|ha|est|a|ist|wurde"
    r"|foi|è|był|создала?|это)\b|是|由|は)"
)
_INTRODUCES = re.compile(
    r"\b(?i:my name is|call me|i go by|(?:made|created|built|developed|trained|released|owned)"
    r" (?:me|by)|(?:work|product|creation|brainchild) of)\b"
    r"|\bmy (?:creators?|makers?|developers?|company)\b"
)
"""May introduce the assistant by a name or a maker of no list."""

_OR = re.compile(r"\b(?:or|oder|ou|o|of|eller|или|czy)\b|还是|還是|それとも", re.IGNORECASE)
_EARLY = 3
"""In so many sentences a question is answered."""
_PERSONA_TURNS = 3
"""So many turns of the user's a persona lasts."""

_BARE = re.compile(rf"\W*{_ANY.pattern}\s+(?:is|was|did|does|has)\W*", re.IGNORECASE)
"""Answers "who made you?" in short: "OpenAI did."."""

_PRONOUN = re.compile(
    r"^(?:(?:in fact|actually|indeed|and|yes),? )?(?:it|they|he|she|that|this)\b", re.IGNORECASE
)
"""Begins a sentence about what the sentence before it names."""

_FIRST_PERSON = re.compile(r"\b(?:i|me|my)\b", re.IGNORECASE)
_CODE_BLOCK = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_BLOCK_QUOTE = re.compile(r"^\s*>.*$", re.MULTILINE)
_QUOTATION = re.compile(
    r"\"[^\"\n]*\"|\u201c[^\u201d\n]*\u201d|\u201e[^\u201c\u201d\n]*[\u201c\u201d]|\xab[^\xbb\n]*\xbb"
    r"|\u300c[^\u300d\n]*\u300d|(?<!\w)'[^'\n]+'(?!\w)"
)
_SCRIPT_LINE = re.compile(
    r"^[\W\d]*(?P<speaker>[A-Z][\w .'-]{0,24}?)\**:\**[ \t]+\S+[ \t]+\S.*$", re.MULTILINE
)
_SIGNATURE = re.compile(
    r"(?:[.!?\n]\s*[-\u2013\u2014~]|\n(?:best|cheers|regards|love|yours|sincerely|thanks)[\w ]*\n"
    r"|\n\w[\w' ]{2,30},\s*\n)\s*(?P<name>\w[\w. -]{1,24}?)\W*$",
    re.IGNORECASE,
)
_LINK = re.compile(r"\[([^\]\n]*)\]\([^)\n]*\)")
_MARKUP = re.compile(r"[*`_]{1,3}(?=\S)|(?<=\S)[*`_]{1,3}")
_SENTENCE_END = re.compile(r"(?<=[.!?;])[\s)\"']+|[\u3002\uff01\uff1f\u061f\u06d4]+|\n+")


def find_foreign_claim(messages: Sequence[Message], own_names: Collection[str] = ()) -> str | None:
    """The first sentence in which the assistant claims to be another, or None.

    `own_names` are the name and the maker that it may claim.
    """
    own = {name.casefold() for name in own_names}
    given: list[str] = []
    for message in messages:
        if message.role != "assistant":
            given.append(message.content)
            continue
        if _may_claim(given[-1] if given else "", message.content):
            claim = _Exchange(given, own).find_claim(message.content)
            if claim is not None:
                return claim
    return None


def _may_claim(question: str, answer: str) -> bool:
    return (
        may_name_assistant(answer)
        or (may_name_assistant(question) and _affirms(answer))
        or (len(answer) < _ENDS_CHARS and _INTRODUCES.search(answer) is not None)
    )


def _affirms(answer: str) -> bool:
    grammar = load_grammar()
    return any(pattern.match(answer) for pattern in (grammar.yes, grammar.former, grammar.latter))


class _Exchange:
    """What the user and the system said, which decides how the answer is to be read."""

    def __init__(self, given: Sequence[str], own: set[str]) -> None:
        self.own = own
        self.given = given
        self.grammar = load_grammar()
        question = given[-1].replace("\u2019", "'") if given else ""
        if len(question) > 2 * _ENDS_CHARS:
            question = f"{question[:_ENDS_CHARS]}\n{question[-_ENDS_CHARS:]}"
        self.question = question
        unquoted = _QUOTATION.sub("", question)
        self.asked = self._mark_any_case(unquoted)
        self.asks_whether = (
            _ANY.search(self.asked) is not None
            and self.grammar.asked_whether.search(self.asked) is not None
        )
        asks_who = self.grammar.asked_about_self.search(unquoted) is not None
        is_addressed = self.grammar.addressed.search(self.asked) is not None
        self.is_about_self = asks_who or self.asks_whether or is_addressed
        self.is_refused = False

    def find_claim(self, answer: str) -> str | None:
        """The sentence of `answer` that claims to be another assistant, or None."""
        text = answer.replace("\u2019", "'")
        self.is_refused = self.grammar.refusal.match(text) is not None
        claim = self._spoken_claim(text)
        if claim is not None and self.is_others_text:
            return self._spoken_claim(self._frame(text))
        return claim

    @cached_property
    def is_fiction(self) -> bool:
        """Whether the answer speaks for somebody else."""
        return (
            self.grammar.fiction.search(self.question) is not None
            or self.grammar.role_play.search(self.all_given) is not None
        ) and not self.is_refused

    @cached_property
    def all_given(self) -> str:
        """What the assistant was told before it answered, casefolded."""
        return "\n".join(self.given).casefold()

    @cached_property
    def is_others_text(self) -> bool:
        """Whether the user asked for a text, or a persona, that speaks as a program or of one."""
        if self.grammar.asked_about_self.search(self.question) and not self._is_persona(
            self.question
        ):
            return False
        return (
            self.grammar.text_task.search(self.question) is not None
            and self._names_speaker(self.question)
        ) or any(self._is_persona(each) for each in self.given[-_PERSONA_TURNS:])

    def _is_persona(self, text: str) -> bool:
        return self.grammar.persona.search(text) is not None and self._names_speaker(text)

    def _names_speaker(self, text: str) -> bool:
        return self.grammar.speaker.search(self._mark_any_case(text)) is not None

    def _mark_any_case(self, text: str) -> str:
        is_named = may_name_assistant(text)
        return mark_assistants(text, self.own, any_case=True) if is_named else text

    def _frame(self, text: str) -> str:
        """The opening and the closing of an answer that gives a text of somebody else's."""
        lines = [line for line in text.split("\n") if line.strip()]
        opening = [line for line in lines[:1] if self.grammar.opening.search(self._marked(line))]
        closing = self.grammar.closing.search("\n".join(lines[-2:]))
        return "\n".join([*opening, closing[0] if closing else ""])

    def _marked(self, text: str) -> str:
        return mark_assistants(text, self.own)

    def _says_yes(self, text: str) -> bool:
        """Whether the answer is a yes to "are you X?" or takes a side of "X or Y?"."""
        if not self.asks_whether:
            return False
        sides = _OR.split(self.asked)
        if len(sides) > 1:
            is_first, is_last = (_ANY.search(sides[each]) is not None for each in (0, -1))
            if self.grammar.former.match(text):
                return is_first
            if self.grammar.latter.match(text):
                return is_last
            if is_first and is_last and not self._evades(text):
                return True
        return self.grammar.yes.match(text) is not None

    def _evades(self, text: str) -> bool:
        """Whether the answer to "X or Y?" takes neither side, or the assistant's own."""
        first = next(_sentences(text), "")
        is_own = any(name in text.casefold() for name in self.own)
        return is_own or self.grammar.denied.search(first) is not None

    def _spoken_claim(self, text: str) -> str | None:
        if self._says_yes(text):
            return text.strip().split("\n")[0]
        text = _plain(text if self.is_about_self else _without_others_words(text))
        any_case = self.is_about_self or text.islower()
        last_named = ""
        sentences = list(_sentences(text))
        for number, sentence in enumerate(sentences):
            if not (
                may_name_assistant(sentence)
                or (last_named and _PRONOUN.match(sentence))
                or (self.is_about_self and _INTRODUCES.search(sentence))
            ):
                last_named = ""
                continue
            marked = mark_assistants(sentence, self.own, any_case=any_case)
            if last_named:
                marked = _PRONOUN.sub(last_named, marked)
            if self._is_claim(marked, is_early=number < _EARLY):
                return sentence
            if self._is_credit(marked, is_last=number == len(sentences) - 1):
                return sentence
            named = _ANY.search(marked)
            last_named = named[0] if named else ""
        return self._signature(text)

    def _is_credit(self, marked: str, *, is_last: bool) -> bool:
        """Whether the answer says whom it is by, where the user did not speak of such."""
        if _ANY.search(self.asked):
            return False
        if self.grammar.prefix.search(marked):
            return True
        return is_last and self.grammar.credit.search(marked) is not None

    def _signature(self, text: str) -> str | None:
        """The name that `text` is signed with, where it is an assistant's and not the task's."""
        signature = _SIGNATURE.search(text)
        if signature is None:
            return None
        mark = self._marked(signature["name"])
        is_called = signature["name"].casefold() in self.question.casefold()
        is_claim = mark == NAME and not is_called
        is_claim |= mark == MAYBE_NAME and is_called and not self.is_fiction
        return signature["name"] if is_claim else None

    def _is_claim(self, sentence: str, *, is_early: bool) -> bool:
        """Whether a marked sentence claims to be another assistant."""
        if not _ANY.search(sentence):
            return self._is_new_identity(sentence)
        if self.grammar.uninvolved.search(sentence):
            return False
        for pattern in self.grammar.claims:
            for match in pattern.finditer(sentence):
                is_meant = _SURE.search(match[0]) is not None or self._is_about_program(sentence)
                if is_meant and not _is_disowned(sentence, match):
                    return True
        if not self.is_fiction:
            personal = self.grammar.impersonal.sub("", sentence)
            if self.grammar.likely_claims.search(personal):
                return True
        return is_early and self.is_about_self and not self.is_fiction and _is_answer(sentence)

    def _is_about_program(self, sentence: str) -> bool:
        """Whether an ambiguous name in a first-person sentence means a program."""
        return not self.is_fiction or self.grammar.about_ai.search(sentence) is not None

    def _is_new_identity(self, sentence: str) -> bool:
        """Whether a name or maker of no list is introduced as the assistant's own."""
        patterns = [self.grammar.new_name, self.grammar.new_maker]
        if self.is_about_self:
            patterns.append(self.grammar.own_maker)
        found = [match for pattern in patterns if (match := pattern.search(sentence))]
        names = [match[match.lastindex or 0] for match in found]
        if not names or self.is_fiction or any(name in sentence.casefold() for name in self.own):
            return False
        return any(name.casefold() not in self.all_given for name in names)


def _is_disowned(sentence: str, match: re.Match[str]) -> bool:
    """Whether a claim is somebody else's, supposed, or denied."""
    if load_grammar().reported.search(sentence[: match.start()]):
        return True
    return load_grammar().denied_after.match(sentence, match.end()) is not None


def _is_answer(sentence: str) -> bool:
    """Whether a sentence with a name in it, said of oneself when asked, tells one's own."""
    if load_grammar().denied.search(sentence):
        return False
    if _BARE.fullmatch(sentence) or _FIRST_PERSON.search(sentence):
        return True
    return _THIRD_PERSON.search(sentence) is None


def _without_others_words(text: str) -> str:
    """`text` without code, quotations of three words and more, and the lines of a script."""
    text = _BLOCK_QUOTE.sub("", _CODE_BLOCK.sub("", text))
    text = _QUOTATION.sub(lambda match: "" if len(match[0].split()) >= 3 else match[0], text)
    speakers = {match["speaker"].casefold() for match in _SCRIPT_LINE.finditer(text)}
    return _SCRIPT_LINE.sub("", text) if len(speakers) >= 2 else text


def _plain(text: str) -> str:
    return _MARKUP.sub("", _LINK.sub(r"\1", text))


def _sentences(text: str) -> Iterator[str]:
    return (part.strip()[:_SENTENCE_CHARS] for part in _SENTENCE_END.split(text) if part.strip())
