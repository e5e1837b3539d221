"""Files by URL, verified end to end: the one way in which a run touches a disk or a bucket.

A `Store` is a directory: on this machine, or a prefix of a bucket. Names in it are relative,
"/"-separated and allow-listed. Whatever the store, `write` and `put` publish an object whole and
checked or not at all, `get` and `read` return what was written or say what is wrong, `create` has
one winner, and every call ends in bounded time. Nothing above this layer retries.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from casallm.errors import StoreError
from casallm.storage.bucket import Bucket
from casallm.storage.entry import Digest, Entry, check_name
from casallm.storage.file_system import FileSystemBucket
from casallm.storage.local import LocalStore
from casallm.storage.remote import RemoteStore
from casallm.storage.s3 import S3Bucket

_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,221}")


class Store(Protocol):
    """A directory by URL."""

    local_path: Path | None
    """The directory, where it is on this machine."""

    @property
    def url(self) -> str:
        """Where the store is; holds no secret."""

    def join(self, name: str) -> "Store":
        """The sub-directory `name` as a store."""

    def read(self, name: str) -> bytes:
        """The whole content of a small object; StoreNotFoundError if there is none."""

    def write(self, name: str, data: bytes) -> None:
        """Replace `name` by `data`, whole, atomic and verified."""

    def create(self, name: str, data: bytes) -> None:
        """Make `name` unless it exists; StoreExistsError if another's content is there.

        Of many that call this at once, one returns. Own content there already (an
        acknowledgement was lost) is success.
        """

    def get(self, name: str, path: Path, *, sha256: str | None = None) -> None:
        """Download `name` to `path`, whole and verified; a bit flipped on the way is fetched again.

        StoreDamagedError if the object itself is not what `sha256` says.
        """

    def put(self, name: str, path: Path, *, sha256: str | None = None) -> None:
        """Upload the file `path` as `name`, whole, atomic and verified."""

    def matches(self, name: str, digest: Digest) -> bool:
        """Whether the content of `name` is what `digest` says, read through without keeping it."""

    def list(self, prefix: str = "") -> list[Entry]:
        """All objects whose name begins with `prefix`, at any depth, sorted by name."""

    def exists(self, name: str) -> bool:
        """Whether there is an object `name`."""

    def delete(self, name: str) -> None:
        """Remove `name`; missing is fine."""

    def discard_unfinished(self, is_stale: Callable[[str], bool]) -> int:
        """Remove what killed writes left (temporary files, open multipart uploads); how many.

        `is_stale` is asked about the name that each was to have; a living writer's are spared so.
        """


def open_store(url_or_path: str) -> Store:
    """The store at a path ("runs/x") or a URL ("s3://bucket/prefix", "gs://…").

    Contacts nobody. StoreError if the URL is malformed or of an unknown kind, MissingExtraError
    if the library that speaks it is not installed.
    """
    scheme, separator, rest = url_or_path.partition("://")
    if not separator:
        return LocalStore(Path(url_or_path).expanduser())
    if scheme == "file":
        return LocalStore(Path(rest))
    name, _, prefix = rest.strip("/").partition("/")
    if prefix:
        prefix = check_name(prefix) + "/"
    return RemoteStore(open_bucket(f"{scheme}://{name}"), prefix)


def open_bucket(url: str) -> Bucket:
    """The bucket at "s3://bucket", "gs://bucket" …; contacts nobody, and errors as `open_store`."""
    scheme, _, name = url.partition("://")
    if not _BUCKET.fullmatch(name):
        raise StoreError(
            f"the URL of kind {scheme}:// names no bucket: write it as {scheme}://BUCKET/NAME, with"
            " keys and secrets in the environment and not in it"
        )
    return S3Bucket(name) if scheme in ("s3", "s3a") else FileSystemBucket(scheme, name)
