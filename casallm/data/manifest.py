"""`manifest.json` of a dataset directory: what it says, written and read back with suspicion.

The fields are those of `Manifest`; `manifest_sha256` is the sha256 of its canonical JSON (sorted
keys, no spaces) without that key. It holds no time, host or absolute path: the same input gives
the same bytes. Reading refuses a manifest that is torn, that names files outside its directory,
or whose numbers do not agree with each other.
"""

import json
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from pydantic import Field, ValidationError

from casallm.config import Config, sha256_of
from casallm.errors import DataError

FORMAT: Final = "casallm-shards"
VERSION: Final = 1
HEADER_BYTES = 128
"""Of a shard, before its first id."""

_SHA256 = Field(pattern=r"^[0-9a-f]{64}$")

Split = Literal["train", "val"]
SPLITS: tuple[Split, Split] = ("train", "val")
Dtype = Literal["uint16", "uint32"]


class ShardRecord(Config):
    """One shard as the manifest describes it."""

    name: str = Field(pattern=r"^(train|val)-[A-Za-z0-9._]+-\d{5}\.npy$")
    """File name beside the manifest."""
    tokens: int = Field(gt=0)
    """Ids in it."""
    bytes: int = Field(gt=0)
    """Size of the file."""
    sha256: str = _SHA256
    """Of the whole file."""


class SplitRecord(Config):
    """The shards of one split and what they hold together."""

    tokens: int = Field(ge=0)
    """Ids, `<|bos|>` included."""
    documents: int = Field(ge=0)
    """Documents, each begun by `<|bos|>`."""
    bytes_of_text: int = Field(ge=0)
    """Bytes of the documents' text in UTF-8."""
    shards: tuple[ShardRecord, ...]
    """By name."""


class TokenizerRecord(Config):
    """Which vocabulary made the ids."""

    name: str
    """As `Tokenizer.name`."""
    fingerprint: str = _SHA256
    """As `Tokenizer.fingerprint`."""
    vocab_size: int = Field(gt=0)
    """Real ids, special tokens included."""
    bos_id: int = Field(ge=0)
    """The id that begins every document."""


class Manifest(Config):
    """Everything that `manifest.json` says."""

    format: Literal["casallm-shards"] = FORMAT
    """Always the same."""
    version: Literal[1] = VERSION
    """Of this format."""
    tokenizer: TokenizerRecord
    """Which vocabulary made the ids."""
    dtype: Dtype
    """Of the ids."""
    source: dict[str, Any]
    """Where the documents came from: `name`, `fingerprint`, and what the source says of itself."""
    splits: dict[Split, SplitRecord]
    """`train` and `val`."""

    @property
    def sha256(self) -> str:
        """The hash of the canonical JSON of everything above: identifies the data set."""
        return sha256_of(self.model_dump(mode="json"))

    def to_bytes(self) -> bytes:
        """The file's content, its own hash included."""
        tree = self.model_dump(mode="json") | {"manifest_sha256": self.sha256}
        return (json.dumps(tree, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def read_manifest(directory: Path) -> Manifest:
    """The manifest in `directory`, its own hash and the agreement of its numbers checked."""
    path = directory / "manifest.json"
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise DataError(no_dataset(str(directory))) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check the file") from None
    return parse_manifest(raw, where=str(path))


def no_dataset(place: str) -> str:
    """What to say of a place without a manifest."""
    return (
        f"there is no data set in {place} (no manifest.json): name one, or run `casallm prepare"
        f" --out {place}` (again, if it was stopped)"
    )


def parse_manifest(raw: bytes, *, where: str) -> Manifest:
    """The manifest that is the content of `where`, checked as `read_manifest` does."""
    try:
        tree = json.loads(raw)
        if tree["format"] != FORMAT or tree["version"] != VERSION:
            raise DataError(
                f"{where} is {tree['format']!r} version {tree['version']!r}, not {FORMAT!r} version"
                f" {VERSION}: read it with the program that wrote it, or prepare the data again"
            )
        stated = tree.pop("manifest_sha256")
        manifest = Manifest.model_validate(tree)
        if stated != sha256_of(tree):
            raise ValueError("its hash does not match")
        _require_consistent(manifest)
    except (ValidationError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{where} was cut or changed ({' '.join(str(error).split())[:200]}): fetch it again or"
            " prepare the data again"
        ) from None
    return manifest


def dtype_for(vocab_size: int) -> Dtype:
    """The narrowest of the two types that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def little_endian(dtype: Dtype) -> np.dtype[Any]:
    """The type as it lies on disk."""
    return np.dtype("<u2" if dtype == "uint16" else "<u4")


def _require_consistent(manifest: Manifest) -> None:
    names = [shard.name for split in manifest.splits.values() for shard in split.shards]
    if len(set(names)) != len(names) or set(manifest.splits) != {"train", "val"}:
        raise ValueError("its splits are not train and val, or a shard is named twice")
    if manifest.dtype != dtype_for(manifest.tokenizer.vocab_size):
        raise ValueError(f"{manifest.dtype} is not the type of its vocabulary")
    width = little_endian(manifest.dtype).itemsize
    for name, split in manifest.splits.items():
        if sum(shard.tokens for shard in split.shards) != split.tokens:
            raise ValueError(f"the tokens of {name} are not those of its shards")
        for shard in split.shards:
            if not shard.name.startswith(f"{name}-"):
                raise ValueError(f"{shard.name} is listed under {name}")
            if shard.bytes != HEADER_BYTES + shard.tokens * width:
                raise ValueError(f"the bytes of {shard.name} do not follow from its tokens")
