"""The S3 store against a real server, with the network misbehaving in between."""

import concurrent.futures
import hashlib
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest

from casallm.errors import StoreDamagedError, StoreError, StoreExistsError, StoreNotFoundError
from casallm.storage.entry import Entry, digest_bytes
from casallm.storage.retry import Patience
from tests.faults.fixtures import HURRIED, Bucket

PART = 1 << 16
"""Small parts, so that tests of multipart uploads need little data."""


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def file_of(path: Path, data: bytes) -> tuple[Path, str]:
    path.write_bytes(data)
    return path, hashlib.sha256(data).hexdigest()


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("s3", "remote"):
        monkeypatch.setattr(f"casallm.storage.{module}.PART_BYTES", PART)


def test_what_was_written_is_read_listed_and_deleted(s3: Bucket):
    store = s3.store()

    store.write("a/b.json", b"{}")
    store.write("a/b.json", b"[]")

    assert store.read("a/b.json") == store.join("a").read("b.json") == b"[]"
    assert store.list() == store.list("a/") == [Entry("a/b.json", 2)]
    assert store.join("a").list() == [Entry("b.json", 2)]
    assert store.exists("a/b.json")
    assert not store.exists("a")
    store.delete("a/b.json")
    store.delete("a/b.json")
    assert store.list() == []
    with pytest.raises(StoreNotFoundError, match=f"there is no s3://{s3.name}/run/a/b.json"):
        store.read("a/b.json")


def test_a_long_listing_is_whole(s3: Bucket):
    for number in range(120):
        s3.client.put_object(Bucket=s3.name, Key=f"run/{number:04d}", Body=b"")

    assert [entry.name for entry in s3.store().list()] == [f"{n:04d}" for n in range(120)]


def test_a_large_file_is_uploaded_in_parts_and_comes_back_equal(
    s3: Bucket, small_parts: None, tmp_path: Path
):
    path, sha256 = file_of(tmp_path / "in", noise(3 * PART + 17))

    s3.store().put("big", path, sha256=sha256)
    s3.store().get("big", tmp_path / "out", sha256=sha256)

    assert (tmp_path / "out").read_bytes() == path.read_bytes()
    assert s3.open_uploads() == []
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize("fault", ["503", "reset", "lost_ack", "truncate"])
def test_faults_of_the_network_lose_and_change_nothing(
    s3: Bucket, small_parts: None, tmp_path: Path, fault: str
):
    path, sha256 = file_of(tmp_path / "in", noise(6 * PART + 5))
    store = s3.store()
    s3.proxy.at_random(fault, 0.3)

    store.put("big", path, sha256=sha256)
    for number in range(5):
        store.write(f"small-{number}", noise(1000, number))
    store.get("big", tmp_path / "out", sha256=sha256)

    assert any(found == fault for _, _, found in s3.proxy.requests)
    assert (tmp_path / "out").read_bytes() == path.read_bytes()
    assert all(s3.direct().read(f"small-{n}") == noise(1000, n) for n in range(5))


def test_a_bit_flipped_on_the_way_down_is_fetched_again(s3: Bucket, tmp_path: Path):
    store = s3.store()
    data = noise(100_000)
    store.write("x", data)

    s3.proxy.at_random("flip", 0.5)
    s3.proxy.once("flip", "GET")
    store.get("x", tmp_path / "x", sha256=hashlib.sha256(data).hexdigest())
    s3.proxy.once("flip", "GET")
    read = store.read("x")
    s3.proxy.once("flip", "GET")
    is_same = store.matches("x", digest_bytes(data))

    assert (tmp_path / "x").read_bytes() == read == data
    assert is_same


def test_a_bit_flipped_on_the_way_up_is_sent_again(s3: Bucket, small_parts: None, tmp_path: Path):
    path, sha256 = file_of(tmp_path / "in", noise(3 * PART))

    s3.proxy.once("flip_request", "PUT")
    s3.store().write("x", b"important")
    s3.proxy.once("flip_request", "PUT")
    s3.store().put("big", path, sha256=sha256)

    assert s3.direct().read("x") == b"important"
    assert s3.direct().matches("big", digest_bytes(path.read_bytes()))


def test_damage_at_rest_is_told_from_damage_on_the_way(s3: Bucket, tmp_path: Path):
    store = s3.store()
    data = noise(100_000)  # the same bit is not hit twice
    store.write("x", data)
    sha256 = hashlib.sha256(data).hexdigest()

    s3.proxy.at_random("flip", 1.0)
    with pytest.raises(StoreError, match="arrived damaged each time: the network or the memory"):
        store.get("x", tmp_path / "x", sha256=sha256)
    s3.proxy.decide = lambda method, path: None
    s3.direct().write("x", noise(100_000, seed=1))
    with pytest.raises(StoreDamagedError, match="is damaged where it lies"):
        store.get("x", tmp_path / "x", sha256=sha256)

    assert not (tmp_path / "x").exists()
    assert not store.matches("x", digest_bytes(data))


def test_creating_has_one_winner_of_sixteen(s3: Bucket):
    stores = [s3.store() for _ in range(16)]

    def create(number: int) -> bool:
        try:
            stores[number].create("attempt.json", f"start {number}".encode())
        except StoreExistsError:
            return False
        return True

    with concurrent.futures.ThreadPoolExecutor(16) as executor:
        wins = list(executor.map(create, range(16)))

    assert sum(wins) == 1
    assert stores[0].read("attempt.json") == f"start {wins.index(True)}".encode()


def test_creating_survives_a_lost_acknowledgement(s3: Bucket):
    store = s3.store()

    for count in (1, 2, 3):
        s3.proxy.once("lost_ack", "PUT", count)
        store.create(f"{count}.json", b"mine")

    with pytest.raises(StoreExistsError, match=r"1\.json exists already"):
        store.create("1.json", b"another's")
    assert store.read("1.json") == b"mine"


def test_a_creation_damaged_on_the_way_is_done_again(s3: Bucket):
    store = s3.store()
    store.create("first", b"so that the store is known to be exclusive")

    s3.proxy.once("flip_request", "PUT")
    store.create("x", b"mine")

    assert s3.direct().read("x") == b"mine"


def test_a_store_without_conditional_writes_is_said_and_still_has_one_winner(
    s3_on_disk: tuple[Bucket, Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    bucket, _ = s3_on_disk
    monkeypatch.setattr("casallm.storage.remote.SETTLE_SECONDS", 0.5)
    stores = [bucket.direct() for _ in range(4)]

    def create(number: int) -> bool:
        try:
            stores[number].create("attempt.json", f"start {number}".encode())
        except StoreExistsError:
            return False
        return True

    with concurrent.futures.ThreadPoolExecutor(4) as executor:
        wins = list(executor.map(create, range(4)))

    assert sum(wins) <= 1
    assert "does not honour conditional writes" in caplog.text


def test_an_upload_that_fails_publishes_nothing_and_leaves_nothing(
    s3: Bucket, small_parts: None, tmp_path: Path
):
    path, _ = file_of(tmp_path / "in", noise(3 * PART))
    s3.proxy.decide = lambda method, path: "403" if "partNumber=2" in path else None

    with pytest.raises(StoreError, match="does not accept the credentials"):
        s3.store().put("big", path)

    assert s3.names() == s3.open_uploads() == []


def test_dangling_uploads_are_aborted_but_not_those_of_the_living(s3: Bucket):
    for key in ("run/old", "run/new", "other/old"):
        s3.client.create_multipart_upload(Bucket=s3.name, Key=key)

    assert s3.store().discard_unfinished(lambda name: name == "old") == 1
    assert sorted(s3.open_uploads()) == ["other/old", "run/new"]


def test_a_stalled_answer_is_given_up_and_asked_for_again(s3: Bucket):
    store = s3.store(patience=replace(HURRIED, request_seconds=1.0))
    store.write("x", b"1")
    s3.proxy.once("stall", "GET")

    begin = time.monotonic()

    assert store.read("x") == b"1"
    assert time.monotonic() - begin < 10


def test_a_store_that_never_answers_is_an_error_in_bounded_time(s3: Bucket):
    store = s3.store(patience=replace(HURRIED, tries=2, request_seconds=1.0))
    s3.proxy.at_random("stall", 1.0)

    begin = time.monotonic()
    with pytest.raises(StoreError, match=r"failed 2 times \(last: .*check the network"):
        store.read("x")

    assert time.monotonic() - begin < 10


def test_errors_of_the_person_are_said_at_once_and_without_secrets(s3: Bucket):
    store = s3.store()
    s3.proxy.at_random("403", 1.0)
    with pytest.raises(StoreError) as expired:
        store.write("x", b"1")
    s3.proxy.at_random("denied", 1.0)
    with pytest.raises(StoreError) as denied:
        store.write("x", b"1")

    assert str(expired.value) == (
        f"s3://{s3.name} does not accept the credentials from the variables AWS_ACCESS_KEY_ID and"
        " AWS_SECRET_ACCESS_KEY (ExpiredToken): renew them, then run the same command again"
    )
    assert str(denied.value) == (
        f"access to s3://{s3.name}/run/x is denied (AccessDenied): renew the credentials from the"
        " variables AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY if they are old, or give them the"
        " rights s3:ListBucket, s3:GetObject, s3:PutObject and s3:DeleteObject on"
        f" s3://{s3.name}"
    )
    assert len(s3.proxy.requests) == 2
    assert "testtest" not in str(expired.value) + str(denied.value) + repr(store)


def test_a_missing_bucket_is_named(s3: Bucket):
    store = replace(s3, name="no-such-bucket").store()

    with pytest.raises(StoreError, match="there is no bucket s3://no-such-bucket: create it"):
        store.write("x", b"1")
    with pytest.raises(StoreError, match="there is no bucket s3://no-such-bucket: create it"):
        store.list()


def test_missing_credentials_are_an_advice(s3: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))

    fresh = Patience(tries=1, request_seconds=7.0)  # s3fs would reuse the client of equal settings
    with pytest.raises(StoreError, match="no AWS credentials were found for s3://"):
        s3.store(patience=fresh).write("x", b"1")
