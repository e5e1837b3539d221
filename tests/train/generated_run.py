"""A run directory as training would leave it, from numbers that look like training."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from casallm.config import build, merge, parse_overrides
from casallm.storage.store import Store, open_store
from casallm.train.attempts import CheckpointName, claim
from casallm.train.journal import AttemptLog
from casallm.train.run import RunConfig, load_preset, save_config
from casallm.train.status import finish

MACHINE = {
    "device_kind": "cpu",
    "device_name": "x86_64",
    "n_gpus": 0,
    "gpu_memory_bytes": 0,
    "n_cores": 2,
    "memory_bytes": 24_000_000_000,
    "python": "3.11.7",
    "torch": "2.13.0",
    "casallm": "0.1.0",
}
DATASET = {"manifest_sha256": "ab" * 32, "tokenizer_fingerprint": "cd" * 32}
DATASET_FACTS = {
    "source": {"name": "builtin", "botocore": "1.43.117", "fingerprint": "ef" * 32},
    "splits": {
        "train": {"tokens": 5_210_430, "documents": 9_412, "bytes_of_text": 18_300_000},
        "val": {"tokens": 274_120, "documents": 495, "bytes_of_text": 962_000},
    },
    "tokenizer": {"name": "trained", "fingerprint": "cd" * 32, "vocab_size": 4096, "bos_id": 4090},
}
BASELINE = {"nats_per_token": 4.1023, "bits_per_byte": 1.7312}
PROMPTS = ("Returns the description of the", "<p>The name of", "Amazon S3")


@dataclass(frozen=True)
class Stretch:
    """One attempt: how many steps it does, and how it ends (None: without a word)."""

    until: int
    outcome: str | None = "finished"
    reason: str = ""


def make_run(
    directory: Path,
    *,
    steps: int = 400,
    log_every: int = 10,
    stretches: Sequence[Stretch] = (Stretch(400, "finished", "all 400 steps are done"),),
    usd_per_hour: float | None = None,
    texts: Sequence[str] = (" specified resource. If the request is", " the bucket", " uses"),
    machine: dict[str, Any] = MACHINE,
    has_facts: bool = True,
    overrides: Sequence[str] = (),
) -> Store:
    """A run in `directory`, as its attempts and its supervisor leave it."""
    run = open_store(str(directory))
    tree = merge(load_preset("tiny"), parse_overrides([f"train.steps={steps}", *overrides]))
    save_config(run, build(RunConfig, tree), DATASET)
    lines = training_numbers(steps, log_every, usd_per_hour)
    begin, attempt = 0, None
    for number, stretch in enumerate(stretches, start=1):
        parent = CheckpointName(begin, number - 1) if begin else None
        attempt = claim(run, parent=parent, machine=machine, ranks=1, usd_per_hour=usd_per_hour)
        journal = AttemptLog(run, attempt)
        if has_facts and number == 1:
            journal.event("dataset", **DATASET_FACTS)
            journal.event("baseline", **BASELINE)
        own = [line for line in lines if begin < line["step"] <= stretch.until]
        rows = [json.dumps({**line, "attempt": number}) + "\n" for line in own]
        with (directory / attempt.directory / "metrics.jsonl").open("a") as file:
            file.writelines(rows)
        for line in own:
            if "val_loss" in line and texts:
                for prompt, text in zip(PROMPTS, texts, strict=True):
                    journal.sample(
                        step=line["step"], tokens=line["tokens"], prompt=prompt, text=text
                    )
        if stretch.outcome:
            journal.event("end", outcome=stretch.outcome, step=stretch.until, reason=stretch.reason)
        journal.close()
        begin = stretch.until
    if attempt and stretches[-1].outcome == "finished":
        finish(run, attempt, step=begin, reason=stretches[-1].reason)
    return run


def training_numbers(
    steps: int, log_every: int, usd_per_hour: float | None
) -> list[dict[str, Any]]:
    """Lines of training and of validation; the same for the same arguments."""
    rng = np.random.default_rng(0)
    lines: list[dict[str, Any]] = []
    elapsed = 0.0
    eval_every = max(log_every, steps // 8 // log_every * log_every)
    for step in range(log_every, steps + 1, log_every):
        done = step / steps
        loss = 2.9 + 5.4 * math.exp(-done / 0.035) + 0.9 * math.exp(-3 * done)
        speed = 7_200 * (1 + 0.02 * rng.normal()) * (0.8 if rng.random() < 0.02 else 1)
        elapsed += log_every * 8_192 / speed
        cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * done))
        usd = None if usd_per_hour is None else elapsed / 3600 * usd_per_hour
        line = {
            "step": step,
            "tokens": step * 8_192,
            "loss": loss + 0.05 * rng.normal(),
            "lr": 2e-3 * min(1, done / 0.05) * cosine,
            "grad_norm": 0.4 + 3 * math.exp(-done / 0.03) + abs(0.05 * rng.normal()),
            "tokens_per_second": speed,
            "mfu": 0.31 * speed / 7_200,
            "elapsed_seconds": elapsed,
            "usd": usd,
        }
        lines.append(line)
        if step % eval_every == 0 or step + log_every > steps:
            val = {"val_loss": loss + 0.08, "val_bpb": (loss + 0.08) / math.log(2) / 3.4}
            lines.append({"step": step, "tokens": step * 8_192, **val})
    return lines
