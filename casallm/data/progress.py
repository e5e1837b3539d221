"""How far a preparation is, and saying so every few seconds."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from casallm.units import format_bytes, format_count, format_duration

log = logging.getLogger(__name__)

NEWS_SECONDS = 5.0


@dataclass(frozen=True)
class Progress:
    """How far a preparation is, what earlier starts did included."""

    documents: int
    tokens: int
    bytes_of_text: int
    text_bytes: int
    """About how much text there is in all."""
    seconds: float
    """Since this start began to tokenize."""
    bytes_before: int = 0
    """Of `bytes_of_text`: what earlier starts did."""

    @property
    def bytes_per_second(self) -> float:
        """Of text, since this start began."""
        return (self.bytes_of_text - self.bytes_before) / max(self.seconds, 1e-9)

    @property
    def seconds_left(self) -> float:
        """About how long it will take at this speed."""
        return max(0, self.text_bytes - self.bytes_of_text) / max(self.bytes_per_second, 1.0)


OnProgress = Callable[[Progress], None]


def say_progress() -> OnProgress:
    """A listener that says how far tokenizing is, every few seconds."""
    last = time.monotonic()

    def say(progress: Progress) -> None:
        nonlocal last
        if time.monotonic() - last < NEWS_SECONDS:
            return
        last = time.monotonic()
        log.info(
            "tokenizing: %s documents, %s tokens, %s/s, about %s left",
            format_count(progress.documents),
            format_count(progress.tokens),
            format_bytes(progress.bytes_per_second),
            format_duration(progress.seconds_left),
        )

    return say
