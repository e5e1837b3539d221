"""A conversation with a trained model, answered as it is made."""

from collections.abc import Iterator

from casallm.data.conversation import Message, prompt_ids
from casallm.errors import CasallmError
from casallm.inference.engine import Engine
from casallm.inference.sampling import SamplingConfig
from casallm.train.trained import Trained


class Dialogue:
    """What was said so far; when the context is full, the oldest exchange is forgotten."""

    def __init__(self, trained: Trained, *, max_new_tokens: int, sampling: SamplingConfig) -> None:
        self._trained = trained
        self._max_new_tokens = max_new_tokens
        self._sampling = sampling
        self._engine = Engine(trained.model, 1, trained.context_length)
        self.messages: list[Message] = []

    def answer(self, text: str) -> Iterator[str]:
        """The answer to `text` in pieces of whole characters.

        ConfigError, and nothing is remembered, where `text` leaves no room for an answer.
        """
        tokenizer = self._trained.tokenizer
        before = self.messages
        self.messages = [*before, Message("user", text)]
        try:
            pieces = self._engine.stream(
                [self._prompt()],
                self._max_new_tokens,
                self._sampling,
                stop_ids=[tokenizer.end_id, tokenizer.bos_id],
            )
        except CasallmError:
            self.messages = before
            raise
        ids: list[int] = []
        said = ""
        for _, token in pieces:
            ids.append(token)
            whole = tokenizer.decode(ids)
            if not whole.endswith("\ufffd"):  # a character of several tokens, not whole yet
                yield whole.removeprefix(said)
                said = whole
        self.messages.append(Message("assistant", tokenizer.decode(ids)))

    def _prompt(self) -> list[int]:
        """The ids of the newest messages that fit, with room for the answer."""
        while True:
            ids = prompt_ids(self.messages, self._trained.tokenizer)
            room = self._trained.context_length - self._max_new_tokens
            if len(ids) <= room or len(self.messages) == 1:
                return ids
            self.messages = self.messages[2:]
