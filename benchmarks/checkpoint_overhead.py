"""What a checkpoint of 100M parameters costs training: the stall, and the slowdown behind it.

    python benchmarks/checkpoint_overhead.py [--params 100M] [--out result.json]

The state is 12 bytes a parameter: weights and two moments in fp32. The stall is compared with one
copy of the state in memory; bar 1.5. The slowdown is that of matrix products on all cores but one
while a checkpoint is written to the local disk, and while it is also read, hashed and sent into an
uplink of 200 MB/s (a stand-in that discards: a server would take from the same cores); bar 5 %. One
core is left free, as a GPU machine leaves many: where training takes them all, writing gives way.
"""

import argparse
import hashlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from casallm.errors import StoreExistsError, StoreNotFoundError
from casallm.storage.bucket import PART_BYTES, Source, Stat, ranges
from casallm.storage.entry import Entry
from casallm.storage.local import LocalStore
from casallm.storage.remote import RemoteStore
from casallm.storage.store import Store
from casallm.train.checkpoint import CheckpointConfig, TrainState
from casallm.train.checkpoint_writer import CheckpointWriter
from casallm.train.journal import AttemptLog
from casallm.train.resume import start_attempt
from casallm.units import format_bytes, parse_count

N_TENSORS = 50
SAVES = 5
UPLINK_BYTES_PER_SECOND = 200e6


def main() -> None:
    options = _parse()
    torch.set_num_threads(max(1, (os.cpu_count() or 2) - 1))
    state = make_state(parse_count(options.params))
    n_bytes = sum(tensor.nbytes for tensor in state.values())
    print(f"state {format_bytes(n_bytes)}, {torch.get_num_threads()} threads")
    result: dict[str, Any] = {"bytes": n_bytes, "threads": torch.get_num_threads()}
    result["copy_seconds"] = statistics.median(copy_seconds(state) for _ in range(SAVES))
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        stores: dict[str, Store] = {
            "local": LocalStore(Path(directory, "run")),
            "uplink": RemoteStore(Uplink(), "run/"),
        }
        for name, store in stores.items():
            result[name] = measure(store, Path(directory), state)
            stalls = result[name]["stall_seconds"]
            result[name]["stall_over_copy"] = statistics.median(stalls) / result["copy_seconds"]
    print(json.dumps(result, indent=2))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


def make_state(params: int) -> dict[str, torch.Tensor]:
    """Weights and two moments of `params` parameters, in tensors of equal size."""
    size = params // N_TENSORS
    return {
        f"{index}.{kind}": torch.randn(size)
        for index in range(N_TENSORS)
        for kind in ("weight", "exp_avg", "exp_avg_sq")
    }


def copy_seconds(state: dict[str, torch.Tensor]) -> float:
    """The time of one copy of the state into memory that is there already."""
    targets = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    begin = time.perf_counter()
    for name, tensor in state.items():
        targets[name].copy_(tensor)
    return time.perf_counter() - begin


def measure(run: Store, directory: Path, state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Stalls of saves, and the time of a step of work with and without a save behind it."""
    attempt, _ = start_attempt(run, directory)
    writer = CheckpointWriter(
        run,
        attempt,
        AttemptLog(run, attempt, publish_every_seconds=None),
        config=CheckpointConfig(),
        identity_sha256="0" * 64,
        world_size=1,
        start=None,
        scratch=directory,
    )
    weights = {name: tensor for name, tensor in state.items() if name.endswith("weight")}
    moments = {name: tensor for name, tensor in state.items() if "exp_avg" in name}
    stalls, stores, calm, busy = [], [], [], []
    for save in range(1, SAVES + 1):
        calm += [work_seconds() for _ in range(20)]
        begin = time.perf_counter()
        writer.save(TrainState(step=save), weights, moments)
        stalls.append(time.perf_counter() - begin)
        while writer.is_busy:
            busy.append(work_seconds())
        writer.wait()
        stores.append(time.perf_counter() - begin)
    writer.close()
    return {
        "first_stall_seconds": stalls[0],
        "stall_seconds": stalls[1:],
        "upload_seconds": statistics.median(stores),
        "slowdown": statistics.mean(busy) / statistics.mean(calm) - 1,
    }


_LEFT, _RIGHT = torch.randn(1024, 1024), torch.randn(1024, 1024)


def work_seconds() -> float:
    """The time of some matrix products: the training."""
    begin = time.perf_counter()
    for _ in range(5):
        torch.mm(_LEFT, _RIGHT)
    return time.perf_counter() - begin


class Uplink:
    """A bucket at the end of a line of 200 MB/s, which forgets what is large."""

    url = "uplink://bucket"

    def __init__(self) -> None:
        self._objects: dict[str, bytes] = {}

    def stat(self, key: str) -> Stat:
        if key not in self._objects:
            raise StoreNotFoundError(key)
        return Stat(len(self._objects[key]), hashlib.md5(self._objects[key]).hexdigest())

    def fetch(self, key: str, begin: int, end: int) -> bytes:
        return self._objects[key][begin:end]

    def upload(self, key: str, source: Source) -> bool:
        for begin, end in ranges(source.n_bytes, PART_BYTES):
            started = time.perf_counter()
            hashlib.md5(source.read(begin, end)).hexdigest()
            due = (end - begin) / UPLINK_BYTES_PER_SECOND
            time.sleep(max(0.0, due - (time.perf_counter() - started)))
        self._objects[key] = source.read(0, source.n_bytes) if source.n_bytes < 1 << 20 else b""
        return True

    def create(self, key: str, data: bytes) -> bool:
        if key in self._objects:
            raise StoreExistsError(key)
        return self.upload(key, Source.of_bytes(data))

    def scan(self, prefix: str) -> list[Entry]:
        return [Entry(k, len(d)) for k, d in self._objects.items() if k.startswith(prefix)]

    def remove(self, key: str) -> None:
        self._objects.pop(key, None)

    def discard_unfinished(self, prefix: str, is_stale: Callable[[str], bool]) -> int:
        return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The stall and the slowdown of a checkpoint.")
    parser.add_argument("--params", default="100M", help="parameters (default: 100M)")
    parser.add_argument("--directory", type=Path, help="where to write (default: the system's)")
    parser.add_argument("--out", type=Path, help="a file for the result, as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
