"""`casallm evaluate`: the newest good checkpoint of a run against all that was held out.

While a model is trained it is evaluated on the first held-out sequences; here on every one of them,
and an assistant on the fixed chats too. The answer is kept in the run.
"""

import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import torch

from casallm.config import Tree, canonical_json
from casallm.errors import CheckpointError
from casallm.storage.store import Store
from casallm.train.distributed import World
from casallm.train.evaluation import validate
from casallm.train.machine import Machine, this_machine
from casallm.train.pretrain import PretrainRequest
from casallm.train.rank import OPEN_FEED, micro_batch_size
from casallm.train.run import RunConfig, changes_of, load_config
from casallm.train.sft import SftRequest, chat_evaluation
from casallm.train.stage import Request, Start
from casallm.train.trained import Trained, load_trained
from casallm.train.trainer import autocast

NAME = "evaluation.json"
"""What the run keeps of it."""


def evaluate_run(run: Store) -> Tree:
    """Loss, bits per byte and, of an assistant, chat scores; also written to `evaluation.json`.

    CheckpointError if the run has no checkpoint, or its data is not what it was trained with.
    """
    machine = this_machine()
    stage = load_config(run)[0].stage
    start = Start(run=run.url)
    request: Request = SftRequest(start) if stage == "sft" else PretrainRequest(start)
    config, material = request.settle(machine, run)
    changes = changes_of(run, config, material.identity)
    if changes:
        raise CheckpointError(
            f"{run.url} was trained with other data ({'; '.join(changes)}): evaluate it where that"
            " is, or restore it"
        )
    trained = load_trained(run)
    losses = _losses(config, material.directory, machine, trained)
    scores = {"checkpoint": str(trained.checkpoint), **losses}
    if stage == "sft":
        scores["chat"] = asdict(chat_evaluation(trained, config).scores)
    run.write(NAME, canonical_json(scores).encode())
    return scores


def _losses(config: RunConfig, directory: Path, machine: Machine, trained: Trained) -> Tree:
    device = next(trained.model.parameters()).device
    world = World(0, 1, 0, device, None)
    feed = OPEN_FEED[config.stage](
        directory, config, world, micro_batch_size(config, machine, world)
    )
    token_bytes_V = torch.from_numpy(feed.tokenizer.token_bytes()).to(device)
    every = sys.maxsize
    with closing(feed.loader), autocast(config, device):
        whole = validate(world, trained.model, feed.loader.validation(every), token_bytes_V)
        by_source = {
            name: validate(world, trained.model, batches(every), token_bytes_V)
            for name, batches in feed.sources.items()
        }
    return {
        "val_loss": whole.loss,
        "val_bpb": whole.bits_per_byte,
        "val_loss_by_source": {name: each.loss for name, each in by_source.items()},
    }
