"""Supervised tokens a second: packed rows against length-bucketed padding, in one run.

    python benchmarks/sft_packing.py [--context 1024] [--seconds 40] [--out results.json]

All ways see the same conversations, cleaned and cut alike, once, on the same model (the tiny
preset's shape), forward and backward. They take turns, a few micro-batches at a time, and are
measured in CPU-seconds, so that a busy machine matters to none. Ways to batch:

* packed: what casallm does.
* buckets: padded to the next of four lengths (1/8, 1/4, 1/2 and all of the context), as many rows
  as make the same number of positions: static shapes, as `torch.compile` wants them.
* sorted: windows of 50 batches sorted by length, as many rows as packed has, padded to the longest
  of each batch (what `group_by_length` of the usual trainers does): a new shape almost every time.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from casallm.data.loader import IGNORED, Batch
from casallm.data.mixture import Mixture, Sample, build_mixture
from casallm.data.packing import SftLoader
from casallm.data.recipe import Recipe, load_recipe
from casallm.data.rows import read_rows
from casallm.data.tokenizer import train_tokenizer
from casallm.estimate.architecture import NAMED_SIZES
from casallm.model.gpt import build_gpt
from casallm.model.loss import TrainingLoss

SHARED = Path(os.environ.get("CASALLM_SHARED_DATA", "../shared/data")) / "sft"
FILES = ("chat_messages_train", "gpteacher_roleplay", "alpaca_en_demo", "glaive_toolcall_en_demo")
POSITIONS = 8192
"""Of a micro-batch."""
TURN = 2
"""Micro-batches of one way before the next has its turn."""
CPU = torch.device("cpu")


@dataclass
class Way:
    """One way to batch, and what it has done so far."""

    name: str
    micro_batches: list[Batch]
    seconds: float = 0.0
    supervised: int = 0
    done: int = 0

    @property
    def fill(self) -> float:
        """The part of all positions that holds a conversation."""
        positions = sum(batch.inputs_BT.numel() for batch in self.micro_batches)
        return sum(int((batch.inputs_BT >= 0).sum()) for batch in self.micro_batches) / positions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=40.0, help="CPU-seconds for each way")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    mixture = build(options.context)
    ways = [
        Way("packed", list(packed(mixture))),
        Way("buckets", list(bucketed(mixture))),
        Way("sorted", list(length_sorted(mixture))),
    ]
    measure(ways, mixture, options.seconds)
    report(ways, mixture, options.out)


def build(context_length: int) -> Mixture:
    """The real sets that are there, or the generated conversations."""
    paths = [path for name in FILES if (path := SHARED / f"{name}.jsonl.gz").exists()]
    recipe = load_recipe("offline")
    if paths:
        sources = [{"path": str(path)} for path in paths]
        recipe = Recipe.model_validate({"sources": sources, "validation_fraction": 0.0})
    texts = [json.dumps(row, ensure_ascii=False) for path in paths for _, row in read_rows(path)]
    words = texts or [json.dumps(source.model_dump()) for source in recipe.sources] * 50
    tokenizer = train_tokenizer(words, 4096 if texts else 300)
    return build_mixture(recipe, tokenizer, context_length=context_length, seed=0)


def packed(mixture: Mixture) -> Iterator[Batch]:
    """One epoch of packed rows."""
    rows = POSITIONS // mixture.context_length
    loader = SftLoader(
        mixture,
        epochs=1,
        global_batch_size=rows,
        micro_batch_size=rows,
        rank=0,
        world_size=1,
        seed=0,
        device=CPU,
    )
    for step in range(loader.n_steps):
        for batch in loader.batches(step):
            # padding is marked, for Way.fill; the model sees id 0 there
            is_padding = batch.inputs_BT == mixture.pad_id
            inputs = torch.where(is_padding, -1, batch.inputs_BT)
            positions, documents = batch.positions_BT, batch.document_offsets
            yield Batch(inputs, batch.targets_BT, positions, documents, batch.n_targets_global)
    loader.close()


def bucketed(mixture: Mixture) -> Iterator[Batch]:
    """Rows padded to the next of four lengths, in batches of the same number of positions."""
    full = mixture.context_length
    waiting: dict[int, list[Sample]] = {full >> shift: [] for shift in (3, 2, 1, 0)}
    for sample in shuffled(mixture):
        width = min(width for width in waiting if len(sample.ids) - 1 <= width)
        waiting[width].append(sample)
        if len(waiting[width]) == POSITIONS // width:
            yield padded(waiting[width], width)
            waiting[width] = []
    for width, samples in waiting.items():
        if samples:
            yield padded(samples, width)


def length_sorted(mixture: Mixture) -> Iterator[Batch]:
    """Batches of as many rows as packed has, of like lengths, padded to the longest."""
    rows = POSITIONS // mixture.context_length
    samples = list(shuffled(mixture))
    for start in range(0, len(samples), 50 * rows):
        window = sorted(samples[start : start + 50 * rows], key=lambda each: len(each.ids))
        for first in range(0, len(window), rows):
            batch = window[first : first + rows]
            yield padded(batch, max(len(sample.ids) - 1 for sample in batch))


def shuffled(mixture: Mixture) -> Iterator[Sample]:
    order = np.random.default_rng(0).permutation(len(mixture.train))
    return (mixture.train[each] for each in order.tolist())


def padded(samples: list[Sample], width: int) -> Batch:
    """One conversation a row; the padding is marked by -1."""
    inputs = np.full((len(samples), width), -1, dtype=np.int64)
    targets = np.full((len(samples), width), IGNORED, dtype=np.int64)
    for row, sample in enumerate(samples):
        ids = sample.ids.astype(np.int64)
        inputs[row, : len(ids) - 1] = ids[:-1]
        targets[row, : len(ids) - 1] = np.where(sample.is_target[1:], ids[1:], IGNORED)
    n_targets = int((targets >= 0).sum())
    return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), None, None, n_targets)


def measure(ways: list[Way], mixture: Mixture, seconds: float) -> None:
    """Runs the ways in turn, each through all of its micro-batches if the time allows."""
    loss = TrainingLoss(build_gpt(NAMED_SIZES["tiny"], mixture.context_length))
    for way in ways:
        step(loss, way.micro_batches[0])
        order = np.random.default_rng(1).permutation(len(way.micro_batches))
        way.micro_batches = [way.micro_batches[each] for each in order.tolist()]
    while any(way.seconds < seconds and way.done < len(way.micro_batches) for way in ways):
        for way in ways:
            turn = way.micro_batches[way.done : way.done + TURN]
            if way.seconds < seconds:
                begin = time.process_time()
                for batch in turn:
                    step(loss, batch)
                way.seconds += time.process_time() - begin
                way.supervised += sum(int((batch.targets_BT >= 0).sum()) for batch in turn)
                way.done += len(turn)


def step(loss: TrainingLoss, batch: Batch) -> None:
    """Forward and backward, as the trainer does them on a CPU."""
    inputs = batch.inputs_BT.clamp(min=0)
    with torch.autocast("cpu", torch.bfloat16):
        total = loss(inputs, batch.targets_BT, batch.positions_BT, batch.document_offsets)
    (total / max(1, batch.n_targets_global)).backward()


def report(ways: list[Way], mixture: Mixture, out: Path | None) -> None:
    lengths = [len(sample.ids) - 1 for sample in mixture.train]
    print(
        f"{len(lengths):,} conversations, {sum(lengths):,} tokens, median {np.median(lengths):.0f},"
        f" longest {max(lengths):,}, rows of {mixture.context_length:,}; {torch.get_num_threads()}"
        f" threads, torch {torch.__version__}"
    )
    print(f"{'way':10}{'full':>8}{'supervised/CPU-s':>22}{'packed is':>12}{'measured':>10}")
    rates = {way.name: way.supervised / way.seconds for way in ways}
    for way in ways:
        gain = rates["packed"] / rates[way.name]
        share = way.done / len(way.micro_batches)
        print(f"{way.name:10}{way.fill:8.1%}{rates[way.name]:22,.0f}{gain:11.2f}x{share:10.0%}")
    if out:
        results = [
            {"way": way.name, "full": round(way.fill, 4), "tokens_per_second": rates[way.name]}
            for way in ways
        ]
        out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
