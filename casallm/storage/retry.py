"""Asking a store again: how often, how long to wait in between, and how long for an answer."""

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from casallm.errors import StoreError

log = logging.getLogger(__name__)

T = TypeVar("T")


class TransientError(Exception):
    """A request failed in a way that may pass: no answer, a cut connection, a busy server."""


@dataclass(frozen=True)
class Patience:
    """How long and how often a store is asked before a person hears of it."""

    tries: int = 8
    """Requests, the first included; with 30 % of them failing, one call in 15,000 fails."""
    first_delay_seconds: float = 0.2
    """Before the second try; doubled each time."""
    longest_delay_seconds: float = 10.0
    """The delay grows to this and no further."""
    request_seconds: float = 30.0
    """For the answer to one request, its content not counted."""
    bytes_per_second: float = 250_000.0
    """The slowest transfer that is waited for."""

    def limit_seconds(self, n_bytes: int) -> float:
        """How long one request that carries `n_bytes` may take."""
        return self.request_seconds + n_bytes / self.bytes_per_second

    def retry(self, request: Callable[[], T], what: str) -> T:
        """The answer to `request`, repeated while it raises TransientError; then StoreError."""
        for attempt in range(self.tries):
            try:
                return request()
            except TransientError as error:
                last = error
                log.debug("%s, try %d of %d: %s", what, attempt + 1, self.tries, error)
            if attempt + 1 < self.tries:
                delay = min(self.first_delay_seconds * 2**attempt, self.longest_delay_seconds)
                time.sleep(delay * random.uniform(0.5, 1.0))
        raise StoreError(
            f"{what} failed {self.tries} times (last: {last}): check the network and the service,"
            " then run the same command again"
        )
