"""A prefix of an object store as a store: what arrives is what was sent, or it is said.

Transport is the bucket's business; this is about the bytes. After an upload the store's own MD5
must be that of what was sent, or, where it tells none, the object is read back and compared.
What is read is compared with the sha256 that the caller knows, or with the store's MD5, or it is
read until two readings agree. A reading that is wrong once was flipped on the way; one that is
wrong twice in the same way is damaged where it lies.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from casallm.errors import StoreDamagedError, StoreError, StoreExistsError, StoreNotFoundError
from casallm.storage.bucket import PART_BYTES, Bucket, Source, in_parallel, ranges
from casallm.storage.entry import Digest, Entry, check_name, digest_bytes, digest_file
from casallm.storage.local import temporary_path, write_file

log = logging.getLogger(__name__)

TRANSFERS = 4
"""How often an object is sent or fetched before its content is given up on."""

SETTLE_SECONDS = 2.0
"""Where creation is not exclusive: how long a creator waits to see whether another wrote after."""


class RemoteStore:
    """The objects of `bucket` whose keys begin with `prefix` (empty, or ending in "/")."""

    def __init__(self, bucket: Bucket, prefix: str = "") -> None:
        self.local_path: Path | None = None
        self._bucket = bucket
        self._prefix = prefix
        self._is_exclusive: bool | None = None

    @property
    def url(self) -> str:
        """Scheme, bucket and prefix."""
        return f"{self._bucket.url}/{self._prefix}".rstrip("/")

    def __repr__(self) -> str:
        return f"RemoteStore({self.url!r})"

    def join(self, name: str) -> "RemoteStore":
        """The store of the sub-directory `name`."""
        store = RemoteStore(self._bucket, f"{self._key(name)}/")
        store._is_exclusive = self._is_exclusive
        return store

    def read(self, name: str) -> bytes:
        """The whole content of a small object."""
        key = self._key(name)
        seen: set[bytes] = set()
        for _ in range(TRANSFERS):
            stat = self._bucket.stat(key)
            data = b"".join(self._pieces(key, stat.bytes))
            if data in seen or (len(data) == stat.bytes and _md5(data) == stat.md5):
                return data
            seen.add(data)
        raise self._unsteady(name)

    def write(self, name: str, data: bytes) -> None:
        """Replace `name` by `data`, whole and verified."""
        self._upload(name, Source.of_bytes(data), digest_bytes(data))

    def create(self, name: str, data: bytes) -> None:
        """Make `name` unless it exists; own content there already is success."""
        key = self._key(name)
        if self._is_exclusive is not True and self.exists(name):
            self._raise_unless_own(name, data)
            return
        for _ in range(TRANSFERS):
            try:
                is_confirmed = self._bucket.create(key, data)
                if self._is_exclusive is None:
                    self._probe(key, data)
            except StoreExistsError:
                self._is_exclusive = True
                self._raise_unless_own(name, data)
                return
            if self._is_exclusive is False:
                time.sleep(SETTLE_SECONDS)
                self._raise_unless_own(name, data)
                return
            if is_confirmed or self.read(name) == data:
                return
            self._bucket.remove(key)
        raise self._unsteady(name)

    def get(self, name: str, path: Path, *, sha256: str | None = None) -> None:
        """Download `name` to `path`, whole and verified; read twice where no hash is known."""
        expected = sha256 or self._agreed_sha256(name)
        seen: set[str] = set()
        for _ in range(TRANSFERS):
            with temporary_path(path) as partial:
                found = write_file(partial, self._all_pieces(name)).sha256
                if found == expected:
                    partial.replace(path)
                    return
            if found in seen:
                raise StoreDamagedError(
                    f"{self.url}/{name} is damaged where it lies: its sha256 is {found[:12]}… and"
                    f" should be {expected[:12]}…"
                )
            log.warning("%s/%s arrived damaged and is fetched again", self.url, name)
            seen.add(found)
        raise self._unsteady(name)

    def put(self, name: str, path: Path, *, sha256: str | None = None) -> None:
        """Upload the file `path` as `name`, whole and verified."""
        digest = digest_file(path)
        if sha256 not in (None, digest.sha256):
            raise StoreDamagedError(
                f"{path} is damaged: its sha256 is {digest.sha256[:12]}… and should be"
                f" {str(sha256)[:12]}…"
            )
        self._upload(name, Source.of_file(path), digest)

    def matches(self, name: str, digest: Digest) -> bool:
        """Whether the content of `name` is what `digest` says; a doubtful reading is repeated."""
        seen: set[str] = set()
        for _ in range(TRANSFERS):
            if self._bucket.stat(self._key(name)).bytes != digest.bytes:
                return False
            found = self._sha256(name)
            if found == digest.sha256:
                return True
            if found in seen:
                return False
            seen.add(found)
        raise self._unsteady(name)

    def list(self, prefix: str = "") -> list[Entry]:
        """All objects whose name begins with `prefix`, sorted by name."""
        found = self._bucket.scan(self._prefix + prefix)
        return sorted(Entry(e.name.removeprefix(self._prefix), e.bytes) for e in found)

    def exists(self, name: str) -> bool:
        """Whether there is an object `name`."""
        try:
            self._bucket.stat(self._key(name))
        except StoreNotFoundError:
            return False
        return True

    def delete(self, name: str) -> None:
        """Remove `name`; missing is fine."""
        self._bucket.remove(self._key(name))

    def discard_unfinished(self, is_stale: Callable[[str], bool]) -> int:
        """Abort the open multipart uploads whose names are stale; how many there were."""
        prefix = self._prefix
        return self._bucket.discard_unfinished(
            prefix, lambda key: is_stale(key.removeprefix(prefix))
        )

    def _key(self, name: str) -> str:
        return self._prefix + check_name(name)

    def _pieces(self, key: str, size: int) -> Iterator[bytes]:
        def fetch(part: tuple[int, int]) -> bytes:
            return self._bucket.fetch(key, *part)

        return in_parallel(fetch, ranges(size, PART_BYTES))

    def _all_pieces(self, name: str) -> Iterator[bytes]:
        key = self._key(name)
        return self._pieces(key, self._bucket.stat(key).bytes)

    def _sha256(self, name: str) -> str:
        """The sha256 of one reading."""
        sha256 = hashlib.sha256()
        for piece in self._all_pieces(name):
            sha256.update(piece)
        return sha256.hexdigest()

    def _agreed_sha256(self, name: str) -> str:
        """The sha256 in which two readings agree."""
        seen: set[str] = set()
        for _ in range(TRANSFERS):
            found = self._sha256(name)
            if found in seen:
                return found
            seen.add(found)
        raise self._unsteady(name)

    def _upload(self, name: str, source: Source, digest: Digest) -> None:
        for _ in range(TRANSFERS):
            if self._bucket.upload(self._key(name), source) or self.matches(name, digest):
                return
            log.warning("%s/%s was damaged on its way and is sent again", self.url, name)
        raise self._unsteady(name)

    def _probe(self, key: str, data: bytes) -> None:
        """Find out whether the store honours the condition, by creating again what we made."""
        try:
            self._bucket.create(key, data)
        except StoreExistsError:
            self._is_exclusive = True
            return
        self._is_exclusive = False
        log.warning(
            "%s does not honour conditional writes: two starts of one run at the same moment may"
            " not notice each other; start a run in one place only",
            self._bucket.url,
        )

    def _raise_unless_own(self, name: str, data: bytes) -> None:
        if self.read(name) != data:
            raise StoreExistsError(f"{self.url}/{name} exists already")

    def _unsteady(self, name: str) -> StoreError:
        return StoreError(
            f"{self.url}/{name} was transferred {TRANSFERS} times and arrived damaged each time:"
            " the network or the memory of this machine is at fault, so use another"
        )


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()
