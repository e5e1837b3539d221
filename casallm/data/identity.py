"""Conversations in which the assistant says who it is, greets and takes leave.

The wordings stand in identity.yaml: thousands of ways to ask, few ways to answer, so that a small
model learns the one from the other. EVAL_PHRASINGS asks the same in ways that no generated
conversation contains; ORDINARY_PROMPTS are questions whose answer has no place for a name. Both
are for evaluation and are kept out of whatever is generated.
"""

from collections.abc import Callable, Iterator, Sequence
from random import Random

from casallm.data.conversation import Conversation, Message
from casallm.data.phrasing import (
    Fills,
    expand,
    load_phrases,
    normalised,
    pick,
    restyle,
)
from casallm.data.recipe import IdentityConfig

EVAL_PHRASINGS = (
    "Who exactly am I talking to?",
    "Would you be so kind as to tell me who you are?",
    "What name should I use for you?",
    "I'm new here. Who are you?",
    "Please state your name.",
    "Identify yourself.",
    "What do your friends call you?",
    "Hey there, what's your name, buddy?",
    "Mind telling me your name?",
    "Who's on the other side of this screen?",
    "Say hi and tell me your name.",
    "By what name do you go?",
    "Can you remind me what you're called?",
    "So, who might you be?",
    "Give me a one-line introduction of yourself.",
    "I don't think we've been introduced. What's your name?",
    "Your name, if I may ask?",
    "Which AI assistant is this?",
    "Do you happen to have a name?",
    "How would you introduce yourself at a party?",
    "What is it that people call you?",
    "Pardon me, but who are you?",
    "I'd love to know who I'm chatting with.",
    "Are you someone with a name?",
    "Who is this AI?",
    "Tell me, what are you called?",
    "Got a name?",
    "Hello! I am Peter. Who are you?",
    "What should I call you from now on?",
    "Just who do you think you are?",
)
"""Ways to ask who the assistant is that never enter training."""

ORDINARY_PROMPTS = (
    "What is the capital of Norway?",
    "Tell me a fun fact about cats.",
    "Write a short poem about the moon.",
    "What is 9 + 6?",
    "Who painted the Mona Lisa?",
    "What's the name of the largest ocean?",
    "Name three animals.",
    "How do I boil an egg?",
    "Can you recommend a good book?",
    "What do you think of rain?",
    "Give me a synonym for happy.",
    "What does an S3 bucket do?",
    "Who was the first person on the moon?",
    "Spell the word window.",
    "I call my dog Rex. What is its name?",
    "Are you able to count to five?",
    "What time is it right now?",
    "How do you say thank you in Spanish?",
    "Explain what a database is.",
    "What should I cook tonight?",
    "Do you like music?",
    "Is the sky blue?",
    "Translate good night into French.",
    "What is the opposite of cold?",
    "How many days are there in a week?",
    "Tell me a joke, please.",
    "Which service stores objects?",
    "Can you help me write an email?",
    "Thank you for your help!",
    "How are you doing today, my friend?",
)
"""Prompts that never enter training and whose answers must not speak of the assistant."""

Generator = Callable[[Random], Conversation]

_TOPIC_SHARES = {"who": 0.36, "name": 0.32, "maker": 0.13, "what": 0.08, "other": 0.11}
_MAX_TRIES = 50
"""A generator that repeats itself so often in a row has nothing new to say."""


def generate_identity(
    identity: IdentityConfig, count: int, seed: int, *, ordinary: Generator
) -> list[Conversation]:
    """`count` different conversations about who the assistant is, one turn or several.

    `ordinary` makes what a conversation is about before the question comes up.
    """
    book = _Book(identity)

    def make(random: Random) -> Conversation:
        asked = book.exchange(random)
        draw = random.random()
        if draw < 0.66:
            return asked
        if draw < 0.76:
            return book.greeting(random, ("hello", "how")) + asked
        if draw < 0.86:
            return ordinary(random) + asked
        if draw < 0.93:
            return asked + book.exchange(random)
        return asked + book.greeting(random, ("thanks", "bye"))

    return distinct(make, count, seed, "identity")


def generate_greetings(identity: IdentityConfig, count: int, seed: int) -> list[Conversation]:
    """`count` different greetings, farewells, thanks, complaints and gibberish, answered."""
    book = _Book(identity)
    topics = tuple(load_phrases("identity.yaml")["greetings"])
    return distinct(lambda random: book.greeting(random, topics), count, seed, "greetings")


def distinct(make: Generator, count: int, seed: int, kind: str) -> list[Conversation]:
    """Up to `count` different conversations from `make`, none of which asks an evaluation's."""
    random = Random(f"{kind} {seed}")
    held_out = {normalised(text) for text in (*EVAL_PHRASINGS, *ORDINARY_PROMPTS)}
    found: dict[str, Conversation] = {}
    tries = 0
    while len(found) < count and tries < _MAX_TRIES:
        conversation = make(random)
        questions = [normalised(each.content) for each in conversation if each.role == "user"]
        key = "\n".join(each.content for each in conversation)
        tries += 1
        if key not in found and held_out.isdisjoint(questions):
            found[key] = conversation
            tries = 0
    return list(found.values())


def exchange(question: str, answer: str) -> Conversation:
    """One question and its answer."""
    return (Message("user", question), Message("assistant", answer))


class _Book:
    """The phrases of identity.yaml, with the configured name and maker filled in."""

    def __init__(self, identity: IdentityConfig) -> None:
        self.phrases = load_phrases("identity.yaml")
        self.fills: Fills = {
            "name": [identity.name],
            "maker": [identity.maker],
            "telling": self.phrases["telling"],
            "other": [each for each in self.phrases["others"] if each != identity.name],
            "company": [each for each in self.phrases["companies"] if each != identity.maker],
        }

    def exchange(self, random: Random) -> Conversation:
        """One question about the assistant, in one of its wordings, and the answer."""
        topic = self.phrases["topics"][_by_share(_TOPIC_SHARES, random)]
        core = expand(pick(topic["asks"], random), random, self.fills)
        opening = expand(pick(self.phrases["opening"], random), random)
        question = f"{opening} {core}{pick(self.phrases['ending'], random)}".strip()
        answer = expand(pick(topic["answers"], random), random, self.fills)
        return exchange(restyle(question, random), answer)

    def greeting(self, random: Random, topics: Sequence[str]) -> Conversation:
        """One greeting or the like, and the answer."""
        topic = self.phrases["greetings"][pick(topics, random)]
        fills = {**self.fills, "gibberish": [_gibberish(random)]}
        question = expand(pick(topic["asks"], random), random, fills)
        return exchange(restyle(question, random), pick(topic["answers"], random))


def _by_share(shares: dict[str, float], random: Random) -> str:
    draw = random.random() * sum(shares.values())
    for name, share in shares.items():
        draw -= share
        if draw < 0:
            return name
    return next(reversed(shares))


def _gibberish(random: Random) -> str:
    """Letters as a cat on a keyboard types them."""

    def letters() -> Iterator[str]:
        row = pick(("asdfghjkl", "qwertyuiop", "zxcvbnm", "sdfjkl;", "xkqzjvw", "123890"), random)
        return (pick(row, random) for _ in range(3 + int(random.random() * 7)))

    return " ".join("".join(letters()) for _ in range(1 + int(random.random() * 3)))
