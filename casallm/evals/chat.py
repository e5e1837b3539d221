"""How a small assistant chats, judged offline: five shares over a hundred fixed questions.

Does it say its name when asked in ways that it never saw, and keep it to itself otherwise? Does
it come to an end, without saying the same again and again? Does it still know what it was told?
None of it says that an answer is right or good: it is a check of the fine-tuning, quick enough
for every run. Whoever asks for it brings the model, as a function from chats to answers.
"""

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from casallm.data.conversation import Conversation, Message
from casallm.data.identity import EVAL_PHRASINGS, ORDINARY_PROMPTS

REPEATED_WORDS = 4
"""Repetition is counted in runs of this many words."""

TOLD = (
    ("My name is Peter.", "Nice to meet you, Peter!", "What is my name?", "Peter"),
    ("I'm Clara.", "Nice to meet you, Clara!", "Do you remember my name?", "Clara"),
    ("You can call me Omar.", "Nice to meet you, Omar!", "What's my name?", "Omar"),
    ("Hi, I am Julia.", "Nice to meet you, Julia!", "Who am I?", "Julia"),
    ("Hello, my name is Gregor.", "Nice to meet you, Gregor!", "What am I called?", "Gregor"),
    ("Call me Winnie.", "Nice to meet you, Winnie!", "Tell me my name.", "Winnie"),
    ("I live in Lisbon.", "Lisbon is a fine city.", "Where do I live?", "Lisbon"),
    ("I come from Vienna.", "Vienna is a fine city.", "Where am I from?", "Vienna"),
    ("My home is in Cairo.", "Cairo is a fine city.", "Which city do I live in?", "Cairo"),
    ("I am from Zurich.", "Zurich is a fine city.", "Where am I from?", "Zurich"),
    ("My favourite colour is green.", "I see.", "What is my favourite colour?", "green"),
    ("I like the colour purple.", "I see.", "What is my favourite colour?", "purple"),
    ("My favourite colour is silver.", "I see.", "Tell me my favourite colour.", "silver"),
    ("I have a dog called Rocky.", "A good name.", "What is my dog called?", "Rocky"),
    ("My cat is called Nala.", "A good name.", "What is the name of my cat?", "Nala"),
    ("I have a horse called Thunder.", "A good name.", "What is my horse called?", "Thunder"),
    ("Remember the number 47.", "I will remember 47.", "What number was it?", "47"),
    ("Remember the number 83.", "I will remember 83.", "Which number did I tell you?", "83"),
    ("Remember the number 12.", "I will remember 12.", "What number do you remember?", "12"),
    ("Please remember the word lamp.", "I will.", "Which word did I tell you?", "lamp"),
)
"""What somebody says, the reply to it, a question about it, and the word that answers it."""


@dataclass(frozen=True)
class Answer:
    """What a model said, and whether it stopped by itself."""

    text: str
    has_ended: bool


Respond = Callable[[Sequence[Conversation]], Sequence[Answer]]


@dataclass(frozen=True)
class ChatScores:
    """Shares from 0 to 1."""

    says_name: float
    """Of the unseen ways to ask who it is, those answered with the name."""
    says_name_unasked: float
    """Of the ordinary prompts, those answered with the name."""
    ends: float
    """Of all answers, those that stopped by themselves."""
    repetition: float
    """Of the runs of four words in an answer, those that it had said before; the mean."""
    recalls: float
    """Of the facts told earlier in a chat, those that it still knew."""


@dataclass(frozen=True)
class ChatEvaluation:
    """The scores and every answer, in the order of the questions."""

    scores: ChatScores
    n_asked: dict[str, int]
    """How many answers each score rests on."""
    answers: tuple[tuple[str, str], ...]
    """The last question of each chat, and the answer."""


def evaluation_chats() -> list[Conversation]:
    """Every chat of the evaluation: who are you, ordinary prompts, and what was told."""
    return [
        *((Message("user", text),) for text in (*EVAL_PHRASINGS, *ORDINARY_PROMPTS)),
        *(
            (Message("user", told), Message("assistant", reply), Message("user", question))
            for told, reply, question, _ in TOLD
        ),
    ]


def evaluate_chat(respond: Respond, name: str) -> ChatEvaluation:
    """The scores of an assistant that is to call itself `name`."""
    chats = evaluation_chats()
    answers = respond(chats)
    n_who, n_ordinary = len(EVAL_PHRASINGS), len(ORDINARY_PROMPTS)
    who, ordinary = answers[:n_who], answers[n_who : n_who + n_ordinary]
    told = zip(TOLD, answers[n_who + n_ordinary :], strict=True)
    scores = ChatScores(
        says_name=statistics.fmean(mentions(each.text, name) for each in who),
        says_name_unasked=statistics.fmean(mentions(each.text, name) for each in ordinary),
        ends=statistics.fmean(each.has_ended for each in answers),
        repetition=statistics.fmean(repetition(each.text) for each in answers),
        recalls=statistics.fmean(mentions(each.text, fact) for (*_, fact), each in told),
    )
    return ChatEvaluation(
        scores,
        n_asked={
            "says_name": n_who,
            "says_name_unasked": n_ordinary,
            "ends": len(chats),
            "repetition": len(chats),
            "recalls": len(TOLD),
        },
        answers=tuple(
            (chat[-1].content, answer.text) for chat, answer in zip(chats, answers, strict=True)
        ),
    )


def mentions(text: str, word: str) -> bool:
    """Whether `word` stands in `text` as a word of its own, in any case."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def repetition(text: str) -> float:
    """The share of the runs of four words that were there before, from 0 to nearly 1."""
    words = text.lower().split()
    runs = [tuple(words[k : k + REPEATED_WORDS]) for k in range(len(words) - REPEATED_WORDS + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
