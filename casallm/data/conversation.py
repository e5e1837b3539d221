"""Conversations: from the rows of any usual data set to token ids with a loss mask.

The template: `<|bos|>`, then for each message the id of its role, its content, `<|end|>`. Learned
are the assistant's content and its `<|end|>`, nothing else. Content is encoded as ordinary text,
so that no user can forge a role: the markers are ids which no text encodes to.

A conversation is an optional system message, then user and assistant in turn, ending with the
assistant. Three column layouts are read: `messages` of {role, content}, ShareGPT's
`conversations` of {from, value}, and Alpaca's `instruction`, `input`, `output`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from casallm.data.tokenizer import Tokenizer

ROLE_NAMES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
}
"""What data sets call the three roles; any other name (tool, observation) is kept as it is."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: who speaks (`system`, `user`, `assistant`, or what a row called it) and what."""

    role: str
    content: str


Conversation = tuple[Message, ...]


class Rendered(NamedTuple):
    """A conversation as token ids, and for each whether it is to be learned."""

    ids: NDArray[np.uint32]
    is_target: NDArray[np.bool_]


def has_conversation_columns(row: Mapping[str, Any]) -> bool:
    """Whether `row` has the columns of one of the three layouts."""
    return "messages" in row or "conversations" in row or {"instruction", "output"} <= row.keys()


def parse_row(row: Mapping[str, Any]) -> Conversation | None:
    """The conversation in a row of a data set; None where its columns do not hold one."""
    for column in ("messages", "conversations"):
        if column in row:
            return parse_messages(row[column])
    instruction, answer = row.get("instruction"), row.get("output")
    extra = row.get("input") or ""
    if not all(isinstance(text, str) for text in (instruction, answer, extra)):
        return None
    question = f"{instruction}\n\n{extra}" if extra.strip() else str(instruction)
    return (Message("user", question), Message("assistant", str(answer)))


def parse_messages(items: object) -> Conversation | None:
    """Messages from a list of {role, content} or {from, value}; None where it is something else."""
    if not isinstance(items, Sequence | np.ndarray) or isinstance(items, str):
        return None
    messages = []
    for item in items:
        if not isinstance(item, Mapping):
            return None
        role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            return None
        messages.append(Message(ROLE_NAMES.get(role.strip().lower(), role), content))
    return tuple(messages)


def role_order_problem(messages: Sequence[Message]) -> str | None:
    """What is wrong with the order of the roles for training, or None when it is as it must be."""
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    for number, message in enumerate(turns):
        expected = "assistant" if number % 2 else "user"
        if message.role != expected:
            position = len(messages) - len(turns) + number + 1
            return f"message {position} is from {message.role!r}, not from the {expected}"
    if len(turns) < 2 or len(turns) % 2:
        return "the assistant does not have the last word"
    return None


def render(messages: Sequence[Message], tokenizer: Tokenizer) -> Rendered:
    """The token ids of a conversation and its loss mask; the three roles in any order."""
    return render_batch([messages], tokenizer)[0]


def render_batch(
    conversations: Sequence[Sequence[Message]], tokenizer: Tokenizer
) -> list[Rendered]:
    """Each conversation rendered; their texts are encoded in one call, which is faster."""
    contents = [message.content for messages in conversations for message in messages]
    encoded = iter(tokenizer.encode_batch(contents))
    return [_assemble(messages, encoded, tokenizer) for messages in conversations]


def prompt_ids(messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """The ids to generate from: the conversation so far and the mark that opens the answer."""
    return [*render(messages, tokenizer).ids.tolist(), tokenizer.assistant_id]


def cut_at_turn(rendered: Rendered, max_tokens: int, tokenizer: Tokenizer) -> Rendered | None:
    """The longest beginning that ends with an answer and fits; None when no answer fits."""
    if len(rendered.ids) <= max_tokens:
        return rendered
    is_end_of_answer = (rendered.ids[:max_tokens] == tokenizer.end_id) & rendered.is_target[
        :max_tokens
    ]
    ends = np.flatnonzero(is_end_of_answer)
    if not len(ends):
        return None
    n_kept = int(ends[-1]) + 1
    return Rendered(rendered.ids[:n_kept], rendered.is_target[:n_kept])


def _assemble(
    messages: Sequence[Message], encoded: Iterator[list[int]], tokenizer: Tokenizer
) -> Rendered:
    role_ids = {
        "system": tokenizer.system_id,
        "user": tokenizer.user_id,
        "assistant": tokenizer.assistant_id,
    }
    ids = [tokenizer.bos_id]
    is_target = [False]
    for message in messages:
        content = next(encoded)
        ids += [role_ids[message.role], *content, tokenizer.end_id]
        is_target += [False, *[message.role == "assistant"] * (len(content) + 1)]
    return Rendered(np.array(ids, dtype=np.uint32), np.array(is_target, dtype=np.bool_))
