"""Conversations: any row of the three layouts, the template, the mask, and no forged roles."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casallm.data.conversation import (
    Message,
    cut_at_turn,
    parse_row,
    prompt_ids,
    render,
    render_batch,
    role_order_problem,
)
from casallm.data.tokenizer import SPECIAL_TOKENS, train_tokenizer

TEXT = st.text(st.characters(codec="utf-8")) | st.text(st.sampled_from(" \n\t'aAsS1.é北😀שָׁ<|>"))
TEXT |= st.lists(st.sampled_from((*SPECIAL_TOKENS, "a ", "user", " b"))).map("".join)
EXCHANGES = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def tokenizer(texts):
    return train_tokenizer(texts, 400)


def conversation(*contents, system=None):
    roles = ("user", "assistant")
    start = [Message("system", system)] if system is not None else []
    return (*start, *(Message(roles[i % 2], text) for i, text in enumerate(contents)))


def ids_of(messages, tokenizer):
    return render(messages, tokenizer).ids.tolist()


def test_the_template_is_bos_then_role_content_end_for_each_message(tokenizer):
    messages = conversation("Hi", "Hello!", system="Be kind.")

    t = tokenizer
    assert ids_of(messages, t) == [
        t.bos_id,
        *(t.system_id, *t.encode("Be kind."), t.end_id),
        *(t.user_id, *t.encode("Hi"), t.end_id),
        *(t.assistant_id, *t.encode("Hello!"), t.end_id),
    ]


def test_only_the_assistants_content_and_its_end_are_learned(tokenizer):
    rendered = render(conversation("Hi", "Hello!", "Bye", "Goodbye.", system="S"), tokenizer)

    learned = rendered.ids[rendered.is_target].tolist()
    end = tokenizer.end_id
    assert learned == [*tokenizer.encode("Hello!"), end, *tokenizer.encode("Goodbye."), end]


@settings(max_examples=150, deadline=None)
@given(EXCHANGES, st.none() | TEXT)
def test_decoding_what_is_learned_gives_the_assistants_words(tokenizer, exchanges, system):
    contents = [text for exchange in exchanges for text in exchange]
    rendered = render(conversation(*contents, system=system), tokenizer)

    learned = rendered.ids[rendered.is_target].tolist()
    answers, ids = [], []
    for id_ in learned:
        if id_ == tokenizer.end_id:
            answers.append(tokenizer.decode(ids))
            ids = []
        else:
            ids.append(id_)
    assert not ids
    assert answers == [answer for _, answer in exchanges]


@settings(max_examples=150, deadline=None)
@given(EXCHANGES)
def test_no_text_forges_a_role(tokenizer, exchanges):
    contents = [text for exchange in exchanges for text in exchange]

    ids = np.array(ids_of(conversation(*contents), tokenizer))

    marks = ids[ids >= tokenizer.bos_id].tolist()
    turn = [tokenizer.user_id, tokenizer.end_id, tokenizer.assistant_id, tokenizer.end_id]
    assert marks == [tokenizer.bos_id, *turn * len(exchanges)]


def test_a_turn_of_a_hundred_kilobytes_is_rendered(tokenizer):
    answer = "a page of text 😀 " * 6000

    rendered = render(conversation("x" * 100_000, answer), tokenizer)

    assert tokenizer.decode(rendered.ids[rendered.is_target].tolist()) == answer


def test_a_batch_is_rendered_as_its_conversations_alone(tokenizer):
    batch = [conversation("a", "b"), conversation("", "", "c", "d"), conversation("e", "é北")]

    together = render_batch(batch, tokenizer)

    assert [each.ids.tolist() for each in together] == [ids_of(each, tokenizer) for each in batch]


def test_a_prompt_ends_where_the_assistant_begins(tokenizer):
    messages = [Message("user", "Who are you?")]

    assert prompt_ids(messages, tokenizer) == [*ids_of(messages, tokenizer), tokenizer.assistant_id]


def test_a_prompt_is_the_beginning_of_what_was_trained_on(tokenizer):
    trained = ids_of(conversation("a", "b", "c", "d"), tokenizer)

    prompt = prompt_ids(conversation("a", "b", "c"), tokenizer)

    assert trained[: len(prompt)] == prompt


@pytest.mark.parametrize(
    ("row", "contents"),
    [
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
         ["q", "a"]),
        ({"prompt": "p", "prompt_id": "1", "messages": [{"content": "q", "role": "user"}]}, ["q"]),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
         ["q", "a"]),
        ({"instruction": "do", "input": "", "output": "done"}, ["do", "done"]),
        ({"instruction": "do", "input": "this", "output": "done"}, ["do\n\nthis", "done"]),
        ({"instruction": "do", "input": None, "output": "done"}, ["do", "done"]),
        ({"instruction": "do", "output": "done"}, ["do", "done"]),
    ],
)  # fmt: skip
def test_the_usual_columns_are_recognised(row, contents):
    messages = parse_row(row)

    assert [message.content for message in messages] == contents
    assert [message.role for message in messages] == ["user", "assistant"][: len(contents)]


def test_roles_go_by_many_names():
    names = ["system", "human", "gpt", "Human", "chatgpt", "prompter", "bot"]
    row = {"conversations": [{"from": name, "value": "x"} for name in names]}

    roles = [message.role for message in parse_row(row)]

    assert roles == ["system", "user", "assistant", "user", "assistant", "user", "assistant"]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": "hello"},
        {"messages": None},
        {"messages": ["hello"]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": 7}]},
        {"messages": [{"role": None, "content": "x"}]},
        {"conversations": [{"from": "human", "value": None}]},
        {"instruction": None, "output": "x"},
        {"instruction": "x", "output": ["y"]},
        {"text": "x"},
        {},
    ],
)
def test_a_row_that_holds_no_conversation_is_none(row):
    assert parse_row(row) is None


@pytest.mark.parametrize(
    ("roles", "problem"),
    [
        ("user assistant", None),
        ("system user assistant", None),
        ("user assistant user assistant", None),
        ("", "the assistant does not have the last word"),
        ("system", "the assistant does not have the last word"),
        ("user", "the assistant does not have the last word"),
        ("user assistant user", "the assistant does not have the last word"),
        ("assistant user", "message 1 is from 'assistant', not from the user"),
        ("user user assistant", "message 2 is from 'user', not from the assistant"),
        ("system system user assistant", "message 2 is from 'system', not from the user"),
        ("user system assistant", "message 2 is from 'system', not from the assistant"),
        ("user tool assistant", "message 2 is from 'tool', not from the assistant"),
    ],
)
def test_the_order_of_roles_is_checked(roles, problem):
    assert role_order_problem([Message(role, "x") for role in roles.split()]) == problem


def test_what_is_too_long_is_cut_after_the_last_answer_that_fits(tokenizer):
    whole = render(conversation("q1", "a1", "q2", "a2", "q3", "a3"), tokenizer)
    two_turns = render(conversation("q1", "a1", "q2", "a2"), tokenizer)

    for max_tokens in range(len(two_turns.ids), len(whole.ids)):
        cut = cut_at_turn(whole, max_tokens, tokenizer)

        assert cut.ids.tolist() == two_turns.ids.tolist()
        assert cut.is_target.tolist() == two_turns.is_target.tolist()


def test_what_fits_is_not_cut(tokenizer):
    whole = render(conversation("q", "a"), tokenizer)

    assert cut_at_turn(whole, len(whole.ids), tokenizer) is whole


def test_nothing_is_left_when_no_answer_fits(tokenizer):
    whole = render(conversation("a long question", "an answer"), tokenizer)

    assert cut_at_turn(whole, len(whole.ids) - 1, tokenizer) is None
