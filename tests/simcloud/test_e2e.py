"""Whole runs in the simulated cloud: real SkyPilot, real processes, tiny models. `make e2e`.

Every scenario ends with an empty account, or it fails.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.simcloud.cloud import BIN, CHECKOUT, PATIENCE, SimulatedCloud, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600 * PATIENCE)]

BUCKET = "s3://casallm-e2e"
TINY = [
    "model.n_layers=1",
    "model.d_model=64",
    "model.n_heads=2",
    "model.vocab_size=512",
    "train.context_length=32",
    "train.global_batch_size=4",
    "train.compile=off",
    "train.precision=fp32",
    "eval.sequences=8",
    "eval.every_steps=100000",
    "log.every_steps=10",
    "log.wandb=off",
    "checkpoint.every_seconds=3",
]
MACHINE = ["--preset", "tiny", "--gpu", "A100:8", "--region", "us-east-1", "--ranks", "1"]
SHARDS = f"{BUCKET}/data/words"
BROUGHT_HOME = CHECKOUT / "runs"
USD_PER_HOUR = 21.957642
CALM_STEPS = 2000


def up(run: str, *words: str) -> list[str]:
    """The arguments of an `up` that asks nothing."""
    where = ["--bucket", BUCKET, "--run", run, "--yes", "--allow-dirty"]
    return ["up", "pretrain", *MACHINE, "--data", SHARDS, *where, *words, *TINY]


def read(cloud: SimulatedCloud, run: str, name: str) -> bytes | None:
    s3 = cloud.client("s3")
    try:
        return s3.get_object(Bucket="casallm-e2e", Key=f"{run}/{name}")["Body"].read()
    except s3.exceptions.NoSuchKey:
        return None


def finished(cloud: SimulatedCloud, run: str) -> dict | None:
    record = read(cloud, run, "finished.json")
    return json.loads(record) if record else None


def checkpoints(cloud: SimulatedCloud, run: str) -> list[str]:
    listed = cloud.client("s3").list_objects_v2(Bucket="casallm-e2e", Prefix=f"{run}/checkpoints/")
    keys = [entry["Key"] for entry in listed.get("Contents", [])]
    return sorted(key.split("/")[2] for key in keys if key.endswith("manifest.json"))


def metrics(cloud: SimulatedCloud, run: str) -> list[dict]:
    text = read(cloud, run, "metrics.jsonl") or b""
    return [json.loads(line) for line in text.splitlines()]


def weights(cloud: SimulatedCloud, run: str) -> str:
    done = cloud.run([str(BIN / "casallm"), "verify", f"{BUCKET}/{run}", "--json"])
    return json.loads(done.stdout)["weights_sha256"]


def every_instance(cloud: SimulatedCloud) -> list[dict]:
    """All that was rented in the first region, the terminated ones too."""
    reservations = cloud.client("ec2").describe_instances()["Reservations"]
    return [instance for each in reservations for instance in each["Instances"]]


def assert_nothing_left(cloud: SimulatedCloud) -> None:
    assert cloud.live_instances() == []
    assert cloud.live_volumes() == []
    assert cloud.client("ec2").describe_key_pairs()["KeyPairs"] == []
    assert "Uploads" not in cloud.client("s3").list_multipart_uploads(Bucket="casallm-e2e")


def put_documents(cloud: SimulatedCloud, name: str) -> str:
    """The URL of some made-up documents in the bucket."""
    chance, url = random.Random(name), f"text/{name}.jsonl"
    words = ["".join(chance.choices("abcdefghij", k=chance.randint(2, 7))) for _ in range(300)]
    documents = (" ".join(chance.choices(words, k=100)) for _ in range(4000))
    body = "".join(json.dumps({"text": document}) + "\n" for document in documents)
    cloud.client("s3").put_object(Bucket="casallm-e2e", Key=url, Body=body.encode())
    return f"{BUCKET}/{url}"


@pytest.fixture(scope="module", autouse=True)
def _server(cloud):
    cloud.client("s3").create_bucket(Bucket="casallm-e2e")
    source = put_documents(cloud, "words")
    options = ["--vocab-size", "512", "--workers", "1", "--data", source, "--out", SHARDS]
    cloud.run([str(BIN / "casallm"), "prepare", *options], timeout=600)
    cloud.sky("api", "start", timeout=300)
    cloud.sky("check", "aws", timeout=600)
    before = set(BROUGHT_HOME.glob("*"))
    yield
    for run in set(BROUGHT_HOME.glob("*")) - before:
        shutil.rmtree(run)


@pytest.fixture(scope="module")
def calm(cloud):
    """The weights and the screen of a run on demand that nothing disturbed."""
    done = cloud.launch(*up("calm", "--on-demand", f"train.steps={CALM_STEPS}"), timeout=2400)
    return weights(cloud, "calm"), done.stdout


def test_a_run_on_demand_comes_home_and_leaves_nothing(cloud, calm):
    _, shown = calm

    assert shown.rstrip().endswith("nothing left")
    assert finished(cloud, "calm")["step"] == CALM_STEPS
    assert (BROUGHT_HOME / "calm/finished.json").exists()
    assert_nothing_left(cloud)


def test_documents_are_prepared_on_a_machine_of_their_own_first(cloud):
    documents = ["--data", put_documents(cloud, "other"), "train.steps=20"]

    done = cloud.launch(*up("made", "--on-demand", *documents), timeout=2400)

    listed = cloud.client("s3").list_objects_v2(Bucket="casallm-e2e", Prefix="data/other-")
    assert any(entry["Key"].endswith("manifest.json") for entry in listed["Contents"])
    assert finished(cloud, "made")["step"] == 20
    kinds = {each["InstanceType"] for each in every_instance(cloud)}
    assert {kind.partition(".")[0] for kind in kinds} >= {"m6i", "p4d"}
    assert done.stdout.rstrip().endswith("nothing left")
    assert_nothing_left(cloud)


def test_a_spot_run_that_is_preempted_ends_with_the_weights_of_the_calm_one(cloud, calm):
    cloud.launch(*up("spot", "--spot", "--detach", f"train.steps={CALM_STEPS}"), timeout=900)
    wait_until(lambda: checkpoints(cloud, "spot"), seconds=600, what="a checkpoint")

    cloud.client("ec2").terminate_instances(InstanceIds=cloud.live_instances()[:1])
    wait_until(lambda: finished(cloud, "spot"), seconds=1200, what="the recovered run's end")

    assert finished(cloud, "spot")["attempt"] > 1
    assert weights(cloud, "spot") == calm[0]
    done = cloud.launch("down", "--run", f"{BUCKET}/spot", "--yes", timeout=900)
    assert done.stdout.rstrip().endswith("nothing left")
    assert_nothing_left(cloud)


def test_a_budget_ends_the_run_annealed_and_it_is_not_started_again(cloud):
    steps = ["train.steps=1000000", "schedule.warmup_fraction=0.0001"]
    command = up("cents", "--on-demand", "--budget", "1", *steps)

    cloud.launch(*command, timeout=2400)

    usd = max(line["usd"] for line in metrics(cloud, "cents") if line.get("usd") is not None)
    assert usd <= 1.01 + USD_PER_HOUR / 60
    assert "budget" in finished(cloud, "cents")["reason"]
    rates = [line["lr"] for line in metrics(cloud, "cents") if "lr" in line]
    assert rates[-1] < 0.2 * max(rates)
    assert_nothing_left(cloud)

    rented = len(every_instance(cloud))
    again = cloud.launch(*command, timeout=600)

    assert "is finished already: no machine is rented" in again.stdout
    assert len(every_instance(cloud)) == rented
    assert_nothing_left(cloud)


def test_the_node_keeps_the_deadline_when_skypilots_server_is_gone(cloud):
    deadline = ["--deadline", "3min", "train.steps=1000000"]
    cloud.launch(*up("deadline", "--on-demand", "--detach", *deadline), timeout=900)
    wait_until(lambda: read(cloud, "deadline", "config.yaml"), seconds=300, what="the start")

    cloud.sky("api", "stop", timeout=120)

    wait_until(lambda: finished(cloud, "deadline"), seconds=600, what="the node's own end")
    wait_until(lambda: not cloud.live_instances(), seconds=600, what="the machine to delete itself")
    cloud.sky("api", "start", timeout=300)
    done = cloud.launch("down", "--run", f"{BUCKET}/deadline", "--yes", timeout=600)
    assert done.stdout.rstrip().endswith("nothing left")
    assert_nothing_left(cloud)


def test_a_launcher_that_is_killed_five_times_is_reconciled(cloud):
    chance = random.Random(20261122)
    command = [sys.executable, "-m", "launch"]
    command += up("killed", "--on-demand", "train.steps=100")
    for _ in range(5):
        process = subprocess.Popen(
            command,
            env=cloud.environment,
            cwd=CHECKOUT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(chance.uniform(1, 60))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()

    done = cloud.launch(*command[3:], timeout=2400)

    assert finished(cloud, "killed")["step"] == 100
    assert done.stdout.rstrip().endswith("nothing left")
    assert_nothing_left(cloud)


def test_a_key_is_in_no_file_log_or_process_list(cloud):
    canary = f"canary{random.randrange(10**12)}"
    words = up("canary", "--on-demand", "--detach", "train.steps=100000")

    done = cloud.run(
        [sys.executable, "-m", "launch", *words], timeout=900, HF_TOKEN=canary, NOTIFY=canary
    )
    wait_until(lambda: checkpoints(cloud, "canary"), seconds=600, what="a checkpoint")
    pattern = f"[c]{canary[1:]}"  # does not find the command that seeks it
    on_the_node = cloud.on_node(
        cloud.live_instances()[0],
        f"grep -rlsI --exclude-dir=skypilot-runtime '{pattern}' /home/ubuntu /tmp /root /var/log"
        f"; grep -als '{pattern}' /proc/[0-9]*/cmdline",
    )
    ended = cloud.launch("down", "--run", f"{BUCKET}/canary", "--yes", timeout=900)

    assert on_the_node == ""
    assert canary not in done.stdout + done.stderr + ended.stdout + ended.stderr
    for path in cloud.home.rglob("*"):
        if path.is_file() and not path.is_symlink() and "api_server" not in path.parts:
            assert canary.encode() not in path.read_bytes(), path
    listed = cloud.client("s3").list_objects_v2(Bucket="casallm-e2e", Prefix="canary/")
    for entry in listed["Contents"]:
        assert canary.encode() not in read(cloud, "canary", entry["Key"].partition("/")[2])
    assert_nothing_left(cloud)


def test_two_spot_nodes_of_which_one_is_taken_resume_at_the_last_checkpoint(cloud):
    if "--node-rank" not in cloud.run([str(BIN / "casallm"), "pretrain", "--help"]).stdout:
        pytest.skip("`casallm pretrain` does not join several nodes yet")
    words = ["--spot", "--detach", "--nodes", "2", f"train.steps={CALM_STEPS}"]
    cloud.launch(*up("pair", *words), timeout=900)
    wait_until(lambda: checkpoints(cloud, "pair"), seconds=900, what="a checkpoint")

    cloud.client("ec2").terminate_instances(InstanceIds=cloud.live_instances()[:1])
    wait_until(lambda: finished(cloud, "pair"), seconds=1500, what="the recovered run's end")

    assert finished(cloud, "pair")["attempt"] > 1
    done = cloud.launch("down", "--run", f"{BUCKET}/pair", "--yes", timeout=900)
    assert done.stdout.rstrip().endswith("nothing left")
    assert_nothing_left(cloud)
