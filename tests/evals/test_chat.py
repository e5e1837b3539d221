"""The chat evaluation, held against assistants whose every answer is known."""

import pytest

from casallm.data.conversation import Message, role_order_problem
from casallm.data.identity import EVAL_PHRASINGS, ORDINARY_PROMPTS
from casallm.evals.chat import (
    TOLD,
    Answer,
    ChatScores,
    evaluate_chat,
    evaluation_chats,
    mentions,
    repetition,
)


def perfect(chats):
    """Says its name when asked, what it was told, and else something short."""
    return [Answer(ideal_answer(chat), has_ended=True) for chat in chats]


def ideal_answer(chat) -> str:
    if len(chat) > 1:
        return next(fact for told, _, _, fact in TOLD if told == chat[0].content)
    return "I am Casa." if chat[0].content in EVAL_PHRASINGS else "Gladly."


def always(text: str, *, has_ended: bool = True):
    return lambda chats: [Answer(text, has_ended) for _ in chats]


def test_a_perfect_assistant_has_perfect_scores():
    evaluation = evaluate_chat(perfect, "Casa")

    assert evaluation.scores == ChatScores(
        says_name=1.0, says_name_unasked=0.0, ends=1.0, repetition=0.0, recalls=1.0
    )


def test_an_assistant_that_speaks_of_itself_alone_is_found_out():
    evaluation = evaluate_chat(always("I am Casa, made by somebody."), "Casa")

    assert evaluation.scores.says_name == 1.0
    assert evaluation.scores.says_name_unasked == 1.0
    assert evaluation.scores.recalls == 0.0


def test_an_assistant_with_another_name_does_not_say_its_own():
    evaluation = evaluate_chat(perfect, "Ada")

    assert evaluation.scores.says_name == 0.0


def test_a_rambling_assistant_neither_ends_nor_stops_repeating_itself():
    evaluation = evaluate_chat(always("so on and on " * 20, has_ended=False), "Casa")

    assert evaluation.scores.ends == 0.0
    assert evaluation.scores.repetition > 0.9


def test_a_score_is_the_share_of_its_own_questions_alone():
    n_right = 7
    answers = iter(["I am Casa."] * n_right + ["Nobody."] * (len(evaluation_chats()) - n_right))

    evaluation = evaluate_chat(lambda chats: [Answer(next(answers), True) for _ in chats], "Casa")

    assert evaluation.scores.says_name == pytest.approx(n_right / len(EVAL_PHRASINGS))
    assert evaluation.scores.says_name_unasked == 0.0


def test_the_answers_stand_in_the_order_of_their_questions_with_how_many_there_are():
    evaluation = evaluate_chat(perfect, "Casa")

    assert [asked for asked, _ in evaluation.answers] == [
        *EVAL_PHRASINGS,
        *ORDINARY_PROMPTS,
        *(question for _, _, question, _ in TOLD),
    ]
    counts = evaluation.n_asked
    assert counts["says_name"] + counts["says_name_unasked"] + counts["recalls"] == counts["ends"]


def test_every_chat_waits_for_the_assistant():
    for chat in evaluation_chats():
        assert role_order_problem((*chat, Message("assistant", "Gladly."))) is None


def test_what_is_recalled_was_told_and_is_not_in_the_question():
    for told, _, question, fact in TOLD:
        assert mentions(told, fact)
        assert not mentions(question, fact)


@pytest.mark.parametrize(
    ("text", "word", "is_there"),
    [
        ("I am Casa.", "Casa", True),
        ("i am CASA", "Casa", True),
        ("In Casablanca.", "Casa", False),
        ("Mi casa!", "Casa", True),
        ("I am R2-D2, a robot", "R2-D2", True),
        ("I am C++.", "C++", True),
        ("Ich heiße Jürgen", "Jürgen", True),
        ("", "Casa", False),
    ],
)
def test_a_name_is_mentioned_as_a_word_of_its_own(text, word, is_there):
    assert mentions(text, word) is is_there


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0),
        ("one two three", 0.0),
        ("one two three four five", 0.0),
        ("a b c d a b c d", 1 / 5),
        ("go go go go go go go go", 4 / 5),
    ],
)
def test_repetition_is_the_share_of_runs_of_four_words_said_before(text, share):
    assert repetition(text) == pytest.approx(share)
