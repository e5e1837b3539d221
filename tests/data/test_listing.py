import gzip

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from casallm.data import listing, ranges
from casallm.data.prepare import prepare
from casallm.data.sources import open_source
from casallm.errors import DataError, StoreError
from tests.data.conftest import files_of, make_texts, write_documents
from tests.faults.fixtures import credentials, s3

__all__ = ["credentials", "s3"]


@pytest.fixture
def folder(tmp_path):
    """Documents in three formats, and files that are none."""
    folder = tmp_path / "source"
    folder.mkdir()
    write_documents(folder / "a.jsonl", make_texts(60, seed=1))
    pq.write_table(
        pa.table({"text": make_texts(60, seed=2)}), folder / "b.parquet", row_group_size=9
    )
    lines = write_documents(tmp_path / "c.jsonl", make_texts(20, seed=3)).read_bytes()
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(lines))
    return folder


@pytest.fixture
def bucket(s3, folder, monkeypatch):
    """The same documents in a bucket at which AWS_ENDPOINT_URL points."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.proxy.url)
    listing._bucket.cache_clear()
    for path in sorted(folder.iterdir()):
        s3.client.put_object(Bucket=s3.name, Key=f"set/{path.name}", Body=path.read_bytes())
    s3.client.put_object(Bucket=s3.name, Key="set/notes.md", Body=b"no documents")
    s3.client.put_object(Bucket=s3.name, Key="set/.hidden/x.jsonl", Body=b"no documents")
    s3.client.put_object(Bucket=s3.name, Key="settle/x.jsonl", Body=b"no documents")
    yield s3
    listing._bucket.cache_clear()


def names_of(text):
    return [file.name for file in open_source(text).files]


def test_files_of_a_bucket_are_named_as_those_of_a_directory(bucket, caplog):
    url = f"s3://{bucket.name}"

    assert names_of(f"{url}/set") == ["a.jsonl", "b.parquet", "c.jsonl.gz"]
    assert names_of(f"{url}/set/") == ["a.jsonl", "b.parquet", "c.jsonl.gz"]
    assert names_of(f"{url}/set/a.jsonl") == ["a.jsonl"]
    assert names_of(f"{url}/set/*.jsonl*") == ["a.jsonl", "c.jsonl.gz"]
    assert "1 files that end in none of" in caplog.text


def test_documents_of_a_bucket_become_the_shards_of_those_of_a_directory(
    bucket, folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(ranges, "BLOCK_BYTES", 5000)
    settings = {"tokenizer": None, "vocab_size": 400, "workers": 1}
    prepare(open_source(str(folder)), tmp_path / "local", **settings)
    faults = [*[None] * 12, "503", "truncate"]
    bucket.proxy.decide = lambda method, path: bucket.proxy.random.choice(faults)

    dataset = prepare(open_source(f"s3://{bucket.name}/set"), tmp_path / "out", **settings)

    ours, theirs = files_of(tmp_path / "out"), files_of(tmp_path / "local")
    ours.pop("manifest.json"), theirs.pop("manifest.json")
    assert ours == theirs
    assert dataset.manifest.source["name"] == f"s3://{bucket.name}/set"


def test_an_object_that_changes_while_it_is_read_is_noticed(bucket, tmp_path):
    source = open_source(f"s3://{bucket.name}/set/a.jsonl")

    def meddle(_):
        body = b'{"text": "one more"}\n'
        bucket.client.put_object(Bucket=bucket.name, Key="set/a.jsonl", Body=body)

    with pytest.raises(DataError, match=r"the files of s3://.*/set/a.jsonl changed while"):
        prepare(source, tmp_path / "out", tokenizer=None, vocab_size=300, on_progress=meddle)
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("nothing", "there is nothing at s3://"),
        ("set/*.txt", "there is nothing at s3://"),
        ("set/notes.md", "holds no documents: no file in it ends in .parquet"),
    ],
)
def test_what_holds_no_documents_is_one_sentence(bucket, place, says):
    with pytest.raises(DataError, match=says):
        open_source(f"s3://{bucket.name}/{place}")


def test_a_bucket_that_may_not_be_read_is_one_sentence(bucket, tmp_path):
    source = open_source(f"s3://{bucket.name}/set")
    bucket.proxy.decide = lambda method, path: "denied"

    with pytest.raises(StoreError, match=r"access to s3://.* is denied"):
        prepare(source, tmp_path / "out", tokenizer=None, vocab_size=300)
    with pytest.raises(StoreError, match="is denied"):
        open_source(f"s3://{bucket.name}/set")


def test_a_scheme_that_nobody_knows_is_one_sentence():
    with pytest.raises(DataError, match="ftp:// is no kind of place that documents are read from"):
        open_source("ftp://example/set")
