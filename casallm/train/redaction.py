"""Settings as they may be shown to others: without what opens a door."""

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "(hidden)"

_SECRET_WORDS = frozenset(
    {"credential", "credentials", "key", "notify", "password", "secret", "webhook"}
)
_USERINFO = re.compile(r"(?<=://)[^/@\s]+@")
_QUERY = re.compile(r"(\w://[^\s?]+)\?\S+")


def redacted(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with secret values hidden: by name, and users and queries inside URLs."""
    return {name: _redact(name, value) for name, value in settings.items()}


def _redact(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return redacted(value)
    if value and not _SECRET_WORDS.isdisjoint(re.split(r"[^a-z]+", name.lower())):
        return HIDDEN
    if isinstance(value, list | tuple):
        return [_redact(name, item) for item in value]
    if isinstance(value, str):
        return _QUERY.sub(rf"\1?{HIDDEN}", _USERINFO.sub(f"{HIDDEN}@", value))
    return value
