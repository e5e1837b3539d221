"""The memory of `casallm prepare` on a gigabyte of JSON lines, one of which holds 200 MB.

    python benchmarks/prepare_memory.py [--gigabytes 1.0] [--line 200]

All processes together, asked of the system a few times a second: unique and shared pages in their
share (PSS), so that nothing counts twice, and the largest resident set of any one process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq

SHARED = Path(os.environ.get("CASALLM_SHARED_DATA", "../shared/data"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--line", type=float, default=200.0, help="megabytes")
    parser.add_argument("--tokenizer", default="trained")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source.jsonl"
        write(source, asked.gigabytes * 1e9, asked.line * 1e6)
        command = [sys.executable, "-m", "casallm", "prepare", "--data", str(source)]
        command += ["--out", f"{folder}/out", "--tokenizer", asked.tokenizer]
        begin = time.perf_counter()
        process = subprocess.Popen(command)
        total, single = watch(process)
        seconds = time.perf_counter() - begin
        print(
            f"{source.stat().st_size / 1e9:.2f} GB with a line of {asked.line:.0f} MB:"
            f" {total / 1e9:.2f} GB at most (PSS of all processes), {single / 1e9:.2f} GB of one"
            f" process, {seconds:.0f} s, exit code {process.returncode}"
        )


def write(path: Path, n_bytes: float, line_bytes: float) -> None:
    """Real documents over and over, and in the middle one that is many of them joined."""
    texts = []
    for file in sorted((SHARED / "pretrain").glob("train-*.parquet")):
        texts += pq.read_table(file, columns=["text"])["text"].to_pylist()
    whole = "\n\n".join(texts)
    with path.open("w") as file:
        number = 0
        while file.tell() < n_bytes:
            if line_bytes and file.tell() > n_bytes / 2:
                repeated = whole * (1 + int(line_bytes) // len(whole))
                file.write(
                    line_of(repeated.encode()[: int(line_bytes)].decode(errors="ignore")) + "\n"
                )
                line_bytes = 0
            text = f"{number} {texts[number % len(texts)]}"
            file.write(line_of(text) + "\n")
            number += 1


def line_of(text: str) -> str:
    """A line of JSON whose text is UTF-8 and not escapes, as large as the text."""
    return json.dumps({"text": text}, ensure_ascii=False)


def watch(process: subprocess.Popen) -> tuple[int, int]:
    """The most of all processes together, and of one."""
    most = largest = 0
    parent = psutil.Process(process.pid)
    while process.poll() is None:
        total = 0
        try:
            for each in [parent, *parent.children(recursive=True)]:
                memory = each.memory_full_info()
                total += memory.pss
                largest = max(largest, memory.rss)
        except psutil.NoSuchProcess:
            continue
        most = max(most, total)
        time.sleep(0.2)
    return most, largest


if __name__ == "__main__":
    main()
