"""Cleaning: labelled examples, the reasons one by one, and duplicates."""

import gzip
import json
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casallm.data.assistants import mark_assistants, may_name_assistant
from casallm.data.claims import find_foreign_claim
from casallm.data.cleaning import find_defect, is_cut, is_empty
from casallm.data.conversation import Message, parse_row
from casallm.data.duplicates import DuplicateFilter

LABELLED = Path(__file__).parent / "cleaning_labelled.jsonl"
UNSEEN = Path(__file__).parent / "cleaning_unseen.jsonl"
"""Written by somebody who had not seen the patterns, and never learned from."""

OWN = ("Casa", "the casallm project")
SHARED = Path(os.environ.get("CASALLM_SHARED_DATA", "../shared/data")) / "sft"


def labelled(path=LABELLED):
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [
        (row["label"], [Message(each["role"], each["content"]) for each in row["messages"]])
        for row in rows
    ]


def chat(*contents):
    return [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(contents)]


def reason(messages, own=OWN):
    defect = find_defect(messages, own)
    return "keep" if defect is None else defect.reason


@pytest.mark.parametrize(("path", "at_least"), [(LABELLED, 1900), (UNSEEN, 200)])
def test_labelled_examples_are_told_apart_with_precision_and_recall_of_95_percent(path, at_least):
    verdicts = [(label, reason(messages)) for label, messages in labelled(path)]

    dropped = [label for label, found in verdicts if found != "keep"]
    faulty = [found for label, found in verdicts if label != "keep"]
    precision = sum(label != "keep" for label in dropped) / len(dropped)
    recall = sum(found != "keep" for found in faulty) / len(faulty)
    assert len(verdicts) >= at_least
    assert precision >= 0.95, f"{precision:.3f}"
    assert recall >= 0.95, f"{recall:.3f}"


@pytest.mark.parametrize("kind", ["another_assistant", "cut", "empty", "role_order"])
def test_each_reason_is_found_with_recall_of_95_percent(kind):
    found = [reason(messages) for label, messages in labelled() if label == kind]

    assert found.count(kind) / len(found) >= 0.95, Counter(found)


def test_a_claim_is_shown_by_its_sentence():
    messages = chat("hi", "Nice to meet you! I am ChatGPT, by OpenAI. How are you?")

    assert find_foreign_claim(messages) == "I am ChatGPT, by OpenAI."


def test_ones_own_name_and_maker_may_be_claimed():
    messages = chat("Who are you?", "I'm Claude, an assistant made by Anthropic.")

    assert reason(messages, ("Claude", "Anthropic")) == "keep"
    assert reason(messages, OWN) == "another_assistant"


def test_a_claim_in_any_turn_drops_the_conversation():
    messages = chat("2 + 2?", "4", "Who are you?", "I am ChatGPT.", "3 + 3?", "6")

    assert reason(messages) == "another_assistant"


def test_what_users_and_systems_say_of_themselves_does_not_count():
    system = Message("system", "You are ChatGPT, a large language model trained by OpenAI.")

    assert reason([system, *chat("I am ChatGPT, made by OpenAI.", "Nice to meet you.")]) == "keep"


def test_a_denial_stays_and_a_denial_with_a_claim_goes():
    assert reason(chat("Are you ChatGPT?", "No, I am not ChatGPT.")) == "keep"
    assert reason(chat("Are you ChatGPT?", "I am not ChatGPT, I am Claude.")) == "another_assistant"


@pytest.mark.parametrize("style", [str.upper, str.lower, "**{}**".format, "  {}  ".format])
def test_case_and_markup_do_not_hide_a_claim(style):
    answer = style("I am ChatGPT, a language model trained by OpenAI.")

    assert reason(chat("hello", answer)) == "another_assistant"


def test_names_are_marked_by_how_sure_they_are():
    marked = mark_assistants("ChatGPT and Claude, a llama, Claude Monet, OpenAI, Google, meta")

    assert marked == "\ue000 and \ue001, a llama, Claude Monet, \ue002, \ue003, meta"


def test_the_quick_look_never_overlooks_a_name():
    for _, messages in labelled():
        for message in messages:
            if mark_assistants(message.content, any_case=True) != message.content:
                assert may_name_assistant(message.content), message


@pytest.mark.parametrize(
    "answer", ["", " \n", "\u200b", "...", "-", "No output", "<nooutput>", "N/A"]
)
def test_empty_answers(answer):
    assert is_empty(answer)
    assert reason(chat("hi", answer)) == "empty"


@pytest.mark.parametrize("answer", ["0", "No", "?", "x", "🙂", "None of them", "C", "+", "是"])
def test_short_answers_are_not_empty(answer):
    assert not is_empty(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "Paris",
        "4, 5, 6",
        "It depends on whom you ask. See https://example.com/a/b",
        "She smiled. Then she left the room for good...",
        "Dear Ann, thank you for the long letter that you sent me. Yours, Bob",
        "Ask Dr. Jane Smith about the results of the test that we did last week in the lab",
        "```python\nprint(1)\n```",
        "1. Wash the rice well in cold water\n2. Boil it for ten minutes\n3. Let it rest",
        "Here is the list that you asked me for, in no order at all:\n\n- one\n- two\n- three",
    ],
)
def test_answers_that_end_without_a_full_stop_may_be_whole(answer):
    assert not is_cut(answer)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 400))
def test_an_essay_cut_inside_a_sentence_is_found(place):
    essay = (
        "Bread is one of the oldest foods. It is made from flour, water, salt and yeast. "
        "Bakers knead the dough until it is smooth, and they let it rise in a warm place. "
    ) * 5
    cut = essay[:place].rstrip()
    is_inside = cut[-1:].isalpha() and len(cut.split()) >= 20
    words_of_the_last_sentence = cut.rsplit(". ", 1)[-1].split()

    if is_inside and len(words_of_the_last_sentence) >= 2:
        assert is_cut(cut)


@settings(max_examples=200, deadline=None)
@given(st.text(), st.text())
def test_any_text_is_judged(question, answer):
    find_defect(chat(question, answer), OWN)


def test_cleaning_long_text_takes_no_longer_than_its_length_warrants():
    answer = "I am " * 30_000 + "an assistant, " * 3_000

    assert reason(chat("a " * 50_000, answer)) == "cut"


def test_what_differs_in_case_and_space_is_an_exact_duplicate():
    duplicates = DuplicateFilter()

    assert duplicates.check(chat("What is DNA?", "A molecule.")) is None
    assert duplicates.check(chat("what is  DNA?", "A molecule.\n")) == "duplicate"


def test_what_differs_in_a_word_of_many_is_a_near_duplicate():
    answer = "Boil the rice in two cups of water, let it rest for ten minutes, and serve it warm."
    duplicates = DuplicateFilter()

    assert duplicates.check(chat("How do I cook rice?", answer)) is None
    assert duplicates.check(chat("How do I cook rice?", f"{answer} Enjoy!")) == "near_duplicate"


def test_short_conversations_that_differ_in_a_number_are_no_duplicates():
    duplicates = DuplicateFilter()

    assert duplicates.check(chat("What is 2 + 2?", "It is 4.")) is None
    assert duplicates.check(chat("What is 2 + 3?", "It is 5.")) is None


def test_two_answers_to_one_question_are_no_duplicates():
    question = "Tell me about the history of the city of Rome in two or three sentences, please."
    duplicates = DuplicateFilter()

    assert duplicates.check(chat(question, "It was founded long ago on seven hills.")) is None
    assert duplicates.check(chat(question, "Kings, consuls and emperors ruled it.")) is None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from("abcdefgh"), min_size=20, max_size=40), st.integers(0, 19))
def test_near_duplicates_agree_with_comparing_all_shingles(words, place):
    changed = [*words[:place], "zz", *words[place + 1 :]]
    shingles = [
        {tuple(each[i : i + 3]) for i in range(len(each) - 2)}
        for each in (["user", "q", "assistant", *words], ["user", "q", "assistant", *changed])
    ]
    jaccard = len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1])
    duplicates = DuplicateFilter()
    duplicates.check(chat("q", " ".join(words)))

    verdict = duplicates.check(chat("q", " ".join(changed)))

    if jaccard < 0.7:
        assert verdict is None
    elif jaccard > 0.85:
        assert verdict == "near_duplicate"


@pytest.mark.parametrize(
    ("name", "most_dropped"),
    [("alpaca_en_demo", 0.02), ("gpteacher_roleplay", 0.01), ("gsm8k_train_alpaca_format", 0.01)],
)
def test_real_conversations_mostly_stay(name, most_dropped):
    path = SHARED / f"{name}.jsonl.gz"
    if not path.exists():
        pytest.skip(f"this test is about {path}, which is not here")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line, _ in zip(file, range(1500), strict=False)]

    dropped = [found for row in rows if (found := find_defect(parse_row(row) or (), OWN))]

    assert len(dropped) / len(rows) < most_dropped, Counter(each.reason for each in dropped)


def test_all_real_identity_conversations_of_another_assistant_go():
    path = SHARED / "identity_fastchat_dummy_conversation.jsonl.gz"
    if not path.exists():
        pytest.skip(f"this test is about {path}, which is not here")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        messages = [parse_row(json.loads(line)) for line in file]

    assert {reason(each) for each in messages} == {"another_assistant"}
