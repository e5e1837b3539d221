import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casallm.data import shards
from casallm.data.shards import (
    ShardWriter,
    header,
    is_dataset,
    open_dataset,
    verify_dataset,
)
from casallm.data.summary import documents_in
from casallm.errors import DataError

IDS = st.lists(st.lists(st.integers(0, 65_535), min_size=1, max_size=20), min_size=1, max_size=20)


def a_shard(directory):
    return sorted(directory.glob("train-*.npy"))[0]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, "<u2"), (65_537, "<u4")])
def test_a_shard_is_byte_for_byte_what_the_specification_says(tmp_path, vocab_size, dtype):
    writer = ShardWriter(tmp_path, "train", "f0p0", vocab_size=vocab_size, bos_id=5)
    writer.append(np.array([5, 65_535, 258], np.uint32))

    (record,) = writer.finish()

    raw = (tmp_path / "train-f0p0-00000.npy").read_bytes()
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': (3,), }}".encode()
    assert raw[:10] == b"\x93NUMPY\x01\x00\x76\x00"
    assert raw[10:128] == text + b" " * (117 - len(text)) + b"\n"
    width = int(dtype[-1])
    assert raw[128:] == b"".join(i.to_bytes(width, "little") for i in (5, 65_535, 258))
    assert record.bytes == len(raw)


@given(n=st.integers(0, 10**12))
def test_numpy_reads_the_header(n):
    raw = header(n, np.dtype("<u4"))

    assert len(raw) == 128
    fields = eval(raw[10:], {})  # a literal, made by the line above
    assert fields == {"descr": "<u4", "fortran_order": False, "shape": (n,)}


@settings(max_examples=20)
@given(documents=IDS)
def test_what_is_written_is_read_back_by_numpy(tmp_path_factory, documents):
    directory = tmp_path_factory.mktemp("shards")
    writer = ShardWriter(directory, "val", "f0", vocab_size=65_536, bos_id=7)
    for document in documents:
        writer.append(np.array(document, np.uint32))

    (record,) = writer.finish()

    loaded = np.load(directory / record.name, mmap_mode="r")
    assert loaded.tolist() == [id_ for document in documents for id_ in document]
    assert [path.name for path in directory.iterdir()] == [record.name]


@pytest.mark.parametrize("at_a_time", [1, 2, 3, 5])
def test_a_long_unit_fills_several_shards_and_cuts_no_document(tmp_path, monkeypatch, at_a_time):
    monkeypatch.setattr(shards, "SHARD_TOKENS", 10)
    documents = [[0, *[i] * (n - 1)] for i, n in enumerate((4, 4, 4, 25, 3), 1)]
    writer = ShardWriter(tmp_path, "train", "f0", vocab_size=400, bos_id=0)
    for start in range(0, 5, at_a_time):
        writer.append(np.concatenate(documents[start : start + at_a_time]).astype(np.uint32))

    records = writer.finish()

    assert [record.name for record in records] == [f"train-f0-0000{i}.npy" for i in range(3)]
    loaded = [np.load(tmp_path / record.name).tolist() for record in records]
    assert loaded == [documents[0] + documents[1] + documents[2], documents[3], documents[4]]


@settings(max_examples=30)
@given(st.lists(st.integers(1, 30), min_size=1), st.integers(1, 40), st.integers(1, 9))
def test_where_shards_end_does_not_depend_on_the_batches(lengths, shard_tokens, at_a_time):
    documents = [[0] + [1] * (n - 1) for n in lengths]
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(shards, "SHARD_TOKENS", shard_tokens)
        writer = ShardWriter(Path(folder), "train", "f0", vocab_size=400, bos_id=0)
        for start in range(0, len(documents), at_a_time):
            writer.append(np.concatenate(documents[start : start + at_a_time]).astype(np.uint32))
        found = [record.tokens for record in writer.finish()]

    expected, size = [], 0
    for n in lengths:
        size += n
        if size >= shard_tokens:
            expected.append(size)
            size = 0
    assert found == [*expected, size] if size else found == expected


def test_a_discarded_shard_leaves_nothing(tmp_path):
    writer = ShardWriter(tmp_path, "train", "f0", vocab_size=400, bos_id=0)
    writer.append(np.array([1], np.uint32))

    writer.discard()

    assert list(tmp_path.iterdir()) == []


def test_documents_come_back_in_order(prepared, texts):
    tokenizer = prepared.tokenizer()

    found = {split: list(documents_in(prepared, split)) for split in ("train", "val")}

    decoded = [tokenizer.decode(ids.tolist()) for ids in (*found["train"], *found["val"])]
    assert sorted(decoded) == sorted(texts)
    assert {int(ids[0]) for ids in found["train"]} == {tokenizer.bos_id}
    in_train = {tokenizer.decode(ids.tolist()) for ids in found["train"]}
    assert [tokenizer.decode(ids.tolist()) for ids in found["train"]] == [
        text for text in texts if text in in_train
    ]


def test_a_sound_dataset_opens_and_verifies(shard_dir):
    assert is_dataset(shard_dir)
    assert open_dataset(shard_dir).manifest == open_dataset(shard_dir).manifest
    assert verify_dataset(shard_dir) == []


def test_any_flipped_bit_of_a_small_dataset_is_found_when_it_is_opened(shard_dir):
    path = a_shard(shard_dir)
    raw = path.read_bytes()
    for at in (0, 9, 60, 127, 128, 1000, len(raw) - 1):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :])
        with pytest.raises(DataError, match=f"{path.name} was cut or changed"):
            open_dataset(shard_dir)


def test_a_cut_shard_is_one_sentence(shard_dir):
    path = a_shard(shard_dir)
    size = path.stat().st_size
    os.truncate(path, size - 1)

    with pytest.raises(DataError) as caught:
        open_dataset(shard_dir)

    assert str(caught.value) == (
        f"{path} was cut or changed ({size - 1:,} bytes, not the {size:,} of its manifest): fetch"
        " it again or prepare the data again"
    )


def test_a_missing_shard_is_named(shard_dir):
    path = a_shard(shard_dir)
    path.unlink()

    with pytest.raises(DataError, match=f"{path.name} is missing"):
        open_dataset(shard_dir)


def test_a_large_dataset_is_opened_by_size_and_header_and_verified_by_hash(shard_dir, monkeypatch):
    monkeypatch.setattr(shards, "HASH_AT_OPEN_BYTES", 100)
    path = a_shard(shard_dir)
    raw = bytearray(path.read_bytes())
    raw[-2] ^= 1
    path.write_bytes(raw)

    open_dataset(shard_dir)
    problems = verify_dataset(shard_dir)

    assert len(problems) == 1
    assert f"{path} was cut or changed (its sha256" in problems[0]


def test_two_shards_that_changed_places_are_found(shard_dir):
    train, val = a_shard(shard_dir), sorted(shard_dir.glob("val-*.npy"))[0]
    train.rename(shard_dir / "x")
    val.rename(train)
    (shard_dir / "x").rename(val)

    assert len(verify_dataset(shard_dir)) == 2


def test_another_vocabulary_beside_the_shards_is_refused(shard_dir):
    path = shard_dir / "tokenizer" / "tokenizer.json"
    tree = json.loads(path.read_bytes())
    tree["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\s+|\S+"
    path.write_text(json.dumps(tree), encoding="utf-8")

    with pytest.raises(DataError, match="not the vocabulary that made the shards"):
        open_dataset(shard_dir).tokenizer()
    assert "not the vocabulary" in verify_dataset(shard_dir)[0]


def test_a_model_of_another_vocabulary_is_told_what_to_do(prepared):
    prepared.require_vocab_size(400)

    with pytest.raises(DataError) as caught:
        prepared.require_vocab_size(40_960)

    assert str(caught.value) == (
        f"model.vocab_size is 40960 but the shards in {prepared.directory} were made with 400:"
        " train with model.vocab_size=400, or prepare them again with --tokenizer"
    )


def test_windows_are_counted_with_one_token_to_spare(prepared):
    tokens = prepared.splits["train"].shards[0].tokens

    assert prepared.window_counts("train", tokens) == [0]
    assert prepared.window_counts("train", tokens - 1) == [1]
    assert prepared.window_counts("train", 10) == [(tokens - 1) // 10]
