import hashlib
import json
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from casallm.config import canonical_json
from casallm.data.manifest import read_manifest
from casallm.errors import DataError


def rewrite(directory, change):
    """Applies `change` to the manifest's tree and seals it with a hash that fits."""
    path = directory / "manifest.json"
    tree = json.loads(path.read_bytes())
    del tree["manifest_sha256"]
    change(tree)
    sealed = tree | {"manifest_sha256": hashlib.sha256(canonical_json(tree).encode()).hexdigest()}
    path.write_text(json.dumps(sealed), encoding="utf-8")


def test_the_manifest_says_what_the_format_promises(prepared, texts):
    tree = json.loads((prepared.directory / "manifest.json").read_bytes())

    assert tree["format"] == "casallm-shards"
    assert tree["version"] == 1
    assert tree["dtype"] == "uint16"
    assert sorted(tree["tokenizer"]) == ["bos_id", "fingerprint", "name", "vocab_size"]
    assert sorted(tree["splits"]) == ["train", "val"]
    assert sum(split["documents"] for split in tree["splits"].values()) == len(texts)
    n_bytes = sum(len(text.encode()) for text in texts)
    assert sum(split["bytes_of_text"] for split in tree["splits"].values()) == n_bytes
    sealed = tree.pop("manifest_sha256")
    assert sealed == hashlib.sha256(canonical_json(tree).encode()).hexdigest()


def test_what_was_written_is_read_back(shard_dir):
    manifest = read_manifest(shard_dir)

    (shard_dir / "manifest.json").write_bytes(manifest.to_bytes())

    assert read_manifest(shard_dir) == manifest


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_changed_byte_of_the_manifest_goes_unnoticed(prepared, tmp_path, data):
    raw = (prepared.directory / "manifest.json").read_bytes()
    at = data.draw(st.integers(0, len(raw) - 1))
    bit = data.draw(st.integers(0, 7))
    damaged = raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :]
    (tmp_path / "manifest.json").write_bytes(damaged)

    try:
        found = read_manifest(tmp_path)
    except DataError:
        return
    assert found == read_manifest(prepared.directory)  # only white space changed


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_torn_manifest_is_refused(shard_dir, share):
    path = shard_dir / "manifest.json"
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * share)])

    with pytest.raises(DataError, match=r"manifest\.json was cut or changed"):
        read_manifest(shard_dir)


@pytest.mark.parametrize(
    "name",
    [
        "../train-f0-00000.npy",
        "/etc/passwd",
        "train-f0/../../x-00000.npy",
        "train-f0-00000.npy\n",
        "test-f0-00000.npy",
        "train-\u0430-00000.npy",
        "",
    ],
)
def test_a_name_that_is_no_shards_name_is_refused_though_the_hash_fits(shard_dir, name):
    rewrite(shard_dir, lambda tree: tree["splits"]["train"]["shards"][0].update(name=name))

    with pytest.raises(DataError, match="name"):
        read_manifest(shard_dir)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t["splits"]["train"].update(tokens=7), "tokens of train"),
        (lambda t: t["splits"]["train"]["shards"][0].update(bytes=10**12), "bytes of train-"),
        (lambda t: t["splits"]["train"]["shards"][0].update(tokens=-1), "tokens"),
        (lambda t: t["splits"]["val"]["shards"].extend(t["splits"]["train"]["shards"]), "twice"),
        (lambda t: t["splits"].pop("val"), "not train and val"),
        (lambda t: t["tokenizer"].update(vocab_size=70_000), "uint16"),
        (lambda t: t.update(extra=1), "extra"),
    ],
)
def test_numbers_that_do_not_agree_are_refused_though_the_hash_fits(shard_dir, change, says):
    rewrite(shard_dir, change)

    with pytest.raises(DataError, match=says):
        read_manifest(shard_dir)


def test_another_version_is_named(shard_dir):
    rewrite(shard_dir, lambda tree: tree.update(version=2))

    with pytest.raises(DataError) as caught:
        read_manifest(shard_dir)

    assert str(caught.value) == (
        f"{shard_dir}/manifest.json is 'casallm-shards' version 2, not 'casallm-shards' version 1:"
        " read it with the program that wrote it, or prepare the data again"
    )


def test_a_directory_without_a_manifest_is_no_data_set(shard_dir):
    shutil.rmtree(shard_dir)

    with pytest.raises(DataError, match="there is no data set in"):
        read_manifest(shard_dir)
