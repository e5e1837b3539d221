import random
import re
import shutil
import socket
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from casallm.data import hub as module
from casallm.data import ranges, web
from casallm.data.hub import HubName, list_hub, parse_hub_name
from casallm.data.listing import list_files
from casallm.data.prepare import prepare
from casallm.data.sources import open_source
from casallm.errors import DataError, StoreError
from casallm.storage.retry import Patience
from tests.data.conftest import files_of, interrupt_after, make_texts, write_documents
from tests.data.hub_server import (
    BAD_GATEWAY,
    COMMIT,
    GATED,
    NOT_FOUND,
    TOO_MANY,
    Failure,
    hub_server,
)

CARD = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: "data/*/*"}
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*
- config_name: sample-100BT
  data_files: "sample/100BT/*"
---
"""


def write_parquet(path, texts, column="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({column: texts, "id": [str(i) for i in range(len(texts))]})
    pq.write_table(table, path, row_group_size=25, compression="zstd")


@pytest.fixture
def repositories(tmp_path):
    """Repositories laid out as those of the hub are."""
    root = tmp_path / "hub"
    edu = root / "HuggingFaceFW" / "fineweb-edu"
    write_parquet(edu / "sample" / "10BT" / "000_00000.parquet", make_texts(90, seed=1))
    write_parquet(edu / "sample" / "10BT" / "001_00000.parquet", make_texts(60, seed=2))
    write_parquet(edu / "sample" / "100BT" / "000_00000.parquet", make_texts(20, seed=3))
    write_parquet(edu / "data" / "CC-MAIN-2013-20" / "train-0.parquet", make_texts(10, seed=4))
    (edu / "README.md").write_text(CARD)
    climb = root / "karpathy" / "climbmix-400b-shuffle"
    for number in range(2):
        write_parquet(climb / f"shard_{number:05d}.parquet", make_texts(40, seed=5 + number))
    own = root / "a" / "own"
    write_parquet(own / "data" / "train-00000-of-00001.parquet", make_texts(80, seed=7), "content")
    write_parquet(own / "data" / "validation-00000-of-00001.parquet", make_texts(9), "content")
    write_parquet(own / "data" / "test-00000-of-00001.parquet", make_texts(9, seed=8), "content")
    return root


@pytest.fixture
def hub(repositories, monkeypatch):
    with hub_server(repositories) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        hurried = Patience(tries=6, first_delay_seconds=0.01, request_seconds=1.0)
        monkeypatch.setattr(module, "PATIENCE", hurried)
        monkeypatch.setattr(web, "PATIENCE", hurried)
        yield server


def paths_of(name):
    return [(split, file.path) for split, file in list_hub(parse_hub_name(name)).files]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("fineweb-edu", HubName("HuggingFaceFW/fineweb-edu", None, "sample-10BT")),
        ("fineweb-edu:sample-100BT", HubName("HuggingFaceFW/fineweb-edu", None, "sample-100BT")),
        ("climbmix", HubName("karpathy/climbmix-400b-shuffle")),
        ("a/b", HubName("a/b")),
        ("a/b:c", HubName("a/b", None, "c")),
        ("a/b@1f2e::train:content", HubName("a/b", "1f2e", "", "train", "content")),
        ("a/b:c:d:e", HubName("a/b", None, "c", "d", "e")),
        ("books", None),
        ("a/b/c", None),
        ("/a/b", None),
        ("a/*.parquet", None),
        ("s3://a/b", None),
        ("a/b:c:d:e:f", None),
    ],
)
def test_names_are_read_as_the_hub_writes_them(text, name):
    assert parse_hub_name(text) == name


def test_configurations_and_splits_are_those_of_the_card(hub):
    assert paths_of("fineweb-edu") == [
        (None, "sample/10BT/000_00000.parquet"),
        (None, "sample/10BT/001_00000.parquet"),
    ]
    assert paths_of("fineweb-edu:sample-100BT") == [(None, "sample/100BT/000_00000.parquet")]
    assert paths_of("HuggingFaceFW/fineweb-edu") == [(None, "data/CC-MAIN-2013-20/train-0.parquet")]
    assert paths_of("climbmix") == [(None, f"shard_0000{number}.parquet") for number in (0, 1)]


def test_without_a_card_splits_are_in_the_names_and_the_test_part_is_left_alone(hub):
    assert paths_of("a/own") == [
        ("train", "data/train-00000-of-00001.parquet"),
        ("val", "data/validation-00000-of-00001.parquet"),
    ]
    assert paths_of("a/own::test") == [(None, "data/test-00000-of-00001.parquet")]


def test_a_data_set_of_the_hub_becomes_the_shards_of_its_files(hub, repositories, tmp_path):
    folder = repositories / "HuggingFaceFW" / "fineweb-edu" / "sample" / "10BT"
    settings = {"tokenizer": None, "vocab_size": 400, "workers": 1}
    local = prepare(open_source(str(folder)), tmp_path / "local", **settings)

    dataset = prepare(open_source("fineweb-edu"), tmp_path / "out", **settings)

    ours, theirs = files_of(tmp_path / "out"), files_of(tmp_path / "local")
    ours.pop("manifest.json"), theirs.pop("manifest.json")
    assert ours == theirs
    source = dataset.manifest.source
    assert source["name"] == "HuggingFaceFW/fineweb-edu"
    assert source["configuration"] == "sample-10BT"
    assert source["commit"] == COMMIT
    assert source["bytes"] == local.manifest.source["bytes"]
    assert {path for path, _ in hub.requests if path.startswith("/cdn/")}
    assert hub.url not in str(dataset.manifest)


def test_the_validation_part_of_a_data_set_is_what_is_held_out(hub, tmp_path):
    source = open_source("a/own:::content")

    dataset = prepare(source, tmp_path / "out", tokenizer=None, vocab_size=400)

    assert dataset.splits["val"].documents == 9
    assert dataset.splits["train"].documents == 80


def test_the_token_goes_to_the_hub_alone_and_into_nothing_that_is_kept(hub, tmp_path):
    source = open_source("fineweb-edu:sample-100BT")
    prepare(source, tmp_path / "out", tokenizer=None, vocab_size=300)

    assert {token for path, token in hub.requests} == {"Bearer hf_secret"}
    assert not any(b"hf_secret" in content for content in files_of(tmp_path / "out").values())
    assert "hf_secret" not in repr(source)


def test_a_bad_network_changes_nothing(hub, repositories, tmp_path, monkeypatch):
    monkeypatch.setattr(ranges, "BLOCK_BYTES", 4096)
    settings = {"tokenizer": None, "vocab_size": 400, "workers": 1}
    calm = prepare(open_source("climbmix"), tmp_path / "calm", **settings)
    faults, source = [*[None] * 12, TOO_MANY, "cut", BAD_GATEWAY], random.Random(1)
    hub.decide = lambda path: source.choice(faults)

    dataset = prepare(open_source("climbmix"), tmp_path / "out", **settings)

    assert dataset.manifest == calm.manifest


def test_the_files_of_a_stopped_preparation_may_have_a_newer_commit(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("casallm.data.sources.UNIT_BYTES", 8000)
    settings = {"tokenizer": None, "vocab_size": 300, "workers": 1}
    calm = prepare(open_source("climbmix"), tmp_path / "calm", **settings)
    stop = interrupt_after(3)
    with pytest.raises(KeyboardInterrupt):
        prepare(open_source("climbmix"), tmp_path / "out", on_progress=stop, **settings)
    monkeypatch.setattr("tests.data.hub_server.COMMIT", "f" * 40)

    dataset = prepare(open_source("climbmix"), tmp_path / "out", **settings)

    assert dataset.manifest == calm.manifest
    assert dataset.manifest.source["commit"] != "f" * 40


@pytest.mark.parametrize(
    ("name", "failure", "says"),
    [
        ("a/gated", GATED, "a/gated is open only to those who accept its terms: accept them at"),
        ("a/own", NOT_FOUND, "no data set of that name at http://127.0.0.1:"),
        ("no/such", None, "there is no file or directory 'no/such' here, and no data set of that"),
        ("a/own@v9", None, "/datasets/a/own has no revision 'v9'"),
        ("a/own:x", None, "a/own has no configurations: leave that part empty"),
        ("a/own::trian", None, "a/own has no split 'trian', did you mean train? (splits: test,"),
        ("fineweb-edu:sample-1BT", None, "has no configuration 'sample-1BT'"),
        ("a/own", Failure(403), "that may be read without another token (403)"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(hub, name, failure, says):
    hub.decide = lambda path: failure

    with pytest.raises(DataError) as caught:
        open_source(name)

    assert says in str(caught.value)
    assert "hf_secret" not in str(caught.value)
    assert len(hub.requests) == 1


@pytest.mark.parametrize("failure", [TOO_MANY, BAD_GATEWAY])
def test_a_hub_that_stays_busy_is_asked_again_and_then_said(hub, failure):
    hub.decide = lambda path: failure

    with pytest.raises(StoreError, match=r"listing a/own on .* failed 6 times \(last: status"):
        open_source("a/own")


def test_a_file_that_is_closed_to_us_is_one_sentence(hub, tmp_path):
    source = open_source("climbmix")
    hub.decide = lambda path: GATED if "/resolve/" in path else None

    with pytest.raises(DataError, match=r"parquet may not be read \(401\): set HF_TOKEN"):
        prepare(source, tmp_path / "out", tokenizer=None, vocab_size=300)

    assert not (tmp_path / "out").exists()


def test_without_a_network_it_is_said_once_and_at_once(monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")

    with pytest.raises(DataError) as caught:
        open_source("fineweb-edu")

    assert str(caught.value).startswith(
        "HuggingFaceFW/fineweb-edu is no file or directory here, and http://127.0.0.1:"
    )
    assert "cannot be reached to look for it there (ConnectError): check" in str(caught.value)


def test_a_name_that_nobody_resolves_and_offline_mode_say_the_same(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")

    with pytest.raises(DataError, match=r"https://hub.invalid cannot be reached to look for it"):
        open_source("fineweb-edu")


def test_a_hub_that_never_answers_does_not_hang(hub, monkeypatch):
    monkeypatch.setattr(module, "LISTING_SECONDS", 0.3)
    hub.decide = lambda path: "stall"

    with pytest.raises(DataError, match=r"cannot be reached to look for it there \(TimeoutError\)"):
        open_source("fineweb-edu")


def test_a_data_set_may_not_lead_into_the_machines_network(hub, tmp_path):
    source = open_source("climbmix")
    inside = Failure(302, (("Location", "https://169.254.169.254/latest/meta-data/"),))
    hub.decide = lambda path: inside if "/resolve/" in path else None

    with pytest.raises(DataError) as caught:
        prepare(source, tmp_path / "out", tokenizer=None, vocab_size=300)

    assert "169.254.169.254 has the address 169.254.169.254, which is not public" in str(
        caught.value
    )


def test_a_local_directory_goes_before_a_name_of_the_hub(tmp_path, monkeypatch):
    (tmp_path / "a" / "own").mkdir(parents=True)
    write_documents(tmp_path / "a" / "own" / "x.jsonl", ["a document"])
    monkeypatch.chdir(tmp_path)

    assert open_source("a/own").files == list_files("a/own")


def test_a_repository_of_nothing_readable_is_one_sentence(hub, repositories):
    shutil.rmtree(repositories / "a" / "own" / "data")
    (repositories / "a" / "own" / "x.csv").write_text("a,b")

    with pytest.raises(DataError, match=r"a/own holds no file that ends in \.parquet"):
        open_source("a/own")


def test_the_names_that_the_documentation_shows_are_found(hub):
    pages = [Path("README.md"), *Path("docs").glob("**/*.md")]
    shown = {
        name
        for page in pages
        for name in re.findall(
            r"(?:DATA=|--data )((?:fineweb-edu|climbmix)[\w:-]*)", page.read_text()
        )
    }

    assert "fineweb-edu" in shown
    for name in shown:
        assert open_source(name).hub_set.files
