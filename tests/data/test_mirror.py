import contextlib
import json
from pathlib import Path

import pytest
import torch

from casallm.data.loader import PretrainLoader
from casallm.data.mirror import is_in_bucket, mirror_dataset
from casallm.data.prepare import load_or_prepare
from casallm.data.shards import open_dataset, verify_dataset
from casallm.data.sources import DataConfig
from casallm.data.tokenizer import TokenizerConfig
from casallm.errors import DataError
from tests.faults.fixtures import credentials, s3

__all__ = ["credentials", "s3"]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def bytes_of(dataset):
    return [shard.bytes for split in dataset.splits.values() for shard in split.shards]


def smallest_limit(dataset):
    return sum(sorted(bytes_of(dataset))[-8:])


@contextlib.contextmanager
def loader_of(dataset, *, rank=0, world_size=1):
    loader = PretrainLoader(
        dataset,
        context_length=32,
        global_batch_size=16,
        micro_batch_size=8,
        rank=rank,
        world_size=world_size,
        seed=7,
        device=torch.device("cpu"),
    )
    yield loader
    loader.close()


def taken(directory):
    """The bytes of all shards in a directory from which some vanish meanwhile."""
    total = 0
    for path in directory.glob("*.npy"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def tokens_of(batches):
    return [row for batch in batches for row in batch.inputs_BT.tolist()]


def upload(dataset, store):
    for path in sorted(dataset.directory.rglob("*")):
        if path.is_file():
            store.put(path.relative_to(dataset.directory).as_posix(), path)


def test_a_small_mirror_gives_the_batches_of_the_whole_data_set(many_shards):
    limit = smallest_limit(many_shards)
    directory = mirror_dataset(str(many_shards.directory), limit_bytes=limit)
    assert limit < sum(bytes_of(many_shards)) / 2

    with loader_of(many_shards) as local, loader_of(open_dataset(directory)) as mirrored:
        steps = 2 * local.sequences_per_epoch // 16
        for step in [*range(steps), 2, steps + 7]:
            assert tokens_of(mirrored.batches(step)) == tokens_of(local.batches(step))
            assert taken(directory) <= limit
        assert tokens_of(mirrored.validation(8)) == tokens_of(local.validation(8))


def test_the_ranks_of_a_node_share_one_mirror_of_a_bad_bucket(many_shards, s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.proxy.url)
    upload(many_shards, s3.direct("set"))
    s3.proxy.decide = lambda method, path: s3.proxy.random.choice([None] * 30 + ["flip", "503"])
    limit = smallest_limit(many_shards) * 5 // 4
    directory = mirror_dataset(f"s3://{s3.name}/set", limit_bytes=limit)

    with contextlib.ExitStack() as stack:
        datasets = [many_shards, open_dataset(directory), open_dataset(directory)]
        local, *ranks = [
            stack.enter_context(loader_of(dataset, rank=rank, world_size=n_ranks))
            for dataset, rank, n_ranks in zip(datasets, (0, 0, 1), (1, 2, 2), strict=True)
        ]
        for step in range(0, local.sequences_per_epoch // 16, 4):
            rows = [tokens_of(rank.batches(step)) for rank in ranks]
            together = [row for pair in zip(*rows, strict=True) for row in pair]
            assert together == tokens_of(local.batches(step))

    fetched = [path for method, path, _ in s3.proxy.requests if method == "GET" and "npy" in path]
    assert len(fetched) < 4 * len(bytes_of(many_shards))


def test_training_starts_with_what_is_read_first(many_shards, s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.proxy.url)
    upload(many_shards, s3.direct("set"))
    limit = smallest_limit(many_shards)
    directory = mirror_dataset(f"s3://{s3.name}/set", limit_bytes=limit)

    with loader_of(open_dataset(directory)) as loader:
        next(loader.batches(0))

    assert len(list(directory.glob("train-*.npy"))) <= 8


def test_a_limit_below_what_is_in_use_is_one_sentence(many_shards):
    with pytest.raises(DataError) as caught:
        mirror_dataset(str(many_shards.directory), limit_bytes=smallest_limit(many_shards) - 1)

    assert str(caught.value).startswith("data.cache_gb is 3")
    assert "which are in use at a time, take" in str(caught.value)


def test_a_place_without_a_manifest_is_no_data_set(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.proxy.url)
    url = f"s3://{s3.name}/nothing"

    assert not is_in_bucket(url)
    with pytest.raises(DataError, match=f"there is no data set in {url}"):
        mirror_dataset(url, limit_bytes=10**9)


def test_a_damaged_shard_of_a_bucket_is_named(prepared, s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.proxy.url)
    store = s3.direct("set")
    upload(prepared, store)
    name = prepared.splits["train"].shards[0].name
    raw = bytearray(store.read(name))
    raw[-1] ^= 1
    store.write(name, bytes(raw))

    directory = mirror_dataset(f"s3://{s3.name}/set", limit_bytes=10**9)

    (problem,) = verify_dataset(directory)
    assert problem.startswith(f"s3://{s3.name}/set/{name} is damaged where it lies")


def test_a_data_set_in_a_bucket_is_trained_on_as_it_lies(prepared, s3, monkeypatch, home):
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.proxy.url)
    upload(prepared, s3.direct("set"))
    data = DataConfig(source=f"s3://{s3.name}/set", cache_gb=0.5)

    dataset = load_or_prepare(data, TokenizerConfig(), vocab_size=999, root=home / "data")

    assert dataset.manifest == prepared.manifest
    assert dataset.tokenizer().fingerprint == prepared.tokenizer().fingerprint
    assert home in dataset.directory.parents
    origin = json.loads((dataset.directory / "origin.json").read_text())
    assert origin == {"url": data.source, "limit_bytes": 500_000_000}
    assert not Path(home / "data").exists()
