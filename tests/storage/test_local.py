import errno
import hashlib
import multiprocessing
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casallm.errors import StoreDamagedError, StoreError, StoreExistsError, StoreNotFoundError
from casallm.storage.entry import Entry, check_name, digest_bytes
from casallm.storage.local import LocalStore, write_file


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "run")


def test_what_was_written_is_read_listed_and_deleted(store: LocalStore):
    store.write("a/b.json", b"{}")
    store.write("a/b.json", b"[]")

    assert store.read("a/b.json") == store.join("a").read("b.json") == b"[]"
    assert store.list() == store.list("a/b") == [Entry("a/b.json", 2)]
    assert store.exists("a/b.json")
    assert not store.exists("a")
    store.delete("a/b.json")
    store.delete("a/b.json")
    assert store.list() == []
    assert not Path(store.url, "a").exists()


def test_a_store_that_is_not_there_yet_is_empty(store: LocalStore):
    assert store.list() == []
    assert not store.exists("x")
    with pytest.raises(StoreNotFoundError, match=r"there is no .*/run/x"):
        store.read("x")


def test_creating_tells_own_content_from_anothers(store: LocalStore):
    store.create("x", b"mine")
    store.create("x", b"mine")

    with pytest.raises(StoreExistsError, match="x exists already"):
        store.create("x", b"another's")
    assert store.read("x") == b"mine"
    assert store.list() == [Entry("x", 4)]


def race(directory: Path, number: int) -> bool:
    try:
        LocalStore(directory).create("attempt.json", f"start {number}".encode() * 1000)
    except StoreExistsError:
        return False
    return True


def test_creating_has_one_winner_of_sixteen_processes(tmp_path: Path):
    with multiprocessing.get_context("fork").Pool(16) as pool:
        wins = pool.starmap(race, [(tmp_path, number) for number in range(16)])

    assert sum(wins) == 1
    content = LocalStore(tmp_path).read("attempt.json")
    assert content == f"start {wins.index(True)}".encode() * 1000


def test_a_copy_is_checked_and_replaces_nothing_when_it_is_wrong(store: LocalStore, tmp_path: Path):
    path = tmp_path / "in"
    path.write_bytes(b"new")
    right, wrong = hashlib.sha256(b"new").hexdigest(), "0" * 64
    store.write("x", b"old")

    with pytest.raises(StoreDamagedError, match="is damaged: its sha256 is"):
        store.put("x", path, sha256=wrong)
    with pytest.raises(StoreDamagedError, match="x is damaged"):
        store.get("x", path, sha256=wrong)

    assert (store.read("x"), path.read_bytes()) == (b"old", b"new")
    store.put("x", path, sha256=right)
    store.get("x", tmp_path / "out", sha256=right)
    assert (tmp_path / "out").read_bytes() == b"new"
    assert store.matches("x", digest_bytes(b"new"))
    assert not store.matches("x", digest_bytes(b"old"))


def test_a_write_that_is_killed_at_any_moment_leaves_the_old_content_or_the_new(tmp_path: Path):
    store = LocalStore(tmp_path)
    whole = {bytes([letter]) * 200_000 for letter in b"ab"}
    store.write("x", next(iter(whole)))

    for milliseconds in range(1, 31):
        pid = os.fork()
        if pid == 0:
            while True:
                for content in whole:
                    store.write("x", content)
        time.sleep(milliseconds / 1000)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert store.read("x") in whole
        assert store.list() == [Entry("x", 200_000)]

    store.discard_unfinished(lambda name: name == "x")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_unfinished_writes_of_the_living_are_spared(store: LocalStore):
    store.write("old/x", b"")
    store.write("new/x", b"")
    for folder in ("old", "new"):
        Path(store.url, folder, ".x.0123456789ab.partial").touch()

    assert store.discard_unfinished(lambda name: name == "old/x") == 1
    assert Path(store.url, "new", ".x.0123456789ab.partial").exists()


def test_a_hidden_file_that_no_write_left_is_no_unfinished_write(store: LocalStore):
    store.write("x", b"")
    Path(store.url, ".x.partial").touch()

    assert store.discard_unfinished(lambda name: True) == 0
    assert Path(store.url, ".x.partial").exists()


def test_a_write_that_fails_leaves_nothing(tmp_path: Path):
    def pieces():
        yield b"half"
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(StoreError, match=r"cannot write .*/x \(Input/output error\): check"):
        write_file(tmp_path / "x", pieces())

    assert list(tmp_path.iterdir()) == []


def test_a_full_drive_is_an_advice_and_leaves_the_old_content(tmp_path: Path):
    if os.geteuid() != 0:
        pytest.skip("mounting a small drive needs root")
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine allows no mounts")
    try:
        store = LocalStore(tmp_path)
        store.write("x", b"old")
        with pytest.raises(StoreError, match=r"the drive is full: .*x cannot be written \(.* free"):
            store.write("x", bytes(1 << 20))
        assert store.read("x") == b"old"
        assert [path.name for path in tmp_path.iterdir()] == ["x"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize(
    "name",
    ["", "/etc/passwd", "../x", "a/../../x", "a//b", ".hidden", "a/.b", "a b", "a\n", "~", "x/"],
)
def test_names_that_lead_elsewhere_are_refused(store: LocalStore, name: str):
    for operation in (store.read, store.exists, store.delete, store.join):
        with pytest.raises(StoreError, match="is not a name that a run may hold"):
            operation(name)


@given(st.text(alphabet="a./_-~ \n", max_size=12))
def test_every_accepted_name_stays_below_the_root(name: str):
    try:
        check_name(name)
    except StoreError:
        return

    path = Path("/root", name)
    assert path.is_relative_to("/root")
    assert ".." not in path.parts
