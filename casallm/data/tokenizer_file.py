"""Vocabularies in Hugging Face's `tokenizer.json`, which spells bytes as GPT-2's characters.

Only what decides ids passes through here: the pattern that splits text into words, the rank of
every token's bytes, and the special tokens. Merges are derived from the ranks, so that the
`tokenizers` library, which merges by them, gives the ids that tiktoken gives by ranks. One thing
differs: that library reads a special token spelled out in text as the special token, unless it is
told `encode_special_tokens`; ours reads it as text.
"""

from typing import Any


def to_hugging_face(
    pattern: str, ranks: dict[bytes, int], special_ids: dict[str, int]
) -> dict[str, Any]:
    """The content of `tokenizer.json` for a vocabulary."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id_, "content": text, **flags, "special": True}
            for text, id_ in special_ids.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split | {"invert": False}, byte_level | {"use_regex": False}],
        },
        "post_processor": None,
        "decoder": byte_level | {"use_regex": True},
        "model": _bpe(ranks, special_ids),
    }


def from_hugging_face(content: dict[str, Any]) -> tuple[str, dict[bytes, int], dict[str, int]]:
    """Pattern, ranks and special ids of what `to_hugging_face` made.

    KeyError, TypeError or ValueError if the content is something else.
    """
    special_ids = {token["content"]: int(token["id"]) for token in content["added_tokens"]}
    pattern = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    vocab = content["model"]["vocab"]
    ranks = {to_bytes(text): rank for text, rank in vocab.items() if text not in special_ids}
    return pattern, ranks, special_ids


def to_bytes(token: str) -> bytes:
    """The bytes of a token as Hugging Face files spell it."""
    return bytes(BYTE_OF_CHAR[char] for char in token)


def _to_text(token: bytes) -> str:
    return "".join(_CHAR_OF_BYTE[byte] for byte in token)


def _bpe(ranks: dict[bytes, int], special_ids: dict[str, int]) -> dict[str, Any]:
    ranked = sorted(ranks.items(), key=lambda item: item[1])
    merges = [_split_once(token, ranks) for token, _ in ranked if len(token) > 1]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {_to_text(token): rank for token, rank in ranked} | special_ids,
        "merges": [[_to_text(left), _to_text(right)] for left, right in merges],
    }


def _split_once(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that the merge which makes `token` joins: BPE stopped one merge early."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(parts[i] + parts[i + 1], len(ranks)) for i in range(len(parts) - 1)]
        i = pairs.index(min(pairs))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def _printable_bytes() -> dict[str, int]:
    """GPT-2's characters for the 256 bytes: themselves where they print, else from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    characters = {chr(byte): byte for byte in plain}
    return characters | {chr(256 + i): byte for i, byte in enumerate(rest)}


BYTE_OF_CHAR = _printable_bytes()
_CHAR_OF_BYTE = {byte: char for char, byte in BYTE_OF_CHAR.items()}
