"""Generated conversations: they say who the assistant is, and only when asked."""

from collections import Counter
from random import Random

import pytest

from casallm.data.claims import find_foreign_claim
from casallm.data.cleaning import find_defect
from casallm.data.conversation import role_order_problem
from casallm.data.exercises import GENERATORS, arithmetic, everyday, recall, strings
from casallm.data.identity import (
    EVAL_PHRASINGS,
    ORDINARY_PROMPTS,
    distinct,
    generate_greetings,
    generate_identity,
)
from casallm.data.phrasing import expand, normalised, restyle
from casallm.data.recipe import IdentityConfig

IDENTITY = IdentityConfig(name="Zora", maker="Blue Lake")


@pytest.fixture(scope="module")
def identity():
    return generate_identity(IDENTITY, 1200, 0, ordinary=everyday)


@pytest.fixture(scope="module")
def ordinary():
    kinds = {kind: distinct(make, 400, 0, kind) for kind, make in GENERATORS.items()}
    return {**kinds, "greetings": generate_greetings(IDENTITY, 200, 0)}


def said(conversation, role):
    return [message.content for message in conversation if message.role == role]


def test_there_are_as_many_as_asked_for_and_no_two_alike(identity):
    assert len(identity) == 1200
    assert len(set(identity)) == 1200


def test_every_conversation_says_the_configured_name(identity):
    assert all(any("Zora" in text for text in said(each, "assistant")) for each in identity)
    assert not any("{" in message.content for each in identity for message in each)


def test_the_maker_is_named_when_asked_for(identity):
    answers = [text for each in identity for text in said(each, "assistant")]

    assert sum("Blue Lake" in text for text in answers) > 200


def test_questions_are_many_and_answers_few(identity):
    questions = {normalised(text) for each in identity for text in said(each, "user")}
    answers = {text for each in identity for text in said(each, "assistant") if "Zora" in text}

    assert len(questions) > 1000
    assert len(answers) < 15


def test_other_assistants_are_denied_and_never_claimed(identity):
    for conversation in identity:
        assert find_foreign_claim(conversation, (IDENTITY.name, IDENTITY.maker)) is None


def test_an_assistant_called_as_another_one_does_not_deny_itself():
    claude = IdentityConfig(name="Claude", maker="OpenAI")

    for conversation in generate_identity(claude, 800, 0, ordinary=everyday):
        for question, answer in zip(conversation[::2], conversation[1::2], strict=True):
            if answer.content.startswith("No,"):
                assert "Claude" not in question.content
                assert "OpenAI" not in question.content


def test_ordinary_conversations_never_say_the_name(ordinary):
    for conversations in ordinary.values():
        texts = [text for each in conversations for text in said(each, "assistant")]

        assert not any("Zora" in text or "Blue Lake" in text for text in texts)


def test_ordinary_questions_use_the_words_of_identity_questions(ordinary):
    texts = [normalised(text) for each in ordinary["everyday"] for text in said(each, "user")]
    words = Counter(word for text in texts for word in set(text.split()))

    assert all(words[word] >= 5 for word in ("you", "name", "who", "called"))


def test_what_evaluation_asks_is_never_generated(identity, ordinary):
    held_out = {normalised(text) for text in (*EVAL_PHRASINGS, *ORDINARY_PROMPTS)}

    for conversation in [*identity, *(each for kind in ordinary.values() for each in kind)]:
        assert held_out.isdisjoint(normalised(text) for text in said(conversation, "user"))


def test_evaluation_prompts_are_distinct_and_enough():
    assert len({normalised(text) for text in EVAL_PHRASINGS}) == len(EVAL_PHRASINGS) >= 25
    assert len({normalised(text) for text in ORDINARY_PROMPTS}) == len(ORDINARY_PROMPTS) >= 25


def test_a_seed_gives_the_same_conversations_and_another_others():
    same = [generate_identity(IDENTITY, 50, seed, ordinary=everyday) for seed in (1, 1, 2)]

    assert same[0] == same[1] != same[2]


def test_all_that_is_generated_passes_the_cleaning_but_for_final_stops(identity, ordinary):
    names = (IDENTITY.name, IDENTITY.maker)
    everything = [*identity, *(each for kind in ordinary.values() for each in kind)]

    reasons = {defect.reason for each in everything if (defect := find_defect(each, names))}

    assert all(role_order_problem(each) is None for each in everything)
    assert reasons <= {"cut"}


def test_sums_are_right():
    for seed in range(200):
        question, answer = arithmetic(Random(seed))
        left, equals, right = answer.content.rstrip(".").partition(" = ")
        if equals:
            assert eval(left.replace("x", "*")) == int(right), question


def test_words_are_spelled_and_measured_right():
    for seed in range(200):
        _, answer = strings(Random(seed))
        if answer.content.endswith("letters."):
            word, _, length, _ = answer.content.split()
            assert len(word) == int(length)


def test_what_is_recalled_was_told():
    for seed in range(200):
        conversation = recall(Random(seed))
        told, answer = conversation[0].content, conversation[-1].content
        key = answer.rstrip(".").split()[-1]
        assert key.lower() in told.lower()


def test_templates_make_every_choice():
    texts = {expand("[a|b [c|d]|] {x}", Random(seed), {"x": ["1", "2"]}) for seed in range(200)}

    assert texts == {f"{start}{x}" for start in ("a ", "b c ", "b d ", "") for x in "12"}


def test_typing_styles_keep_the_words():
    texts = {restyle("who are you?", Random(seed), slips=0.0) for seed in range(100)}

    assert texts == {"who are you?", "Who are you?", "WHO ARE YOU?", "who are you"}
