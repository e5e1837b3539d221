import itertools
import multiprocessing
import os
import threading
import time

import pytest

from casallm.errors import StoreDamagedError, StoreError
from casallm.storage import cache as module
from casallm.storage.cache import Cache
from casallm.storage.entry import digest_bytes
from casallm.storage.local import LocalStore

SIZE = 1000


@pytest.fixture(autouse=True)
def without_power_cuts(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def contents():
    return {f"file-{i}": bytes([i]) * SIZE for i in range(8)}


@pytest.fixture
def stored(tmp_path, contents):
    store = LocalStore(tmp_path / "store")
    for name, content in contents.items():
        store.write(name, content)
    return store


def open_cache(store, directory, contents, n_files=3, **changes):
    digests = {name: digest_bytes(content) for name, content in contents.items()} | changes
    return Cache(store, directory, digests, limit_bytes=n_files * SIZE)


def names_in(directory):
    return sorted(path.name for path in directory.iterdir() if path.name.startswith("file"))


def read(cache, name):
    with cache.open(name) as file:
        return file.read()


def wait_until(holds):
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_files_are_those_of_the_store_and_never_more_than_the_limit(stored, tmp_path, contents):
    cache = open_cache(stored, tmp_path / "cache", contents)

    for name in [*contents, *reversed(contents), "file-3", "file-0"]:
        assert read(cache, name) == contents[name]
        assert len(names_in(tmp_path / "cache")) <= 3


def test_what_was_opened_longest_ago_goes_first(stored, tmp_path, contents):
    cache = open_cache(stored, tmp_path / "cache", contents)

    for name in ("file-0", "file-1", "file-2", "file-0", "file-3"):
        read(cache, name)

    assert names_in(tmp_path / "cache") == ["file-0", "file-2", "file-3"]


def test_what_is_expected_is_here_before_it_is_opened(stored, tmp_path, contents):
    cache = open_cache(stored, tmp_path / "cache", contents)
    read(cache, "file-0")

    cache.expect(["file-4", "file-5", "file-6", "file-7"])

    wait_until(lambda: names_in(tmp_path / "cache") == ["file-4", "file-5", "file-6"])
    cache.close()


def test_a_reader_in_need_evicts_what_is_expected_last(stored, tmp_path, contents):
    cache = open_cache(stored, tmp_path / "cache", contents)
    cache.expect(["file-4", "file-5", "file-6"])
    wait_until(lambda: len(names_in(tmp_path / "cache")) == 3)

    assert read(cache, "file-0") == contents["file-0"]

    assert names_in(tmp_path / "cache") == ["file-0", "file-4", "file-5"]
    cache.close()


def test_an_open_file_stays_readable_when_it_is_evicted(stored, tmp_path, contents):
    cache = open_cache(stored, tmp_path / "cache", contents, n_files=1)

    with cache.open("file-0") as file:
        read(cache, "file-1")

        assert names_in(tmp_path / "cache") == ["file-1"]
        assert file.read() == contents["file-0"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "longer"])
def test_a_file_that_went_bad_on_this_disk_is_fetched_again(
    stored, tmp_path, contents, damage, caplog
):
    read(open_cache(stored, tmp_path / "cache", contents), "file-1")
    path = tmp_path / "cache" / "file-1"
    bad = {"cut": b"\1" * 10, "flipped": b"\3" + b"\1" * 999, "longer": b"\1" * 1001}
    path.write_bytes(bad[damage])

    again = open_cache(stored, tmp_path / "cache", contents)

    assert read(again, "file-1") == contents["file-1"]
    assert "is not what it was and is fetched again" in caplog.text


def test_a_good_file_of_an_earlier_process_is_not_fetched_again(stored, tmp_path, contents):
    read(open_cache(stored, tmp_path / "cache", contents), "file-1")
    stored.delete("file-1")

    again = open_cache(stored, tmp_path / "cache", contents)

    assert read(again, "file-1") == contents["file-1"]


def test_what_a_killed_process_left_is_removed(stored, tmp_path, contents):
    cache = open_cache(stored, tmp_path / "cache", contents)
    leftover = tmp_path / "cache" / ".file-7.abc.partial"
    leftover.write_bytes(b"x")

    read(cache, "file-0")

    assert not leftover.exists()


def test_a_file_that_is_wrong_in_the_store_is_an_error_to_its_reader(stored, tmp_path, contents):
    cache = open_cache(stored, tmp_path / "cache", contents, **{"file-2": digest_bytes(b"x" * 999)})
    cache.expect(["file-2"])

    with pytest.raises(StoreDamagedError, match="file-2 is damaged"):
        cache.open("file-2")
    cache.close()
    assert names_in(tmp_path / "cache") == []


def test_a_full_drive_evicts_before_the_limit_is_reached(stored, tmp_path, contents, monkeypatch):
    cache = open_cache(stored, tmp_path / "cache", contents, n_files=8)
    free = module._SPARE_BYTES + 2 * SIZE

    def free_bytes(directory):
        return free - SIZE * len(names_in(directory))

    monkeypatch.setattr(module, "free_bytes", free_bytes)
    for name in contents:
        assert read(cache, name) == contents[name]
        assert len(names_in(tmp_path / "cache")) <= 2


def test_processes_share_what_is_fetched(stored, tmp_path, contents):
    fork = multiprocessing.get_context("fork")
    with fork.Pool(3) as pool:
        arguments = [(stored, tmp_path / "cache", contents, seed) for seed in range(3)]
        assert pool.starmap(read_in_own_order, arguments) == [True] * 3

    assert len(names_in(tmp_path / "cache")) <= 3


def read_in_own_order(stored, directory, contents, seed):
    cache = open_cache(stored, directory, contents)
    names = list(contents) * 3
    names = names[seed:] + names[:seed]
    return all(read(cache, name) == contents[name] for name in names)


def test_what_flips_on_the_way_is_fetched_again(s3, tmp_path, contents):
    few = dict(list(contents.items())[:3])
    for name, content in few.items():
        s3.direct().write(name, content)
    faults = itertools.cycle(["flip", "503", "reset", "truncate", None, None])
    s3.proxy.decide = lambda method, path: next(faults)
    cache = open_cache(s3.store(), tmp_path / "cache", few)

    for name in few:
        assert read(cache, name) == few[name]


def test_a_store_that_is_away_is_said_by_the_reader_alone(s3, tmp_path, contents):
    s3.direct().write("file-0", contents["file-0"])
    s3.proxy.decide = lambda method, path: "503"
    cache = open_cache(s3.store(), tmp_path / "cache", contents)
    cache.expect(["file-0"])

    with pytest.raises(StoreError, match="failed 8 times"):
        cache.open("file-0")

    s3.proxy.behave()
    assert read(cache, "file-0") == contents["file-0"]
    cache.close()


def test_closing_ends_the_thread(stored, tmp_path, contents):
    cache = open_cache(stored, tmp_path / "cache", contents)
    cache.expect(list(contents))

    cache.close()

    assert "cache" not in [thread.name for thread in threading.enumerate()]


def test_a_file_that_vanished_is_fetched_again(stored, tmp_path, contents):
    cache = open_cache(stored, tmp_path / "cache", contents)
    read(cache, "file-0")
    (tmp_path / "cache" / "file-0").unlink()

    assert read(cache, "file-0") == contents["file-0"]
