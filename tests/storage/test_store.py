import importlib.util
import itertools
import json
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from casallm.errors import MissingExtraError, StoreError, StoreExistsError, StoreNotFoundError
from casallm.storage.entry import Entry, digest_bytes
from casallm.storage.file_system import FileSystemBucket
from casallm.storage.remote import RemoteStore
from casallm.storage.retry import Patience
from casallm.storage.sealed import seal, unseal
from casallm.storage.store import Store, open_store

_numbers = itertools.count()


@pytest.fixture
def memory() -> Store:
    """Any fsspec file system, here that of the process's memory."""
    return open_store(f"memory://bucket-{next(_numbers)}/run")


def test_a_path_is_a_local_store_and_a_url_a_remote_one(tmp_path: Path):
    assert open_store("runs/x").local_path == Path("runs/x")
    assert open_store(f"file://{tmp_path}").url == str(tmp_path)
    assert open_store("s3://bucket/a/b/").url == "s3://bucket/a/b"
    assert open_store("s3://bucket").local_path is None


@pytest.mark.parametrize("url", ["s3://", "s3://KEY:hunter2@bucket/x", "s3://bucket?versionId=1"])
def test_a_url_without_a_plain_bucket_is_refused_and_not_repeated(url: str):
    with pytest.raises(StoreError, match="names no bucket: write it as s3://BUCKET/NAME") as caught:
        open_store(url)
    assert "hunter2" not in str(caught.value)


def test_unknown_kinds_and_odd_prefixes_are_refused():
    with pytest.raises(StoreError, match="ftpx:// is no kind of store"):
        open_store("ftpx://bucket/run")
    with pytest.raises(StoreError, match="is not a name that a run may hold"):
        open_store("s3://bucket/../x")


@pytest.mark.skipif(importlib.util.find_spec("gcsfs") is not None, reason="gcsfs is installed")
def test_a_missing_library_names_its_extra():
    with pytest.raises(MissingExtraError, match=r"gcsfs is not installed: .*casallm\[gcs\]"):
        open_store("gs://bucket/run")


def test_any_file_system_of_fsspec_is_a_store(memory: Store, tmp_path: Path):
    path = tmp_path / "in"
    path.write_bytes(b"content")

    memory.put("a/b", path)
    memory.write("a/c", b"")
    memory.get("a/b", tmp_path / "out")

    assert (tmp_path / "out").read_bytes() == memory.read("a/b") == b"content"
    assert memory.list() == [Entry("a/b", 7), Entry("a/c", 0)]
    assert memory.join("a").list("b") == [Entry("b", 7)]
    assert memory.matches("a/b", digest_bytes(b"content"))
    assert not memory.matches("a/b", digest_bytes(b"contend"))
    memory.delete("a/b")
    memory.delete("a/b")
    assert not memory.exists("a/b")
    assert memory.discard_unfinished(lambda name: True) == 0
    with pytest.raises(StoreNotFoundError, match=r"there is no memory://.*/run/a/b"):
        memory.read("a/b")


def test_creating_in_any_file_system_has_one_winner(memory: Store):
    memory.create("x", b"mine")
    memory.create("x", b"mine")
    memory.create("y", b"mine too")

    with pytest.raises(StoreExistsError, match="x exists already"):
        memory.create("x", b"another's")


def test_an_empty_store_lists_nothing(memory: Store):
    assert memory.list() == []
    assert memory.list("attempts/") == []


def test_a_sealed_document_comes_back():
    values = {"b": 1, "a": ["é", None, 1.5]}

    assert unseal(seal(values, "hash"), "hash") == values


def test_every_flipped_bit_of_a_sealed_document_is_noticed():
    data = seal({"step": 1000, "files": [{"name": "é", "bytes": 12}], "parent": None}, "hash")

    for position in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        with pytest.raises(ValueError, match=r"it is not JSON|it has no hash|does not match"):
            unseal(bytes(flipped), "hash")


def test_torn_empty_and_foreign_documents_are_refused():
    data = seal({"step": 1000}, "hash")

    for torn in (data[:-1], data[: len(data) // 2], b"", b"[]", b"null", b'"hash"', b"[" * 100_000):
        with pytest.raises(ValueError, match=r"^it "):
            unseal(torn, "hash")
    with pytest.raises(ValueError, match="does not match"):
        unseal(json.dumps(json.loads(data)).encode(), "hash")


class Flaky(MemoryFileSystem):
    """A file system of fsspec in which requests fail as told."""

    protocol = "flaky"
    failures: ClassVar[list[OSError]] = []

    def cat_file(self, *arguments: object, **options: object) -> bytes:
        if self.failures:
            raise self.failures.pop()
        return super().cat_file(*arguments, **options)


@pytest.fixture
def flaky() -> Store:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    patience = Patience(tries=3, first_delay_seconds=0.001)
    store = RemoteStore(FileSystemBucket("flaky", "bucket", patience), "run/")
    store.write("x", b"content")
    return store


def test_requests_to_any_file_system_are_repeated_in_bounds(flaky: Store):
    Flaky.failures[:] = [ConnectionError()] * 2
    assert flaky.read("x") == b"content"

    Flaky.failures[:] = [ConnectionError()] * 3
    with pytest.raises(StoreError, match=r"flaky://bucket/run/x failed 3 times \(last: Connection"):
        flaky.read("x")


@pytest.mark.parametrize(
    "error", [PermissionError(), OSError("Forbidden: x"), OSError("Forbidden")]
)
def test_a_denied_request_to_any_file_system_is_an_advice_at_once(flaky: Store, error: OSError):
    Flaky.failures[:] = [error]

    with pytest.raises(
        StoreError, match="access to flaky://bucket/run/x is denied: check the cred"
    ):
        flaky.read("x")
    assert Flaky.failures == []
