"""A resume must fit wherever a start did."""

import subprocess
import sys

from casallm.storage.local import LocalStore
from casallm.train.checkpoint import list_checkpoints

PROGRAM = """
import sys
from pathlib import Path

import torch

from casallm.estimate.architecture import ModelConfig
from casallm.model.gpt import build_gpt
from casallm.storage.local import LocalStore
from casallm.train.checkpoint import CheckpointConfig, TrainState, fetch, list_checkpoints, load
from casallm.train.checkpoint_writer import CheckpointWriter
from casallm.train.journal import AttemptLog
from casallm.train.optim import OptimConfig, Optimizers
from casallm.train.resume import start_attempt

torch.set_num_threads(1)
scratch = Path(sys.argv[2])
run = LocalStore(scratch)
shape = ModelConfig(family="modern", n_layers=2, d_model=256, n_heads=4, vocab_size=32768)
model = build_gpt(shape, 64, seed=1)
optimizers = Optimizers(model, OptimConfig())
weights = {name: parameter.data for name, parameter in model.named_parameters()}
if sys.argv[1] == "resume":
    checkpoint = fetch(run, list_checkpoints(run)[-1], scratch)
    load(checkpoint, model=weights, optimizer=optimizers.state())
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(peak.split()[1], sum(tensor.nbytes for tensor in weights.values()) // 1024)
if sys.argv[1] == "start":
    attempt, _ = start_attempt(run, scratch)
    writer = CheckpointWriter(
        run,
        attempt,
        AttemptLog(run, attempt),
        config=CheckpointConfig(),
        identity_sha256="0" * 64,
        world_size=1,
        start=None,
        scratch=scratch,
    )
    writer.save(TrainState(step=1), weights, optimizers.state())
    writer.wait()
    writer.close()
"""


def test_a_resume_needs_no_more_memory_than_a_start(tmp_path):
    peaks = {}
    for how in ("start", "resume"):
        words = [sys.executable, "-c", PROGRAM, how, str(tmp_path / "run")]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        peaks[how], weights_kib = map(int, done.stdout.split())

    assert list_checkpoints(LocalStore(tmp_path / "run"))
    assert peaks["resume"] < peaks["start"] + weights_kib // 8
