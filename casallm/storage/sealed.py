"""JSON that carries its own hash, so that a damaged or torn copy is told from a whole one.

A sealed document is the canonical JSON (sorted keys, no spaces) of a mapping in which one key
holds the sha256 of the canonical JSON of all the others. Any other spelling of the same values
is refused too: every flipped bit counts.
"""

import json
from collections.abc import Mapping
from typing import Any

from casallm.config import canonical_json, sha256_of


def seal(values: Mapping[str, Any], key: str) -> bytes:
    """`values` as a sealed document whose hash stands under `key`."""
    body = {name: value for name, value in values.items() if name != key}
    return canonical_json({**body, key: sha256_of(body)}).encode()


def unseal(data: bytes, key: str) -> dict[str, Any]:
    """The values of a sealed document, `key` left out; ValueError says what is wrong with it."""
    if not data:
        raise ValueError("it is empty")
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError(f"it is not JSON, or cut off ({len(data)} bytes)") from None
    if not isinstance(tree, dict) or key not in tree:
        raise ValueError(f"it has no {key}")
    stated = tree.pop(key)
    if seal(tree, key) != data:
        raise ValueError(f"its content does not match its {key} {str(stated)[:12]}…")
    return tree
