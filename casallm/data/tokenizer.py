"""Byte-level BPE: trained with `tokenizers` or taken from OpenAI by name, encoding by tiktoken.

A vocabulary is a pattern that splits text into words, a rank for every token's bytes (the rank is
the id and the order of merging) and six special tokens appended after the last id. Text never
produces a special token: text that spells one is encoded as ordinary text, and decoding leaves
special ids out, so decode(encode(text)) == text for any text.

On disk (`tokenizer/`) it is `tokenizer.json` in Hugging Face format, which is all that loading
reads for ids, and `tokenizer_config.json`, which names the special tokens for transformers.
Trained vocabularies use Qwen2's pattern, which llama.cpp knows as "qwen2": measured on the
built-in corpus it gives 2 % more bytes a token than GPT-2's at no cost in speed.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from casallm.config import Config, nearest
from casallm.data.deadline import within
from casallm.data.tokenizer_file import BYTE_OF_CHAR, from_hugging_face, to_bytes, to_hugging_face
from casallm.errors import ConfigError, DataError, MissingExtraError

SPECIAL_TOKENS = ("<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>")
"""Appended to every vocabulary, in this order."""

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NAMED = {"gpt2": ("gpt2", GPT2_PATTERN), "cl100k": ("cl100k_base", CL100K_PATTERN)}
"""tiktoken's name and the published pattern of each vocabulary known by name."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
"""What a saved vocabulary consists of."""

MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
DOWNLOAD_SECONDS = 60.0
MAX_SPACES = 4096
"""Longer runs of white space are cut before encoding: the pattern's look-ahead exhausts a stack."""

_BLOCK_CHARS = 1 << 20
_LARGE_CHARS = 1 << 22
_BOUNDARY = "\x00<|document|>\x00"
"""Marks a document's start inside a block; a block with a text that spells it is not joined."""

_WORD_END = re.compile(r"[A-Za-z](?= [A-Za-z])")
"""Between a letter and a space before a letter all patterns end a word."""

Ids = npt.NDArray[np.uint32]
_NO_IDS: Ids = np.empty(0, np.uint32)


class TokenizerConfig(Config):
    """Which vocabulary splits the text; `model.vocab_size` says how large a trained one is."""

    name: str = "trained"
    """trained: on the documents themselves; gpt2 or cl100k; or a directory that holds one."""


class Tokenizer:
    """Text to ids and back; built by `train_tokenizer`, `named_tokenizer` or `load_tokenizer`."""

    def __init__(
        self, name: str, *, pattern: str, ranks: dict[bytes, int], reserved: dict[str, int]
    ) -> None:
        """`reserved`: special tokens that the vocabulary had before our six, which stay unused."""
        tiktoken = _import_tiktoken()
        self.name = name
        self.pattern = pattern
        self.ranks = ranks
        self.reserved = reserved
        first = max([*ranks.values(), *reserved.values()]) + 1
        self.special_ids = {token: first + i for i, token in enumerate(SPECIAL_TOKENS)}
        self.vocab_size = first + len(SPECIAL_TOKENS)
        self._bytes: list[bytes] = [b""] * self.vocab_size
        for token, rank in ranks.items():
            self._bytes[rank] = token
        encoding = tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={_BOUNDARY: self.bos_id}
        )
        self._core = encoding._core_bpe

    @property
    def bos_id(self) -> int:
        """Begins every document and every conversation."""
        return self.special_ids["<|bos|>"]

    @property
    def system_id(self) -> int:
        """Begins a system message."""
        return self.special_ids["<|system|>"]

    @property
    def user_id(self) -> int:
        """Begins a user's message."""
        return self.special_ids["<|user|>"]

    @property
    def assistant_id(self) -> int:
        """Begins an assistant's message."""
        return self.special_ids["<|assistant|>"]

    @property
    def end_id(self) -> int:
        """Ends every message."""
        return self.special_ids["<|end|>"]

    @property
    def pad_id(self) -> int:
        """Fills rows up; never a target."""
        return self.special_ids["<|pad|>"]

    @property
    def fingerprint(self) -> str:
        """sha256 of everything that decides ids: pattern, ranks and special tokens."""
        digest = hashlib.sha256(self.pattern.encode())
        for token, rank in sorted(self.ranks.items(), key=lambda item: item[1]):
            digest.update(b"\0%d %s" % (rank, token.hex().encode()))
        for text, id_ in (*self.reserved.items(), *self.special_ids.items()):
            digest.update(f"\0{id_} {text}".encode())
        return digest.hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of `text` as ordinary text, without `<|bos|>`."""
        return self._encode(text).tolist()

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """The ids of each text, as `encode` gives them."""
        return [self.encode(text) for text in texts]

    def encode_documents(self, texts: Sequence[str], *, threads: int = 1) -> Ids:
        """The ids of all documents one after the other, `<|bos|>` before each.

        Equal to encoding them one by one; joined into blocks of up to a megabyte that cross into
        tiktoken once, which is a fifth faster for short documents.
        """
        blocks = _blocks(texts)
        with ThreadPoolExecutor(threads) as pool:
            encoded = list((pool.map if threads > 1 else map)(self._encode_block, blocks))
        return encoded[0] if len(encoded) == 1 else np.concatenate([_NO_IDS, *encoded])

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that `ids` stand for; special ids stand for none."""
        return b"".join(self._bytes[id_] for id_ in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are no whole UTF-8 character become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self) -> npt.NDArray[np.int64]:
        """Bytes of text that each id stands for, 0 for special ids (for bits per byte)."""
        return np.array([len(token) for token in self._bytes], dtype=np.int64)

    def save(self, directory: Path) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json` into `directory`."""
        directory.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|bos|>",
            "eos_token": "<|end|>",
            "pad_token": "<|pad|>",
            "clean_up_tokenization_spaces": False,
            "casallm_name": self.name,
        }
        special_ids = {**self.reserved, **self.special_ids}
        vocabulary = to_hugging_face(self.pattern, self.ranks, special_ids)
        for name, content in zip(TOKENIZER_FILES, (vocabulary, config), strict=True):
            text = json.dumps(content, ensure_ascii=False, indent=1)
            (directory / name).write_text(text + "\n", encoding="utf-8")

    def _encode(self, text: str) -> Ids:
        try:
            return np.frombuffer(self._core.encode_to_tiktoken_buffer(text, set()), np.uint32)
        except UnicodeEncodeError:
            return self._encode(replace_surrogates(text))
        except ValueError:  # "Max stack size exceeded for backtracking"
            pieces = _cut_spaces(text)
            if len(pieces) == 1:
                raise
            return np.concatenate([self._encode(piece) for piece in pieces])

    def _encode_block(self, texts: Sequence[str]) -> Ids:
        bos = np.array([self.bos_id], np.uint32)
        if len(texts) == 1:  # perhaps a large one, of which there are to be few copies
            return np.concatenate([bos, *map(self._encode, _cut_words(texts[0]))])
        joined = _BOUNDARY + _BOUNDARY.join(texts)
        if joined.count(_BOUNDARY) == len(texts):
            try:
                buffer = self._core.encode_to_tiktoken_buffer(joined, {_BOUNDARY})
                return np.frombuffer(buffer, np.uint32)
            except ValueError:  # lone surrogates, or more spaces than the pattern can take
                pass
        return np.concatenate([part for text in texts for part in (bos, self._encode(text))])


def build_tokenizer(config: TokenizerConfig) -> Tokenizer | None:
    """The vocabulary that `config` names; None where it is to be trained."""
    if config.name == "trained":
        return None
    if config.name not in NAMED and Path(config.name).is_dir():
        return load_tokenizer(Path(config.name))
    return named_tokenizer(config.name)


def require_tokenizer(name: str) -> Tokenizer:
    """The vocabulary gpt2 or cl100k, or that in a directory."""
    tokenizer = build_tokenizer(TokenizerConfig(name=name))
    if tokenizer is None:
        raise ConfigError("a vocabulary is needed: name its directory, gpt2 or cl100k")
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A vocabulary of `vocab_size` ids, special tokens included, trained on `texts`.

    The same texts give the same vocabulary. DataError if they are too few for that many tokens.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise DataError(
            f"a vocabulary of {vocab_size} is too small: 256 bytes and {len(SPECIAL_TOKENS)}"
            f" special tokens need {MIN_VOCAB_SIZE}"
        )
    tokenizers = _import_tokenizers()
    trainee = tokenizers.Tokenizer(tokenizers.models.BPE())
    trainee.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(QWEN2_PATTERN), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=list(BYTE_OF_CHAR),
        show_progress=False,
    )
    trainee.train_from_iterator(texts, trainer)
    ranks = {to_bytes(token): rank for token, rank in trainee.get_vocab().items()}
    if len(ranks) < vocab_size - len(SPECIAL_TOKENS):
        possible = len(ranks) + len(SPECIAL_TOKENS)
        raise DataError(
            f"there is too little text for a vocabulary of {vocab_size:,}: it has words for"
            f" {possible:,}; ask for {possible:,} or fewer, or add text"
        )
    return Tokenizer(f"bpe-{vocab_size}", pattern=QWEN2_PATTERN, ranks=ranks, reserved={})


def named_tokenizer(name: str, *, seconds: float = DOWNLOAD_SECONDS) -> Tokenizer:
    """The vocabulary `gpt2` or `cl100k`, through tiktoken and its cache (TIKTOKEN_CACHE_DIR).

    tiktoken downloads without a time limit, so it is waited for on a thread, `seconds` at most.
    """
    if name not in NAMED:
        raise DataError(
            f"there is no vocabulary named {name!r}{nearest(name, NAMED)}: use {', '.join(NAMED)},"
            " trained, or a directory that holds a tokenizer.json"
        )
    encoding_name, pattern = NAMED[name]
    encoding = _get_encoding(encoding_name, seconds)
    ranks, reserved = encoding._mergeable_ranks, encoding._special_tokens
    return Tokenizer(name, pattern=pattern, ranks=ranks, reserved=reserved)


def load_tokenizer(directory: Path) -> Tokenizer:
    """The vocabulary that `Tokenizer.save` wrote into `directory`; DataError if it is not one."""
    path = directory / "tokenizer.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
        return _from_parts(config["casallm_name"], *from_hugging_face(content))
    except FileNotFoundError as error:
        raise DataError(
            f"there is no tokenizer in {directory} ({Path(error.filename).name} is missing):"
            " name a directory that casallm wrote"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not a tokenizer that casallm wrote ({type(error).__name__}: {error}):"
            " train it again or name another"
        ) from None


def replace_surrogates(text: str) -> str:
    """`text` with lone surrogates, which no UTF-8 can hold, as U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _from_parts(
    name: str, pattern: str, ranks: dict[bytes, int], special_ids: dict[str, int]
) -> Tokenizer:
    reserved = {text: id_ for text, id_ in special_ids.items() if text not in SPECIAL_TOKENS}
    tokenizer = Tokenizer(name, pattern=pattern, ranks=ranks, reserved=reserved)
    if {**reserved, **tokenizer.special_ids} != special_ids:
        raise ValueError(f"its special tokens are {special_ids}")
    return tokenizer


def _get_encoding(name: str, seconds: float) -> Any:
    tiktoken = _import_tiktoken()
    try:
        return within(seconds, lambda: tiktoken.get_encoding(name))
    except (OSError, ValueError) as error:  # requests' errors are OSErrors
        reason = str(error) if isinstance(error, TimeoutError) else type(error).__name__
        raise DataError(
            f"the vocabulary {name} could not be downloaded ({reason}): point TIKTOKEN_CACHE_DIR at"
            " a folder that holds it, or use tokenizer.name=trained"
        ) from None


def _import_tiktoken() -> Any:
    try:
        import tiktoken
    except ImportError:
        raise MissingExtraError("tiktoken", "data") from None
    return tiktoken


def _import_tokenizers() -> Any:
    try:
        import tokenizers
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError:
        raise MissingExtraError("tokenizers", "data") from None
    return tokenizers


def _blocks(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """`texts` in runs of a megabyte at most; a larger one is alone."""
    start = size = 0
    for i, text in enumerate(texts):
        if size and size + len(text) > _BLOCK_CHARS:
            yield texts[start:i]
            start, size = i, 0
        size += len(text)
    if start < len(texts):
        yield texts[start:]


def _cut_words(text: str) -> Iterator[str]:
    """`text` in pieces of about _LARGE_CHARS, cut where its ids do not depend on it."""
    start = 0
    while found := _WORD_END.search(text, start + _LARGE_CHARS):
        yield text[start : found.end()]
        start = found.end()
    yield text[start:] if start else text


def _cut_spaces(text: str) -> list[str]:
    """`text` in pieces, none of which holds a run of more than MAX_SPACES spaces."""
    cuts = [0]
    for run in re.finditer(rf"\s{{{MAX_SPACES + 1},}}", text):
        cuts += range(run.start() + MAX_SPACES, run.end(), MAX_SPACES)
    return [text[start:stop] for start, stop in zip(cuts, [*cuts[1:], len(text)], strict=True)]
