"""Batches from shards: speed with a warm cache, and how long the first one takes, at any size.

    python benchmarks/loading.py [--seconds 10]

The speed is that of one process which does nothing else, over shards whose pages are in memory.
The first batch is timed from opening the set, imports done; its shards are sparse files, so that a
set of a thousand billion tokens needs no disk. A shard costs some microseconds (its size and header
are looked at), a window nothing. CPU-seconds are told too: other work does not enter them.
"""

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from casallm.data.loader import PretrainLoader
from casallm.data.manifest import HEADER_BYTES, Manifest, ShardRecord, SplitRecord, TokenizerRecord
from casallm.data.shards import header, open_dataset

CONTEXT = 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=10.0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        speed(make_set(Path(folder) / "warm", 8, 20_000_000, is_sparse=False), asked.seconds)
        start_up(Path(folder))


def speed(directory: Path, seconds: float) -> None:
    """Tokens a second, after one pass that brings the pages into memory."""
    for context in (1024, 2048):
        loader = open_loader(directory, context, global_batch_size=512)
        for path in directory.glob("*.npy"):
            path.read_bytes()
        rates = []
        step, stop = 0, time.perf_counter() + seconds
        while time.perf_counter() < stop:
            begin, used = time.perf_counter(), time.process_time()
            tokens = sum(batch.inputs_BT.numel() for batch in loader.batches(step))
            passed = time.perf_counter() - begin
            rates.append((tokens / passed, tokens / (time.process_time() - used)))
            step += 1
        loader.close()
        wall, cpu = (statistics.median(rate[i] for rate in rates) / 1e6 for i in (0, 1))
        print(f"context {context}: {wall:.0f}M tokens/s, {cpu:.0f}M tokens/CPU-s, {step} steps")


def start_up(folder: Path) -> None:
    """What the first batch costs of sets of a million to a billion windows, 5 times each."""
    sets = [(n_windows, 100) for n_windows in (10**6, 10**7, 10**8, 10**9)]
    for n_windows, n_shards in [*sets, (10**9, 10_240)]:
        shard_tokens = n_windows * CONTEXT // n_shards + 1
        directory = make_set(folder / f"{n_windows}-{n_shards}", n_shards, shard_tokens)
        told = [first_batch(directory) for _ in range(5)]
        wall, cpu = (statistics.median(each[i] for each in told) for i in (0, 1))
        tokens = n_shards * shard_tokens / 1e9
        print(
            f"{n_windows:.0e} windows, {tokens:,.1f}B tokens in {n_shards:,} shards: first batch"
            f" after {wall:.3f} s, {cpu:.3f} CPU-s"
        )


def first_batch(directory: Path) -> tuple[float, float]:
    """Seconds, and those of the processor, from opening the set to its first batch."""
    begin, used = time.perf_counter(), time.process_time()
    loader = open_loader(directory, CONTEXT, global_batch_size=512)
    next(loader.batches(1234))
    answer = time.perf_counter() - begin, time.process_time() - used
    loader.close()
    return answer


def open_loader(directory: Path, context: int, *, global_batch_size: int) -> PretrainLoader:
    return PretrainLoader(
        open_dataset(directory),
        context_length=context,
        global_batch_size=global_batch_size,
        micro_batch_size=32,
        rank=0,
        world_size=1,
        seed=1,
        device=torch.device("cpu"),
    )


def make_set(directory: Path, n_shards: int, shard_tokens: int, *, is_sparse: bool = True) -> Path:
    """A data set of equal shards and a small held-out one; of zeros on no disk, or of noise."""
    directory.mkdir()
    dtype = np.dtype("<u2")
    rng = np.random.default_rng(0)
    records = {"train": [], "val": []}
    for split, count, length in (("train", n_shards, shard_tokens), ("val", 1, 1_000_000)):
        for number in range(count):
            path = directory / f"{split}-f00000p0000-{number:05d}.npy"
            size = HEADER_BYTES + 2 * length
            with path.open("wb") as file:
                file.write(header(length, dtype))
                if not is_sparse:
                    file.write(rng.integers(0, 50_000, length, dtype=np.uint16).tobytes())
            os.truncate(path, size)
            content = str(path).encode() if is_sparse else path.read_bytes()
            sha256 = hashlib.sha256(content).hexdigest()
            shard = ShardRecord(name=path.name, tokens=length, bytes=size, sha256=sha256)
            records[split].append(shard)
    splits = {
        split: SplitRecord(
            tokens=sum(shard.tokens for shard in shards),
            documents=1,
            bytes_of_text=1,
            shards=tuple(shards),
        )
        for split, shards in records.items()
    }
    manifest = Manifest(
        tokenizer=TokenizerRecord(name="x", fingerprint="0" * 64, vocab_size=50_263, bos_id=50_257),
        dtype="uint16",
        source={"name": "sparse"},
        splits=splits,
    )
    (directory / "manifest.json").write_bytes(manifest.to_bytes())
    return directory


if __name__ == "__main__":
    main()
