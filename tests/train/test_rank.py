"""One rank: what it says when the GPU's memory is not enough."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from casallm.errors import TrainingError
from casallm.train import rank
from casallm.train.control import Control, Spec
from casallm.train.distributed import World
from casallm.train.machine import this_machine


@pytest.mark.parametrize(
    ("micro_batch", "remedy"),
    [
        (8, "with 8 sequences at a time: add train.micro_batch_size=4"),
        (1, "with one sequence: take a smaller model"),
    ],
)
def test_a_gpu_without_memory_says_what_to_set(tmp_path, monkeypatch, micro_batch, remedy):
    def exhausted(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 80")

    values = {field.name: 0 for field in dataclasses.fields(Spec)}
    values |= {"config": {}, "machine": dataclasses.asdict(this_machine())}
    monkeypatch.setattr(rank, "build", lambda *_: SimpleNamespace(stage="pretrain"))
    monkeypatch.setattr(rank, "_train_on", exhausted)
    monkeypatch.setattr(rank, "micro_batch_size", lambda *_: micro_batch)
    monkeypatch.setattr(rank, "OPEN_FEED", {"pretrain": lambda *_: None})
    world = World(0, 1, 0, torch.device("cpu"), None)
    monkeypatch.setattr(rank, "join_world", lambda _: world)

    with pytest.raises(TrainingError) as caught:
        rank._train(Spec(**values | {"data_directory": ""}), Control(tmp_path))

    assert str(caught.value) == f"the GPU ran out of memory (CUDA out of memory) {remedy}"
