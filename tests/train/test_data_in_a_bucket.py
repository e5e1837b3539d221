"""A real run whose shards lie in a bucket behind a bad network, with room for a part of them."""

import json

import pytest

from casallm.data import shards
from casallm.data.prepare import prepare
from casallm.data.sources import open_source
from tests.data.conftest import make_texts, write_documents
from tests.faults.fixtures import credentials, s3
from tests.faults.servers import CREDENTIALS
from tests.train.real_run import RealRun

__all__ = ["credentials", "s3"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_from_a_bucket_through_a_small_cache_has_the_losses_of_one_from_disk(
    tmp_path, s3, monkeypatch
):
    monkeypatch.setattr(shards, "SHARD_TOKENS", 1000)
    documents = write_documents(tmp_path / "documents.jsonl", make_texts(400))
    source = open_source(str(documents))
    dataset = prepare(source, tmp_path / "shards", tokenizer=None, vocab_size=400, workers=1)
    sizes = sorted(shard.bytes for split in dataset.splits.values() for shard in split.shards)
    limit = sum(sizes[-8:]) + sizes[-1]
    assert limit < sum(sizes) / 3
    for path in sorted(dataset.directory.rglob("*")):
        if path.is_file():
            s3.direct("set").put(path.relative_to(dataset.directory).as_posix(), path)
    local = RealRun(dataset.directory, "local", ranks=2).start()
    assert local.wait_for_exit().code == 0
    s3.proxy.decide = lambda method, path: s3.proxy.random.choice([None] * 20 + ["flip", "503"])
    home = tmp_path / "home"
    environment = {**CREDENTIALS, "AWS_ENDPOINT_URL": s3.proxy.url, "HOME": str(home)}
    remote = RealRun(dataset.directory, "remote", ranks=2, environment=environment)
    place = (f"data.source=s3://{s3.name}/set", f"data.cache_gb={limit / 1e9}")
    done = remote.start(*place).wait_for_exit()

    assert done.code == 0, done.stderr
    ours, theirs = losses_of(remote), losses_of(local)
    assert len(ours) == 26
    assert ours == theirs
    assert remote.weights() == local.weights()
    kept = list(home.glob(".cache/casallm/data/*/*.npy"))
    assert 0 < sum(path.stat().st_size for path in kept) <= limit


def losses_of(run):
    """Each step's loss, and each evaluation's."""
    lines = map(json.loads, (run.directory / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line.get("loss"), line.get("val_loss")) for line in lines]
