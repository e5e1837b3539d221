"""Our training step and loss against a loop written by hand, taking turns in one process.

Same shape, shards, batch, steps and hyper-parameters, bf16 autocast, torch.compile for both. The
two take turns of ten steps, so that both see the same machine; step times are medians over the
turns. Afterwards both are evaluated on the same held-out windows.

    python benchmarks/versus_plain_loop.py [STEPS]      about seven minutes on two cores
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from plain_loop import PlainLoop, Shape

from casallm.config import build
from casallm.data.loader import PretrainLoader
from casallm.model.gpt import build_gpt
from casallm.train.checkpoint import TrainState
from casallm.train.control import Control
from casallm.train.distributed import World
from casallm.train.evaluation import validate
from casallm.train.machine import this_machine
from casallm.train.optim import Optimizers
from casallm.train.pretrain import prepare_dataset
from casallm.train.run import RunConfig, load_preset
from casallm.train.trainer import Trainer

TURN_STEPS = 10
VALIDATION_WINDOWS = 256


def main(steps: int) -> None:
    torch.set_num_threads(2)
    settings = load_preset("tiny")
    settings["train"] |= {"steps": steps, "precision": "bf16", "compile": "on"}
    settings["optim"]["name"] = "adamw"
    config = build(RunConfig, settings)
    dataset = prepare_dataset(config)
    with tempfile.TemporaryDirectory() as folder:
        ours = our_trainer(config, dataset, Path(folder))
        plain = plain_loop(config, dataset)
        ours._prepare()
        plain.compiled(*plain.batch()).backward()
        plain.optimizer.zero_grad()
        turns = {"casallm": [], "plain": []}
        for turn in range(steps // TURN_STEPS):
            for name in ("casallm", "plain") if turn % 2 else ("plain", "casallm"):
                step = ours._train_step if name == "casallm" else plain.step
                begin = time.perf_counter()
                for _ in range(TURN_STEPS):
                    step()
                turns[name].append((time.perf_counter() - begin) / TURN_STEPS)
        losses = {"casallm": our_loss(ours), "plain": plain_loss(plain, dataset)}
    report(turns, losses, steps)


def our_trainer(config: RunConfig, dataset, folder: Path) -> Trainer:
    world = World(0, 1, 0, torch.device("cpu"), None)
    train = config.train
    model = build_gpt(config.model, train.context_length, seed=train.seed)
    loader = PretrainLoader(
        dataset,
        context_length=train.context_length,
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.global_batch_size,
        rank=0,
        world_size=1,
        seed=train.seed,
        device=world.device,
    )
    return Trainer(
        config=config,
        world=world,
        model=model,
        loader=loader,
        optimizers=Optimizers(model, config.optim),
        state=TrainState(),
        control=Control(folder),
        token_bytes_V=torch.from_numpy(dataset.tokenizer().token_bytes()),
        observer=None,
    )


def plain_loop(config: RunConfig, dataset) -> PlainLoop:
    model = config.model
    shape = Shape(
        n_layers=model.n_layers,
        d_model=model.d_model,
        n_heads=model.n_heads,
        d_ff=model.ff_width,
        vocab_size=model.padded_vocab_size,
        context_length=config.train.context_length,
    )
    shards = range(len(dataset.splits["train"].shards))
    tokens = np.concatenate([dataset.shard("train", n) for n in shards])
    train = config.train
    return PlainLoop(shape, tokens, train.global_batch_size, train.steps, config.optim.lr)


def our_loss(trainer: Trainer) -> float:
    batches = trainer.loader.validation(VALIDATION_WINDOWS)
    with torch.autocast("cpu", torch.bfloat16):
        return validate(trainer.world, trainer.model, batches, trainer.token_bytes_V).loss


@torch.no_grad()
def plain_loss(plain: PlainLoop, dataset) -> float:
    width = plain.shape.context_length
    tokens = dataset.shard("val", 0)
    windows = [tokens[k * width : (k + 1) * width + 1] for k in range(VALIDATION_WINDOWS)]
    rows = torch.from_numpy(np.stack([w for w in windows if len(w) == width + 1]).astype(np.int64))
    with torch.autocast("cpu", torch.bfloat16):
        losses = [plain.model(part[:, :-1], part[:, 1:]).item() for part in rows.split(32)]
    return statistics.fmean(losses)


def report(turns: dict[str, list[float]], losses: dict[str, float], steps: int) -> None:
    medians = {name: statistics.median(seconds) for name, seconds in turns.items()}
    ratios = [a / b for a, b in zip(turns["casallm"], turns["plain"], strict=True)]
    machine = this_machine()
    print(f"{steps} steps each, {machine.describe()}, torch {machine.torch}")
    for name in turns:
        print(f"{name:8} {medians[name]:.3f} s a step (median), validation loss {losses[name]:.4f}")
    print(f"step, casallm over plain: {statistics.median(ratios):.3f} (median of turns)")
    print(f"loss, casallm over plain: {losses['casallm'] / losses['plain']:.4f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
