"""A data set in a bucket as a directory of this machine, in which shards come and go.

The directory, `~/.cache/casallm/data/<hash of the manifest>`, holds manifest and tokenizer, and
`origin.json`, which says where the shards are fetched from and how many bytes of them may lie here.
`shards.open_dataset` opens it like any other; each process that does so shares what is fetched.
"""

import json
from pathlib import Path

from casallm.config import Config
from casallm.data.listing import is_bucket
from casallm.data.manifest import Manifest, no_dataset, parse_manifest
from casallm.data.order import GROUP_SIZE
from casallm.data.tokenizer import TOKENIZER_FILES
from casallm.errors import DataError, StoreNotFoundError
from casallm.storage.cache import Cache
from casallm.storage.entry import Digest
from casallm.storage.store import open_store
from casallm.units import format_bytes


class Origin(Config):
    """What `origin.json` says."""

    url: str
    """Where the data set lies."""
    limit_bytes: int
    """The most that its shards may take on this machine."""


def is_in_bucket(place: str) -> bool:
    """Whether `place` is the URL of a data set in a bucket, and not of documents."""
    is_name = is_bucket(place) and not set(place) & set("*?[")
    return is_name and open_store(place).exists("manifest.json")


def mirror_dataset(url: str, *, limit_bytes: int) -> Path:
    """The directory of this machine that stands for the data set at `url`.

    DataError if there is none, or if `limit_bytes` is less than is in use at a time.
    """
    store = open_store(url)
    try:
        raw = store.read("manifest.json")
        manifest = parse_manifest(raw, where=f"{url}/manifest.json")
        directory = Path.home() / ".cache" / "casallm" / "data" / manifest.sha256[:16]
        _require_room(manifest, url, limit_bytes)
        for name in TOKENIZER_FILES:
            store.get(f"tokenizer/{name}", directory / "tokenizer" / name)
    except StoreNotFoundError:
        raise DataError(no_dataset(url)) from None
    local = open_store(str(directory))
    origin = Origin(url=url, limit_bytes=limit_bytes)
    local.write("origin.json", json.dumps(origin.model_dump()).encode())
    local.write("manifest.json", raw)
    return directory


def open_cache(directory: Path, manifest: Manifest) -> Cache | None:
    """What brings the shards of a mirrored data set; None where `directory` holds them itself."""
    path = directory / "origin.json"
    if not path.exists():
        return None
    origin = Origin.model_validate_json(path.read_bytes())
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    files = {shard.name: Digest(shard.bytes, shard.sha256) for shard in shards}
    return Cache(open_store(origin.url), directory, files, limit_bytes=origin.limit_bytes)


def _require_room(manifest: Manifest, url: str, limit_bytes: int) -> None:
    sizes = sorted(shard.bytes for split in manifest.splits.values() for shard in split.shards)
    needed = sum(sizes[-GROUP_SIZE:])
    if limit_bytes < needed:
        raise DataError(
            f"data.cache_gb is {limit_bytes / 1e9:g}, but {GROUP_SIZE} shards of {url}, which are"
            f" in use at a time, take {format_bytes(needed)}: set it to {needed / 1e9:.2g} or more"
        )
