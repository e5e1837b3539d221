"""Which launches this computer is at, so that `down` can call them off and two do not compete.

A launcher that waits for machines has nothing in any cloud that could be ended: it would rent later
what `down` proved to be absent. So it leaves a file with a word of its own on this computer, and
rents only while that word stands there.
"""

import contextlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from casallm.errors import CloudError

CALLED_OFF, LAUNCHED = "called off", "launched"
"""The words that stand there when `down` has been, and when the launcher is done."""


@dataclass(frozen=True)
class Announcement:
    """One launcher's word that it is at work."""

    path: Path
    token: str

    @property
    def is_called_off(self) -> bool:
        """Whether `down` wants nothing of it to be rented."""
        return self.said() == CALLED_OFF

    def insist(self) -> None:
        """CloudError if the launch was called off, or another start has begun in its place."""
        said = self.said()
        if said != self.token:
            why = "called off by `make down`" if said == CALLED_OFF else "begun again elsewhere"
            raise CloudError(
                f"the launch of {self.path.name} was {why}: nothing is rented from here"
            )

    def said(self) -> str:
        """What stands there now; empty if nothing does."""
        try:
            return self.path.read_text()
        except FileNotFoundError:
            return ""


@contextlib.contextmanager
def announced(name: str) -> Iterator[Announcement]:
    """Say that `name` is being launched, until the block ends."""
    announcement = Announcement(_folder() / name, secrets.token_hex(8))
    announcement.path.parent.mkdir(parents=True, exist_ok=True)
    _replace(announcement.path, announcement.token)
    try:
        yield announcement
    finally:
        if announcement.said() == announcement.token:
            _replace(announcement.path, LAUNCHED)


def was_begun(name: str) -> bool:
    """Whether a launch of `name` was ever begun from this computer."""
    return (_folder() / name).exists()


def withdraw(name: str | None) -> list[str]:
    """Call off the launch of `name` (None: every launch) from this computer; those there were.

    One whose launcher was killed may be among them.
    """
    called_off = []
    for path in [_folder() / name] if name else sorted(_folder().glob("casallm-*")):
        if path.exists() and path.read_text() not in (CALLED_OFF, LAUNCHED):
            _replace(path, CALLED_OFF)
            called_off.append(path.name)
    return called_off


def _replace(path: Path, word: str) -> None:
    """Write the word so that a reader sees the old one or the new one, whole."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    draft.write_text(word)
    draft.replace(path)


def _folder() -> Path:
    return Path.home() / ".cache" / "casallm" / "launching"
