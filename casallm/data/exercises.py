"""Conversations that are generated and not about the assistant: small tasks and small facts.

Recall (something told earlier), arithmetic, word play, everyday questions (everyday.yaml), what
is beyond a tiny model (limits.yaml) and questions about the built-in corpus. They teach to answer
and to stop, and they are what the conversations of `identity` stand out against.
"""

from collections.abc import Callable
from random import Random

from casallm.data.conversation import Conversation
from casallm.data.corpus_questions import corpus_question
from casallm.data.identity import Generator, exchange
from casallm.data.phrasing import capitalised, expand, load_phrases, pick, restyle

_WORDS = (
    "apple bread river stone light green table window garden summer winter music paper house"
    " water cloud train bridge forest street market school orange yellow silver copper engine"
    " server bucket folder object policy region account message number letter button screen"
    " camera planet rocket island valley mountain flower butter pepper ginger lemon carrot dog"
    " cat horse tiger mouse eagle snake whale book pencil chair door key lamp clock shoe hat"
    " coat ring king queen doctor teacher friend child mother father sister brother city town"
)
_NAMES = (
    "Ana Tom Lee Sam Mia Max Eva Ben Ida Joe Leo Zoe Amy Dan Kim Ian Eve Rosa Paul Lena Omar Nora"
    " Hugo Lily Jack Emma Noah Ella Luis Sara Ivan Olga Yuki Chen Ravi Maya Alex Chris Robin Peter"
    " Maria Laura David Julia Simon Clara Felix Diego Fatima Hassan Elena Marco Bruno Irene Oscar"
)
_COLOURS = "red blue green yellow black white orange purple brown grey pink silver"
_PLACES = "Paris London Rome Madrid Berlin Lisbon Vienna Oslo Cairo Tokyo Lima Boston"
_PETS = "dog cat horse bird fish rabbit hamster"
_PET_NAMES = "Rex Luna Bella Max Coco Milo Nala Rocky Felix Daisy Bruno Lucky Simba"
_NUMBERS = "one two three four five six seven eight nine ten eleven twelve"

WORDS, NAMES, COLOURS, PLACES, PETS, PET_NAMES, NUMBERS = (
    text.split() for text in (_WORDS, _NAMES, _COLOURS, _PLACES, _PETS, _PET_NAMES, _NUMBERS)
)


_NEAR_IDENTITY = ("who", "called", "about_you", "about_you", "names")
"""Tables whose questions sound like those about the assistant; they come three times as often."""


def recall(random: Random) -> Conversation:
    """Something told, perhaps talk of something else, and the question what it was."""
    told, reply, question, answer = pick(_FACTS, random)(random)
    if random.random() < 0.25:
        together = f"{told.rstrip('.!')}. {question}"
        return exchange(restyle(together, random, slips=0.0), answer)
    talk = exchange(restyle(told, random, slips=0.0), reply)
    if random.random() < 0.4:
        talk += pick((arithmetic, strings, everyday, limits), random)(random)
    return talk + exchange(restyle(question, random), answer)


def arithmetic(random: Random) -> Conversation:
    """A small sum, difference, product or comparison."""
    first, second = 1 + int(random.random() * 20), 1 + int(random.random() * 20)
    return pick(_SUMS, random)(first, second, random)


def strings(random: Random) -> Conversation:
    """A small task on a word or a few."""
    return pick(_WORD_TASKS, random)(pick(WORDS, random), random)


def everyday(random: Random) -> Conversation:
    """A question of everyday life and its short answer."""
    tables = load_phrases("everyday.yaml")
    table = tables[pick([*tables, *_NEAR_IDENTITY, *_NEAR_IDENTITY], random)]
    values = [expand(value, random) for value in pick(table["items"], random)]
    fills = {str(place): [value] for place, value in enumerate(values)}
    question = expand(pick(table["asks"], random), random, fills)
    ending = pick(("?", "?", ".", "", " please", "!"), random)
    answer = capitalised(expand(table["answer"], random, fills))
    return exchange(restyle(f"{question.rstrip('?.!')}{ending}", random), answer)


def limits(random: Random) -> Conversation:
    """A question that is beyond a tiny model, and the answer that says so."""
    phrases = load_phrases("limits.yaml")
    question = expand(pick(phrases["asks"], random), random, phrases["fills"])
    ending = pick(("?", "?", ".", "", " please", "!"), random)
    return exchange(restyle(f"{question}{ending}", random), phrases["answer"])


def _told_name(random: Random) -> tuple[str, str, str, str]:
    name = pick(NAMES, random)
    told = expand(
        f"[my name is|i am|i'm|call me|you can call me|hello, my name is|hi, i am] {name}[.|!|]",
        random,
    )
    question = expand(
        "[what is my name|do you remember my name|what's my name|tell me my name|who am i"
        "|what am i called|do you know my name][?|]",
        random,
    )
    return told, f"Nice to meet you, {name}!", question, f"Your name is {name}."


def _told_colour(random: Random) -> tuple[str, str, str, str]:
    colour = pick(COLOURS, random)
    told = expand(f"[my favourite colour is|i like the colour] {colour}[.|]", random)
    question = expand("[what is|do you remember|tell me] my favourite colour[?|]", random)
    return (
        told,
        f"{colour.capitalize()} is a nice colour.",
        question,
        (f"Your favourite colour is {colour}."),
    )


def _told_place(random: Random) -> tuple[str, str, str, str]:
    place = pick(PLACES, random)
    told = expand(f"[i live in|i am from|my home is in|i come from] {place}[.|]", random)
    question = expand("[where do i live|where am i from|which city do i live in][?|]", random)
    return told, f"{place} is a fine city.", question, f"You live in {place}."


def _told_pet(random: Random) -> tuple[str, str, str, str]:
    pet, name = pick(PETS, random), pick(PET_NAMES, random)
    told = expand(
        f"[i have a {pet} called {name}|my {pet} is called {name}|the name of my {pet} is {name}"
        f"|i call my {pet} {name}][.|]",
        random,
    )
    question = expand(
        f"[what is the name of my {pet}|what is my {pet} called|what's my {pet}'s name][?|]", random
    )
    return told, f"{name} is a good name for a {pet}.", question, f"Your {pet} is called {name}."


def _told_number(random: Random) -> tuple[str, str, str, str]:
    number = 10 + int(random.random() * 90)
    told = f"remember the number {number}."
    question = expand("[which|what] number [did i tell you|was it|do you remember][?|]", random)
    return told, f"I will remember {number}.", question, f"The number is {number}."


_FACTS = (_told_name, _told_name, _told_colour, _told_place, _told_pet, _told_number)


def _sum(first: int, second: int, random: Random) -> Conversation:
    total = first + second
    ask = f"[what is|what's|how much is|compute|calculate|] {first} [+|plus] {second}[?|]"
    return _task(ask, f"{first} + {second} = {total}.", random)


def _difference(first: int, second: int, random: Random) -> Conversation:
    high, low = max(first, second), min(first, second)
    ask = f"[what is|what's|how much is|compute|calculate|] {high} [-|minus] {low}[?|]"
    return _task(ask, f"{high} - {low} = {high - low}.", random)


def _product(first: int, second: int, random: Random) -> Conversation:
    first, second = 1 + first % 10, 1 + second % 10
    ask = f"[what is|what's|how much is|compute|calculate|] {first} [x|times|*] {second}[?|]"
    return _task(ask, f"{first} x {second} = {first * second}.", random)


def _larger(first: int, second: int, random: Random) -> Conversation:
    second += first == second
    ask = f"[which is|which number is|what is] [larger|bigger|greater][,|:] {first} or {second}[?|]"
    return _task(ask, f"{max(first, second)} is larger.", random)


def _parity(first: int, second: int, random: Random) -> Conversation:
    ask = f"is {first} [even or odd|odd or even|an even number or an odd one][?|]"
    return _task(ask, f"{first} is {'odd' if first % 2 else 'even'}.", random)


def _next(first: int, second: int, random: Random) -> Conversation:
    return _task(f"[what|which] number comes after {first}[?|]", f"{first + 1}.", random)


def _count(first: int, second: int, random: Random) -> Conversation:
    last = 2 + first % 9
    ask = f"[count|please count|can you count|count for me] [to|up to] {NUMBERS[last - 1]}[.|?|]"
    return _task(ask, f"{', '.join(map(str, range(1, last + 1)))}.", random)


_SUMS = (_sum, _sum, _difference, _product, _larger, _parity, _next, _count)


def _upper(word: str, random: Random) -> Conversation:
    ask = f"[write|say|put] {word} in [capitals|capital letters|upper case]"
    return _task(ask, f"{word.upper()}", random)


def _spell(word: str, random: Random) -> Conversation:
    return _task(
        f"[spell|how do you spell|please spell|can you spell] [the word|] {word}[?|]",
        f"{'-'.join(word)}.",
        random,
    )


def _first_letter(word: str, random: Random) -> Conversation:
    ask = f"[what is|which is|tell me|give me] the first letter of {word}[?|]"
    return _task(ask, f"The first letter of {word} is {word[0]}.", random)


def _last_letter(word: str, random: Random) -> Conversation:
    ask = f"[what is|which is|tell me|give me] the last letter of {word}[?|]"
    return _task(ask, f"The last letter of {word} is {word[-1]}.", random)


def _length(word: str, random: Random) -> Conversation:
    ask = f"how many letters [does {word} have|are in {word}|are there in {word}][?|]"
    return _task(ask, f"{word.capitalize()} has {len(word)} letters.", random)


def _repeat(word: str, random: Random) -> Conversation:
    times, said = pick((("twice", 2), ("three times", 3), ("two times", 2)), random)
    return _task(f"[say|repeat|write] {word} {times}", " ".join([word] * said), random)


def _echo(word: str, random: Random) -> Conversation:
    other = pick(WORDS, random)
    ask = f"[say|repeat|write|echo] [the words|] {word} {other}"
    return _task(ask, f"{word} {other}", random)


def _join(word: str, random: Random) -> Conversation:
    other = pick(WORDS, random)
    ask = f"[join|put together|combine] {word} and {other}"
    return _task(ask, f"{word}{other}", random)


def _sort(word: str, random: Random) -> Conversation:
    words = [word, pick(WORDS, random), pick(WORDS, random)]
    ask = f"[sort|order|put in order|sort by alphabet]: {', '.join(words)}"
    return _task(ask, f"{', '.join(sorted(words))}.", random)


_WORD_TASKS: tuple[Callable[[str, Random], Conversation], ...] = (
    _upper,
    _spell,
    _first_letter,
    _last_letter,
    _length,
    _repeat,
    _echo,
    _join,
    _sort,
)


def _task(ask: str, answer: str, random: Random) -> Conversation:
    opening = pick(("", "", "", "please ", "hi, ", "now ", "can you help me: "), random)
    question = expand(f"{opening}{ask}", random)
    return exchange(restyle(question, random, slips=0.0), answer)


GENERATORS: dict[str, Generator] = {
    "recall": recall,
    "arithmetic": arithmetic,
    "strings": strings,
    "everyday": everyday,
    "limits": limits,
    "corpus": corpus_question,
}
