"""Tensors in safetensors files, streamed: written, read and hashed without a second copy.

The format is that of the safetensors library (8 bytes of header length, little-endian; a JSON
header; the tensors' bytes): either program reads the other's files. What is added here: pieces
come and go one tensor at a time, files are hashed on the way, and nothing that a header claims is
believed before it has been checked against the size of the file.
"""

import contextlib
import hashlib
import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from casallm.config import canonical_json
from casallm.errors import CheckpointError
from casallm.storage.entry import CHUNK_BYTES

MAX_HEADER_BYTES = 16 << 20
"""A header holds about a hundred bytes a tensor; more than this is refused unread."""

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies in a file: `begin` and `end` count from the file's first byte."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def encode(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The pieces of a safetensors file of CPU `tensors`; views of them, no copies."""
    order = _order(tensors)
    yield _header(tensors, order)
    for name in order:
        yield raw_bytes(tensors[name])


def encoded_bytes(tensors: Mapping[str, Tensor]) -> int:
    """How many bytes `encode` will yield."""
    return len(_header(tensors, _order(tensors))) + sum(t.nbytes for t in tensors.values())


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    assert tensor.is_contiguous(), "staged tensors are contiguous"
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def read_header(path: Path) -> dict[str, Slot]:
    """Where each tensor of the file lies; CheckpointError if the file cannot be as it claims."""
    with _opened(path) as file:
        return _read_header(file, path)[0]


def copy_tensors(path: Path, targets: Mapping[str, Tensor], *, sha256: str) -> set[str]:
    """Read the file into `targets` of the same names, shapes and types; the names that were read.

    Never holds more than one tensor besides the targets. CheckpointError, after the targets have
    been written to, if the bytes read are not those of `sha256`.
    """
    names = set()
    for name, tensor in _stream(path, sha256, targets):
        names.add(name)
        if tensor is not targets[name]:
            with torch.no_grad():
                targets[name].copy_(tensor)
    return names


def read_tensors(path: Path, *, sha256: str) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of the file, one at a time; CheckpointError at the end if the hash is wrong."""
    return _stream(path, sha256, None)


def weights_sha256(tensors: Mapping[str, Tensor]) -> str:
    """One hash over name, type, shape and bytes of every tensor, in name order.

    Tensors that are one (tied) count once, under the first of their names.
    """
    hasher = hashlib.sha256()
    for name, tensor in sorted(untied(tensors).items()):
        _hash_label(hasher, name, tensor.dtype, tuple(tensor.shape))
        hasher.update(raw_bytes(tensor.detach().cpu().contiguous()))
    return hasher.hexdigest()


def weights_sha256_of_files(paths: Sequence[Path]) -> str:
    """`weights_sha256` of the tensors in these files, read in small pieces."""
    slots = [(name, path, slot) for path in paths for name, slot in read_header(path).items()]
    hasher = hashlib.sha256()
    for name, path, slot in sorted(slots, key=lambda item: item[0]):
        _hash_label(hasher, name, slot.dtype, slot.shape)
        with _opened(path) as file:
            file.seek(slot.begin)
            remaining = slot.end - slot.begin
            while piece := file.read(min(CHUNK_BYTES, remaining)):
                hasher.update(piece)
                remaining -= len(piece)
    return hasher.hexdigest()


def untied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` without those that are the same memory as one of an earlier name."""
    kept: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in sorted(tensors.items()):
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() == 0 or place not in seen:
            kept[name] = tensor
        seen.add(place)
    return kept


def partition(tensors: Mapping[str, Tensor], limit_bytes: int) -> list[dict[str, Tensor]]:
    """`tensors` in name order, cut into groups of at most `limit_bytes` (or one tensor)."""
    groups: list[dict[str, Tensor]] = []
    size = limit_bytes
    for name, tensor in sorted(tensors.items()):
        if size + tensor.nbytes > limit_bytes or not groups:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += tensor.nbytes
    return groups


def _stream(
    path: Path, sha256: str, targets: Mapping[str, Tensor] | None
) -> Iterator[tuple[str, Tensor]]:
    """Read a file front to back, into the targets themselves where their memory allows it."""
    with _opened(path) as file:
        slots, header = _read_header(file, path)
        if targets is not None:
            _check_targets(path, slots, targets)
        hasher = hashlib.sha256(header)
        for name, slot in sorted(slots.items(), key=lambda item: (item[1].begin, item[1].end)):
            tensor = _destination(slot, targets[name] if targets is not None else None)
            view = raw_bytes(tensor)
            if len(view) and file.readinto(view) != len(view):
                raise CheckpointError(f"{path} ended in the middle of {name}: it was cut just now")
            hasher.update(view)
            yield name, tensor
    if hasher.hexdigest() != sha256:
        raise CheckpointError(
            f"{path} changed after it was checked (sha256 {hasher.hexdigest()[:12]}… instead of"
            f" {sha256[:12]}…): check the drive, then start again"
        )


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read any more ({error.strerror}): was the run started again, or"
            " removed? Run the same command again"
        ) from None


def _destination(slot: Slot, target: Tensor | None) -> Tensor:
    if target is not None and target.device.type == "cpu" and target.is_contiguous():
        return target
    return torch.empty(slot.shape, dtype=slot.dtype)


def _check_targets(path: Path, slots: Mapping[str, Slot], targets: Mapping[str, Tensor]) -> None:
    for name, slot in slots.items():
        target = targets.get(name)
        if target is None:
            raise CheckpointError(
                f"{path} holds {name}, which this model or optimizer does not have: the run was"
                " made with other settings"
            )
        if (target.dtype, tuple(target.shape)) != (slot.dtype, slot.shape):
            raise CheckpointError(
                f"{name} is {_CODES[slot.dtype]} {list(slot.shape)} in {path}, but"
                f" {_CODES.get(target.dtype, target.dtype)} {list(target.shape)} here: the run was"
                " made with other settings"
            )


def _hash_label(hasher: Any, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    hasher.update(canonical_json([name, _CODES[dtype], list(shape)]).encode() + b"\n")


def _order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Widest types first, so that every tensor is aligned; then by name."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def _header(tensors: Mapping[str, Tensor], order: Sequence[str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name in order:
        tensor = tensors[name]
        end = begin + tensor.nbytes
        header[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _read_header(file: BufferedReader, path: Path) -> tuple[dict[str, Slot], bytes]:
    """The slots and the header's own bytes, every claim checked against the file's size."""
    size = path.stat().st_size
    prefix = file.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise _refused(path, f"it claims a header of {length:,} bytes and has {size:,}")
    text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        slots = {name: _parse_slot(item, 8 + length) for name, item in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _refused(path, f"its header is malformed ({error})") from None
    _check_layout(path, slots, 8 + length, size)
    return slots, prefix + text


def _parse_slot(item: Mapping[str, Any], base: int) -> Slot:
    dtype = _DTYPES[item["dtype"]]
    shape, (begin, end) = item["shape"], item["data_offsets"]
    if not isinstance(shape, list) or len(shape) > 8:
        raise ValueError("a shape is no short list")
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError("a shape or an offset is no whole number")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"shape {shape} does not fill bytes {begin} to {end}")
    return Slot(dtype, tuple(shape), base + begin, base + end)


def _check_layout(path: Path, slots: Mapping[str, Slot], begin: int, size: int) -> None:
    """The tensors must fill the file: no gap, no overlap, nothing behind the last."""
    for slot in sorted(slots.values(), key=lambda slot: (slot.begin, slot.end)):
        if slot.begin != begin:
            raise _refused(path, f"its tensors leave a gap or overlap at byte {begin:,}")
        begin = slot.end
    if begin != size:
        raise _refused(path, f"its header describes {begin:,} bytes and it has {size:,}")


def _refused(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} is no whole safetensors file: {reason}")
