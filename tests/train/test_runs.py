"""Real runs of three ranks, disturbed: each ends with the weights of the calm one."""

import json
import os
import random
import shutil
import signal
import time

import pytest

from casallm.storage.store import open_store
from casallm.train.budget import RESERVE_SECONDS
from casallm.train.held_out import evaluate_run
from tests.train.real_run import RealRun


def test_a_calm_run_records_each_step_once_and_writes_its_report(calm):
    assert [line["step"] for line in calm.metrics()] == list(range(1, 25))
    assert calm.metrics()[-1]["loss"] < calm.metrics()[0]["loss"]
    assert json.loads((calm.directory / "finished.json").read_text())["step"] == 24
    assert "Bigram baseline" in (calm.directory / "report.md").read_text()


def test_a_run_is_evaluated_on_all_that_was_held_out(calm, monkeypatch):
    monkeypatch.chdir(calm.folder)
    run = open_store(calm.url)

    scores = evaluate_run(run)

    lines = map(json.loads, run.read("metrics.jsonl").splitlines())
    while_training = [line["val_loss"] for line in lines if "val_loss" in line][-1]
    assert scores["checkpoint"] == "step-00000024-a1"
    assert scores["val_loss"] != while_training  # of 8 sequences
    assert scores["val_loss"] == pytest.approx(while_training, rel=0.1)
    assert json.loads(run.read("evaluation.json")) == scores


def test_the_same_command_says_that_a_finished_run_is_finished(calm):
    done = calm.start().wait_for_exit()

    assert done.code == 0
    assert done.stdout.startswith("runs/calm is finished: all 24 steps are done")
    assert len(list(calm.directory.glob("attempts/*"))) == 1


def test_a_run_whose_ranks_and_supervisor_are_killed_ends_with_the_weights_of_the_calm_one(
    calm, run
):
    run.start().wait_for_step(5)
    os.kill(run.ranks()[1], signal.SIGKILL)
    run.wait_for_step(11)
    run.signal(signal.SIGKILL)
    killed = run.wait_for_exit()
    assert "starting the ranks again from step" in killed.stderr
    assert len(list(run.directory.glob("attempts/*"))) == 1
    wait_until_no_rank_is_left(run)

    done = run.start().wait_for_exit()

    assert done.code == 0, done.stderr
    assert run.weights() == calm.weights()
    assert [line["loss"] for line in run.metrics()] == [line["loss"] for line in calm.metrics()]
    elapsed = [line["elapsed_seconds"] for line in run.metrics()]
    assert elapsed == sorted(elapsed)


@pytest.mark.slow
def test_stopped_again_and_again_a_run_ends_with_the_weights_of_the_calm_one(calm, run):
    dice = random.Random(5)
    for step in (2, 6, 9, 14, 17, 21):
        run.start().wait_for_step(step)
        time.sleep(dice.uniform(0, 0.3))
        run.signal(dice.choice([signal.SIGKILL, signal.SIGINT]))
        run.wait_for_exit()
        wait_until_no_rank_is_left(run)

    done = run.start().wait_for_exit()

    assert done.code == 0, done.stderr
    assert run.weights() == calm.weights()
    assert [line["loss"] for line in run.metrics()] == [line["loss"] for line in calm.metrics()]


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_older_one_used(calm, documents):
    run = RealRun(documents, "damaged", ranks=1)
    shutil.copytree(calm.directory, run.directory)
    (run.directory / "finished.json").unlink()
    newest = run.newest_checkpoint()
    flip_a_bit(next(newest.glob("model-*.safetensors")))

    done = run.start().wait_for_exit()

    assert done.code == 0, done.stderr
    assert f"{newest.name} is not used, the next older one is tried" in done.stderr
    assert "is damaged" in done.stderr
    assert [line["step"] for line in run.metrics()] == list(range(1, 25))
    assert run.newest_checkpoint().name == "step-00000024-a2"


def test_after_ctrl_c_fewer_ranks_go_on_with_the_sequences_of_three(calm, documents):
    two = RealRun(documents, "fewer", ranks=2).start()
    two.wait_for_step(11)
    two.signal(signal.SIGINT)
    stopped = two.wait_for_exit()
    assert stopped.code == 75, stopped.stderr
    assert "is saved at step" in stopped.stdout
    assert "the same command goes on from there" in stopped.stdout

    one = RealRun(documents, "fewer", ranks=1)
    assert one.start().wait_for_exit().code == 0

    ours, theirs = one.metrics(), calm.metrics()
    assert [line["tokens"] for line in ours] == [line["tokens"] for line in theirs]
    losses = [line["loss"] for line in theirs]  # bf16 products, summed in another order
    assert [line["loss"] for line in ours] == pytest.approx(losses, rel=2e-3)


@pytest.mark.slow
def test_two_nodes_make_the_weights_of_two_ranks_on_one(documents):
    one = RealRun(documents, "one-node", ranks=2)
    two = RealRun(documents, "two-nodes", ranks=1)
    other = RealRun(documents, "two-nodes", ranks=1)
    assert one.start().wait_for_exit().code == 0

    two.start("--nodes", "2", "--node-rank", "0")
    other.start("--nodes", "2", "--node-rank", "1", log="other-node.log")

    assert two.wait_for_exit().code == 0
    assert other.wait_for_exit().code == 0
    assert two.weights() == one.weights()


def test_a_run_with_other_settings_is_refused_field_by_field(calm):
    (calm.directory / "finished.json").rename(calm.directory / "finished.away")
    try:
        done = calm.start("optim.lr=1e-3", "train.seed=7").wait_for_exit()
    finally:
        (calm.directory / "finished.away").rename(calm.directory / "finished.json")

    assert done.code == 1
    assert "optim.lr: 0.002 -> 0.001; train.seed: 1337 -> 7" in done.stderr
    assert "--allow-changes" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_hung_rank_is_noticed_and_its_generation_restarted(calm, run):
    run.start("train.stall_minutes=0.15").wait_for_step(6)

    os.kill(run.ranks()[2], signal.SIGSTOP)
    done = run.wait_for_exit()

    assert done.code == 0, done.stderr
    assert "no step for" in done.stderr
    assert run.weights() == calm.weights()


@pytest.mark.slow
def test_compiled_and_killed_a_run_ends_with_the_weights_of_a_calm_compiled_one(documents):
    calm = RealRun(documents, "compiled-calm", ranks=3)
    killed = RealRun(documents, "compiled-killed", ranks=3)
    assert calm.start("train.compile=on").wait_for_exit().code == 0
    killed.start("train.compile=on").wait_for_step(11)
    killed.signal(signal.SIGKILL)
    killed.wait_for_exit()

    assert killed.start("train.compile=on").wait_for_exit().code == 0

    assert killed.weights() == calm.weights()


@pytest.mark.slow
def test_a_budget_ends_the_run_annealed_and_on_budget(documents):
    run = RealRun(documents, "budget", ranks=1)
    settings = (
        "train.steps=100000",
        "budget.usd=0.5",
        "budget.usd_per_hour=36",
        "log.every_steps=5",
        "schedule.warmup_fraction=0.0001",
    )

    done = run.start(*settings, "checkpoint.every_steps=500").wait_for_exit()

    assert done.code == 0, done.stderr
    assert "budget or deadline" in done.stdout
    lines = run.metrics()
    assert lines[-1]["lr"] == pytest.approx(2e-4, rel=1e-6)
    assert lines[-1]["usd"] <= 0.5 * 1.01 + 36 / 60
    kept_back = 36 * RESERVE_SECONDS / 3600
    assert lines[-1]["usd"] >= 0.95 * (0.5 - kept_back)
    again = run.start(*settings).wait_for_exit()
    assert again.code == 0


def wait_until_no_rank_is_left(run: RealRun) -> None:
    deadline = time.monotonic() + 20
    while run.ranks() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert run.ranks() == []


def flip_a_bit(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
