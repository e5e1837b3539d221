"""Documents to ids, three ways on the same parquet files, cores and vocabulary, taking turns.

    python benchmarks/tokenizing.py [--rounds 5] [--copies 2] [--out results.json]

* casallm: `casallm prepare`, end to end: parquet to hashed shards and manifest on disk, its worker
  processes started and ended.
* tiktoken: `encode_ordinary_batch` of all texts, which are in memory already, and nothing else.
* datasets: the usual script: load_dataset of parquet, map with a process a core, ids into a memmap.

Each round takes all three, in turns of order; ratios are of the same round, and medians are told.
CPU-seconds are told beside the time on the wall: other work on the machine does not enter them.

Before, casallm and tiktoken take turns row group by row group in this process, on one thread each:
what a megabyte costs, without starting programs and saving vocabularies.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import tiktoken

from casallm.data.destination import destination_at
from casallm.data.documents import Piece
from casallm.data.prepare import count_cores
from casallm.data.sources import Unit
from casallm.data.tokenizer import named_tokenizer
from casallm.data.unit import Job, prepare_unit

SHARED = Path(os.environ.get("CASALLM_SHARED_DATA", "../shared/data"))

CASALLM = """
import sys
from pathlib import Path
from casallm.data.prepare import prepare
from casallm.data.sources import open_source
from casallm.data.tokenizer import named_tokenizer
if __name__ == "__main__":
    prepare(
        open_source(sys.argv[1]), Path(sys.argv[2]), tokenizer=named_tokenizer("gpt2"), vocab_size=0
    )
"""

DATASETS = """
import sys
import numpy as np
import tiktoken
from datasets import load_dataset
encoding = tiktoken.get_encoding("gpt2")
def tokenize(row):
    ids = encoding.encode_ordinary(row["text"])
    ids.append(encoding.eot_token)
    return {"ids": ids, "len": len(ids)}
if __name__ == "__main__":
    rows = load_dataset("parquet", data_files=sys.argv[1] + "/*.parquet", split="train",
                        cache_dir=sys.argv[2] + "/cache")
    done = rows.map(tokenize, remove_columns=rows.column_names, num_proc=int(sys.argv[3]))
    total = int(np.sum(done["len"], dtype=np.uint64))
    out = np.memmap(sys.argv[2] + "/train.bin", dtype=np.uint16, mode="w+", shape=(total,))
    index = 0
    for number in range(min(64, len(done))):
        batch = done.shard(min(64, len(done)), number, contiguous=True).with_format("numpy")
        ids = np.concatenate(batch["ids"])
        out[index : index + len(ids)] = ids
        index += len(ids)
    out.flush()
"""

TIKTOKEN = """
import sys, time, resource
from pathlib import Path
import pyarrow.parquet as pq
import tiktoken
encoding = tiktoken.get_encoding("gpt2")
texts = [t for path in sorted(Path(sys.argv[1]).glob("*.parquet"))
         for t in pq.read_table(path, columns=["text"])["text"].to_pylist()]
encoding.encode_ordinary_batch(texts[:20], num_threads=int(sys.argv[3]))
begin, used = time.perf_counter(), time.process_time()
encoding.encode_ordinary_batch(texts, num_threads=int(sys.argv[3]))
print(time.perf_counter() - begin, time.process_time() - used)
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--copies", type=int, default=2)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source, n_bytes = lay_out(Path(folder) / "source", asked.copies)
        shutil.copytree(SHARED / "tiktoken-cache", Path(folder) / "tiktoken")
        os.environ["TIKTOKEN_CACHE_DIR"] = f"{folder}/tiktoken"
        in_turns(source, Path(folder))
        rounds = [one_round(source, Path(folder), number) for number in range(asked.rounds)]
    report(rounds, n_bytes, asked.out)


def lay_out(source: Path, copies: int) -> tuple[Path, int]:
    """The shared parquet files, `copies` times; and the bytes of their text."""
    source.mkdir()
    n_bytes = 0
    for copy in range(copies):
        for path in sorted((SHARED / "pretrain").glob("train-*.parquet")):
            shutil.copyfile(path, source / f"{copy}-{path.name}")
            texts = pq.read_table(path, columns=["text"])["text"].to_pylist()
            n_bytes += sum(len(text.encode()) for text in texts)
    return source, n_bytes


def in_turns(source: Path, folder: Path) -> None:
    """CPU-seconds of both on each row group: parquet to hashed shards, texts to lists of ids."""
    tokenizer, encoding = named_tokenizer("gpt2"), tiktoken.get_encoding("gpt2")
    destination = destination_at(str(folder / "turns"))
    (folder / "turns").mkdir()
    tokenizer.save(folder / "turns" / "tokenizer")
    job = Job(destination, "text", 0.005, threads=1)
    ratios, totals = [], [0.0, 0.0]
    for path in sorted(source.glob("*.parquet")):
        for group in range(pq.ParquetFile(path).num_row_groups):
            unit = Unit(f"u{len(ratios)}", None, (Piece(path, "parquet", group, group + 1, 1),))
            texts = pq.ParquetFile(path).read_row_group(group, ["text"])["text"].to_pylist()
            spent = {}
            for way in ("casallm", "tiktoken") if len(ratios) % 2 else ("tiktoken", "casallm"):
                begin = time.process_time()
                if way == "casallm":
                    list(prepare_unit(job, unit))
                else:
                    encoding.encode_ordinary_batch(texts, num_threads=1)
                spent[way] = time.process_time() - begin
            ratios.append(spent["tiktoken"] / spent["casallm"])
            totals = [totals[0] + spent["casallm"], totals[1] + spent["tiktoken"]]
    print(
        f"in turns of {len(ratios)} row groups: casallm's speed over tiktoken per CPU-second:"
        f" median {statistics.median(ratios):.2f}, of the sums {totals[1] / totals[0]:.2f}"
    )


def one_round(source: Path, folder: Path, number: int) -> dict[str, tuple[float, float]]:
    """Seconds on the wall and of all cores, by way."""
    ways: dict[str, Callable[[], tuple[float, float]]] = {
        "casallm": lambda: timed(CASALLM, source, folder),
        "tiktoken": lambda: told(TIKTOKEN, source, folder),
        "datasets": lambda: timed(DATASETS, source, folder),
    }
    order = list(ways)[number % 3 :] + list(ways)[: number % 3]
    return {name: ways[name]() for name in order}


def timed(script: str, source: Path, folder: Path) -> tuple[float, float]:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.perf_counter()
    run(script, source, folder)
    seconds = time.perf_counter() - begin
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, used


def told(script: str, source: Path, folder: Path) -> tuple[float, float]:
    seconds, used = map(float, run(script, source, folder).split())
    return seconds, used


def run(script: str, source: Path, folder: Path) -> str:
    """What a script prints, run as a process of its own with a directory of its own."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        path = Path(out) / "script.py"
        path.write_text(script)
        arguments = [sys.executable, str(path), str(source), f"{out}/out", str(count_cores())]
        if script is DATASETS:
            Path(out, "out").mkdir()
        environment = os.environ | {"PYTHONPATH": str(Path.cwd()), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        return done.stdout


def report(rounds: list[dict[str, tuple[float, float]]], n_bytes: int, out: Path | None) -> None:
    print(f"{n_bytes / 1e6:.1f} MB of text, {count_cores()} cores, {len(rounds)} rounds")
    for name in ("casallm", "tiktoken", "datasets"):
        wall = statistics.median(each[name][0] for each in rounds)
        used = statistics.median(each[name][1] for each in rounds)
        print(f"{name:<9} {n_bytes / wall / 1e6:6.2f} MB/s   {n_bytes / used / 1e6:6.2f} MB/CPU-s")
    found = {
        f"{name}_{what}": [each[name][i] / each["casallm"][i] for each in rounds]
        for name in ("tiktoken", "datasets")
        for i, what in enumerate(("wall", "cpu"))
    }
    for name, ratios in found.items():
        shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"casallm's speed over {name}: median {statistics.median(ratios):.2f} ({shown})")
    if out:
        out.write_text(json.dumps({"bytes": n_bytes, "rounds": rounds, "ratios": found}, indent=1))


if __name__ == "__main__":
    main()
