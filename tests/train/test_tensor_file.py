import hashlib
import json
import struct
import tracemalloc
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from casallm.errors import CheckpointError
from casallm.train.tensor_file import (
    copy_tensors,
    encode,
    encoded_bytes,
    partition,
    read_header,
    read_tensors,
    untied,
    weights_sha256,
    weights_sha256_of_files,
)

TENSORS = {
    "b": torch.randn(3, 5),
    "a": torch.tensor(1.5, dtype=torch.float64),
    "c": torch.randn(7).bfloat16(),
    "empty": torch.zeros(0, 4),
    "flags": torch.tensor([True, False, True]),
    "ids": torch.arange(4),
}


def save(path: Path, tensors: dict[str, torch.Tensor]) -> str:
    data = b"".join(encode(tensors))
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def write_raw(path: Path, header: object, payload: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + payload)
    return path


def test_the_safetensors_library_reads_what_is_written(tmp_path: Path):
    save(tmp_path / "x", TENSORS)

    loaded = safetensors.torch.load_file(tmp_path / "x")

    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())


def test_what_the_safetensors_library_writes_is_read(tmp_path: Path):
    safetensors.torch.save_file(TENSORS, tmp_path / "x")
    sha256 = hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest()

    loaded = dict(read_tensors(tmp_path / "x", sha256=sha256))

    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())


def test_the_size_is_known_before_writing(tmp_path: Path):
    save(tmp_path / "x", TENSORS)

    assert encoded_bytes(TENSORS) == (tmp_path / "x").stat().st_size


def test_tensors_are_read_into_their_places(tmp_path: Path):
    sha256 = save(tmp_path / "x", TENSORS)
    targets = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    targets["b"] = torch.zeros(5, 3).T
    places = {name: tensor.data_ptr() for name, tensor in targets.items()}
    targets["c"].requires_grad_()

    names = copy_tensors(tmp_path / "x", targets, sha256=sha256)

    assert names == TENSORS.keys()
    assert all(torch.equal(targets[name], tensor) for name, tensor in TENSORS.items())
    assert {name: tensor.data_ptr() for name, tensor in targets.items()} == places


def test_a_file_that_changed_since_it_was_checked_is_noticed(tmp_path: Path):
    save(tmp_path / "x", TENSORS)

    with pytest.raises(CheckpointError, match="changed after it was checked"):
        list(read_tensors(tmp_path / "x", sha256="0" * 64))


def test_another_shape_type_or_name_is_refused_before_anything_is_read(tmp_path: Path):
    sha256 = save(tmp_path / "x", {"w": torch.ones(2, 3)})

    for targets, message in (
        ({"w": torch.zeros(3, 2)}, r"w is F32 \[2, 3\] in .*/x, but F32 \[3, 2\] here"),
        ({"w": torch.zeros(2, 3).half()}, r"but F16 \[2, 3\] here"),
        ({"v": torch.zeros(2, 3)}, "holds w, which this model or optimizer does not have"),
    ):
        with pytest.raises(CheckpointError, match=message):
            copy_tensors(tmp_path / "x", targets, sha256=sha256)
        assert all(not tensor.any() for tensor in targets.values())


def test_the_hash_of_weights_ignores_files_and_ties_but_nothing_else(tmp_path: Path):
    tensors = {"b": torch.randn(3, 5), "a": torch.randn(2), "z": torch.randn(4).bfloat16()}
    expected = weights_sha256(tensors)
    save(tmp_path / "1", {"b": tensors["b"], "z": tensors["z"]})
    save(tmp_path / "2", {"a": tensors["a"]})

    assert weights_sha256_of_files([tmp_path / "1", tmp_path / "2"]) == expected
    assert weights_sha256({**tensors, "tied": tensors["a"]}) == expected
    assert weights_sha256({**tensors, "b": tensors["b"].T.contiguous().T}) == expected
    changed = (
        {**tensors, "b": tensors["b"].reshape(5, 3)},
        {**tensors, "a": -tensors["a"]},
        {**tensors, "z": tensors["z"].view(torch.float16)},
        {**tensors, "c": tensors["a"].clone()},
    )
    assert expected not in {weights_sha256(each) for each in changed}


def test_tied_tensors_are_kept_once_and_views_are_not_tied():
    weight = torch.randn(4, 4)

    kept = untied({"b": weight, "a": weight, "view": weight[:2], "t": weight.T})

    assert sorted(kept) == ["a", "t", "view"]


@given(st.lists(st.integers(0, 40), max_size=8), st.integers(1, 200))
def test_partitions_keep_order_and_limit(sizes: list[int], limit: int):
    tensors = {f"{k}": torch.zeros(size, dtype=torch.uint8) for k, size in enumerate(sizes)}

    groups = partition(tensors, limit)

    assert [name for group in groups for name in group] == sorted(tensors)
    for group in groups:
        assert sum(t.nbytes for t in group.values()) <= limit or len(group) == 1


GOOD = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


@pytest.mark.parametrize(
    ("header", "payload"),
    [
        ({"w": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}, bytes(8)),
        ({"w": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 8]}}, bytes(8)),
        ({"w": {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]}}, bytes(8)),
        ({"w": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}, bytes(8)),
        ({"w": {"dtype": "F32", "shape": [1] * 9 + [2], "data_offsets": [0, 8]}}, bytes(8)),
        ({"w": {"dtype": "PICKLE", "shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
        ({"w": {"dtype": "F32", "shape": [2]}}, bytes(8)),
        ({"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, bytes(8)),
        ({**GOOD, "v": GOOD["w"]}, bytes(8)),
        (GOOD, bytes(9)),
        (GOOD, bytes(7)),
        ({"w": 3}, bytes(8)),
        ([], bytes(8)),
        (b"{", bytes(8)),
        (b"[" * 100_000, bytes(8)),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: object, payload: bytes):
    path = write_raw(tmp_path / "x", header, payload)

    with pytest.raises(CheckpointError, match="is no whole safetensors file"):
        read_header(path)


@pytest.mark.parametrize("length", [10**12, 2**64 - 1, 17 << 20, 200])
def test_a_header_that_claims_too_much_is_refused_before_allocation(tmp_path: Path, length: int):
    path = write_raw(tmp_path / "x", b"{}", length=length)
    tracemalloc.start()

    with pytest.raises(CheckpointError, match=r"claims a header of .* bytes and has 10"):
        read_header(path)

    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_pickle_is_no_tensor_file(tmp_path: Path):
    torch.save({"w": torch.zeros(2)}, tmp_path / "x")

    with pytest.raises(CheckpointError, match="is no whole safetensors file"):
        read_header(tmp_path / "x")


@settings(max_examples=50, deadline=None)
@given(data=st.binary(max_size=80))
def test_arbitrary_bytes_are_refused_or_a_consistent_file(tmp_path_factory, data: bytes):
    path = tmp_path_factory.mktemp("x") / "x"
    path.write_bytes(data)

    try:
        slots = read_header(path)
    except CheckpointError:
        return
    assert all(slot.end <= len(data) for slot in slots.values())
