"""A conversation in turns, held against answers to the whole of it at once."""

import dataclasses

import pytest
import torch

from casallm.data.conversation import Message
from casallm.data.tokenizer import train_tokenizer
from casallm.errors import ConfigError
from casallm.estimate.architecture import ModelConfig
from casallm.inference.sampling import SamplingConfig
from casallm.model.gpt import build_gpt
from casallm.train.attempts import CheckpointName
from casallm.train.dialogue import Dialogue
from casallm.train.trained import Trained, answer_chats

GREEDY = SamplingConfig(temperature=0.0)
NEW = 8


@pytest.fixture(scope="module")
def trained():
    torch.set_num_threads(1)
    tokenizer = train_tokenizer(["the cat sat on the mat, naïve 🙂 émigré " * 20], 280)
    config = ModelConfig(n_layers=1, d_model=32, n_heads=2, vocab_size=tokenizer.vocab_size)
    return Trained(CheckpointName(1, 1), build_gpt(config, 96, seed=3).eval(), tokenizer, 96)


def talk(trained, *texts):
    dialogue = Dialogue(trained, max_new_tokens=NEW, sampling=GREEDY)
    return dialogue, ["".join(dialogue.answer(text)) for text in texts]


def at_once(trained, messages):
    (answer,) = answer_chats(trained, [messages], max_new_tokens=NEW, sampling=GREEDY)
    return answer.text


def test_each_turn_is_answered_as_the_whole_conversation_would_be(trained):
    dialogue, answers = talk(trained, "the cat", "on the mat?", "naïve 🙂")

    said = dialogue.messages
    assert [message.role for message in said] == ["user", "assistant"] * 3
    assert [said[turn].content for turn in (1, 3, 5)] == answers
    for turn in (1, 3, 5):
        assert answers[turn // 2] == at_once(trained, tuple(said[:turn]))


def test_the_oldest_exchange_is_forgotten_when_the_context_is_full(trained):
    texts = [f"the cat sat on the mat {number}" for number in range(6)]

    dialogue, answers = talk(trained, *texts)

    kept = dialogue.messages
    assert 2 <= len(kept) < 2 * len(texts)
    assert [message.content for message in kept[::2]] == texts[-len(kept) // 2 :]
    assert answers[-1] == at_once(trained, tuple(kept[:-1]))


def test_a_text_that_is_too_long_is_said_to_be_and_forgotten(trained):
    dialogue, _ = talk(trained, "the cat")
    before = list(dialogue.messages)

    with pytest.raises(ConfigError, match="do not fit into the context of 96"):
        "".join(dialogue.answer("the mat " * 100))

    assert dialogue.messages == before
    assert "".join(dialogue.answer("the mat")) == at_once(
        trained, (*before, Message("user", "the mat"))
    )


def test_pieces_are_whole_characters(trained):
    smile = trained.tokenizer.encode("🙂é")
    dialogue = Dialogue(trained, max_new_tokens=NEW, sampling=GREEDY)
    dialogue._engine = dataclasses.replace(_Scripted(()), ids=tuple(smile))

    pieces = list(dialogue.answer("hi"))

    assert "".join(pieces) == "🙂é"
    assert all("\ufffd" not in piece for piece in pieces)


@dataclasses.dataclass(frozen=True)
class _Scripted:
    """An engine that says these tokens."""

    ids: tuple[int, ...]

    def stream(self, prompts, *_, **__):
        return ((0, token) for token in self.ids)
