import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time

import pytest

from casallm.data.destination import destination_at
from casallm.data.prepare import Node, parse_node, prepare, prepare_share
from casallm.data.shards import open_dataset, verify_dataset
from casallm.data.sources import open_source
from casallm.errors import ConfigError, DataError, StoreError
from tests.data.conftest import files_of, interrupt_after, make_texts, write_documents
from tests.faults.fixtures import credentials, s3

__all__ = ["credentials", "s3"]


@pytest.fixture
def bucket(s3, tmp_path, monkeypatch):
    """A bucket at which AWS_ENDPOINT_URL points."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.proxy.url)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return s3


@pytest.fixture
def calm(many_units, tmp_path, prepared):
    """The files that a directory gets."""
    prepare(open_source(str(many_units)), tmp_path / "calm", **settings(prepared))
    return files_of(tmp_path / "calm")


def settings(prepared):
    return {"tokenizer": prepared.tokenizer(), "vocab_size": 400, "workers": 1}


def prepare_into(place, source, prepared, **changes):
    options = settings(prepared) | changes
    return prepare_share(open_source(str(source)), destination_at(str(place)), **options)


def objects_of(bucket):
    return {
        name.removeprefix("set/"): bucket.client.get_object(Bucket=bucket.name, Key=name)[
            "Body"
        ].read()
        for name in bucket.names()
    }


def test_a_bucket_gets_the_files_that_a_directory_gets(
    bucket, many_units, tmp_path, prepared, calm
):
    faults = [*[None] * 12, "503", "reset", "lost_ack", "flip_request"]
    bucket.proxy.decide = lambda method, path: bucket.proxy.random.choice(faults)

    manifest = prepare_into(f"s3://{bucket.name}/set", many_units, prepared)

    bucket.proxy.behave()
    assert manifest == open_dataset(tmp_path / "calm").manifest
    assert objects_of(bucket) == calm
    assert bucket.open_uploads() == []
    assert not any(path.is_file() for path in (tmp_path / "home").rglob("*"))


def test_what_is_finished_in_a_bucket_is_not_made_again_by_another_machine(
    bucket, many_units, tmp_path, prepared, calm, monkeypatch
):
    url = f"s3://{bucket.name}/set"
    with pytest.raises(KeyboardInterrupt):
        prepare_into(url, many_units, prepared, on_progress=interrupt_after(4))
    finished = [name for name in bucket.names() if name.endswith(".npy")]
    assert "set/manifest.json" not in bucket.names()
    bucket.proxy.behave()
    monkeypatch.setenv("HOME", str(tmp_path / "another"))

    prepare_into(url, many_units, prepared)

    sent = {path for method, path, _ in bucket.proxy.requests if method == "PUT"}
    assert len(finished) >= 2
    assert not [name for name in finished if f"/{bucket.name}/{name}" in sent]
    assert objects_of(bucket) == calm


def test_a_credential_that_expires_half_way_is_one_sentence_and_can_be_renewed(
    bucket, many_units, prepared, calm
):
    url = f"s3://{bucket.name}/set"
    puts = []

    def decide(method, path):
        puts.append(method)
        return "403" if method == "PUT" and puts.count("PUT") > 6 else None

    bucket.proxy.decide = decide
    with pytest.raises(StoreError) as caught:
        prepare_into(url, many_units, prepared)
    bucket.proxy.behave()
    assert "does not accept the credentials from the variables AWS_ACCESS_KEY_ID" in str(
        caught.value
    )
    assert "renew them, then run the same command again" in str(caught.value)

    prepare_into(url, many_units, prepared)

    assert objects_of(bucket) == calm


def test_a_bucket_without_rights_is_one_sentence(bucket, many_units, prepared):
    bucket.proxy.decide = lambda method, path: "denied" if method == "PUT" else None

    with pytest.raises(StoreError, match=r"is denied .* give them the rights s3:ListBucket"):
        prepare_into(f"s3://{bucket.name}/set", many_units, prepared)

    assert bucket.names() == []


def test_a_place_of_other_files_in_a_bucket_is_not_prepared_into(bucket, many_units, prepared):
    bucket.direct("set").write("weights.bin", b"precious")

    with pytest.raises(DataError, match=f"s3://{bucket.name}/set holds other files"):
        prepare_into(f"s3://{bucket.name}/set", many_units, prepared)

    assert bucket.names() == ["set/weights.bin"]


def test_the_same_again_in_a_bucket_does_nothing_and_another_source_is_refused(
    bucket, many_units, tmp_path, prepared
):
    url = f"s3://{bucket.name}/set"
    first = prepare_into(url, many_units, prepared)
    bucket.proxy.behave()

    assert prepare_into(url, many_units, prepared) == first
    assert {method for method, _, _ in bucket.proxy.requests} <= {"GET", "HEAD"}
    other = write_documents(tmp_path / "other.jsonl", make_texts(9, seed=9))
    with pytest.raises(DataError, match=f"{url} holds the shards of 'source' with"):
        prepare_into(url, other, prepared)


@pytest.mark.parametrize("n_nodes", [2, 3])
def test_nodes_that_know_nothing_of_each_other_make_the_same_files(
    many_units, tmp_path, prepared, calm, n_nodes
):
    told = [
        prepare_into(tmp_path / "out", many_units, prepared, node=Node(rank, n_nodes))
        for rank in reversed(range(n_nodes))
    ]

    assert told[:-1] == [None] * (n_nodes - 1)
    assert told[-1] == open_dataset(tmp_path / "calm").manifest
    assert files_of(tmp_path / "out") == calm
    assert verify_dataset(tmp_path / "out") == []


def test_nodes_at_work_at_the_same_time_do_not_disturb_each_other(many_units, tmp_path):
    source = open_source(str(many_units))
    prepare(source, tmp_path / "calm", tokenizer=None, vocab_size=400, workers=1)
    shares = [(many_units, tmp_path / "out", Node(rank, 3)) for rank in range(3)]

    with multiprocessing.get_context("fork").Pool(3) as pool:
        finished = pool.starmap(prepare_a_share, shares)

    assert any(finished)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "calm")


def prepare_a_share(source, out, node):
    return prepare_into(out, source, NoVocabulary, node=node, tokenizer=None) is not None


def test_nodes_that_meet_in_a_bucket_train_one_vocabulary(bucket, many_units, tmp_path):
    url, trained = f"s3://{bucket.name}/set", {"tokenizer": None}
    source = open_source(str(many_units))
    prepare(source, tmp_path / "calm", tokenizer=None, vocab_size=400, workers=1)

    first = prepare_into(url, many_units, NoVocabulary, node=Node(0, 2), **trained)
    shutil.rmtree(tmp_path / "home")
    second = prepare_into(url, many_units, NoVocabulary, node=Node(1, 2), **trained)

    assert first is None
    assert second is not None
    assert objects_of(bucket) == files_of(tmp_path / "calm")


class NoVocabulary:
    @staticmethod
    def tokenizer():
        return None


@pytest.mark.parametrize(
    ("text", "environment", "node"),
    [
        (None, {}, Node(0, 1)),
        (None, {"SKYPILOT_NODE_RANK": "2", "SKYPILOT_NUM_NODES": "4"}, Node(2, 4)),
        ("2/3", {"SKYPILOT_NODE_RANK": "0", "SKYPILOT_NUM_NODES": "1"}, Node(1, 3)),
        ("3/3", {}, Node(2, 3)),
    ],
)
def test_a_node_is_what_is_said_or_what_skypilot_says(text, environment, node):
    assert parse_node(text, environment) == node


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "a/b", "1/", "-1/2"])
def test_no_share_is_answered_with_how_one_is_written(text):
    with pytest.raises(ConfigError, match="write 2/3 for the second of three"):
        parse_node(text, {})


KILLED = """
import sys
from casallm.data import prepare, sources, unit
from casallm.data.destination import destination_at
from casallm.data.sources import open_source
prepare.SMALL_SOURCE_BYTES = unit.SMALL_SOURCE_BYTES = 1000
sources.UNIT_BYTES = 20_000
if __name__ == "__main__":
    prepare.prepare_share(
        open_source(sys.argv[1]), destination_at(sys.argv[2]), tokenizer=None, vocab_size=400,
        workers=2,
    )
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_preparation_of_a_bucket_goes_on_to_the_same_files(bucket, many_units, tmp_path):
    source = open_source(str(many_units))
    prepare(source, tmp_path / "calm", tokenizer=None, vocab_size=400, workers=1)
    script, url, rng = tmp_path / "main.py", f"s3://{bucket.name}/set", random.Random(1)
    script.write_text(KILLED)
    command = [sys.executable, str(script), str(many_units), url]
    environment = os.environ | {"PYTHONPATH": "."}

    for _ in range(12):
        started = time.monotonic()
        with subprocess.Popen(command, env=environment) as process:
            while process.poll() is None and time.monotonic() < started + rng.uniform(1, 9):
                time.sleep(0.05)
            process.kill()
    subprocess.run(command, env=environment, check=True)

    assert objects_of(bucket) == files_of(tmp_path / "calm")
