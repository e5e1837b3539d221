import json
import shutil
import subprocess
from pathlib import Path

import pytest

from casallm.data.prepare import prepare
from casallm.data.sources import open_source
from casallm.errors import CloudError, ConfigError, DataError
from casallm.storage.store import open_store
from casallm.train.attempts import claim
from launch import aws
from launch.preflight import (
    Surroundings,
    check_base,
    check_bucket,
    check_data,
    check_keys,
    check_quotas,
    check_run,
    check_skypilot,
    check_tree,
    preflight,
)
from tests.data.conftest import make_texts, write_documents

EXPIRED = b"""<ErrorResponse><Error><Code>ExpiredToken</Code><Message>old</Message></Error>
<RequestId>1</RequestId></ErrorResponse>"""
UNKNOWN_KEY = EXPIRED.replace(b"ExpiredToken", b"InvalidClientTokenId")
DENIED = EXPIRED.replace(b"ExpiredToken", b"AccessDenied")


@pytest.fixture
def refusing_aws(bare_laptop, stub):
    bare_laptop.setenv("AWS_ENDPOINT_URL", stub.url)
    bare_laptop.setenv("AWS_ACCESS_KEY_ID", "test")
    bare_laptop.setenv("AWS_SECRET_ACCESS_KEY", "test")
    stub.status = 403
    return stub


def sentence_of(action) -> str:
    with pytest.raises(CloudError) as refused:
        action()
    return str(refused.value)


def test_a_computer_without_credentials_is_told_how_to_get_some(bare_laptop):
    assert sentence_of(aws.account_id) == (
        "this computer has no AWS credentials: run `aws configure` (or `aws sso login`)"
    )


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (
            EXPIRED,
            "the AWS credentials have expired: run `aws sso login` (or `aws configure` again)",
        ),
        (
            UNKNOWN_KEY,
            "AWS does not know these credentials (InvalidClientTokenId): run `aws configure`",
        ),
        (
            DENIED,
            "AWS does not let you GetCallerIdentity: attach the policy of"
            " docs/guides/pretrain-on-aws.md to your user",
        ),
    ],
)
def test_a_refusal_by_aws_is_one_sentence_with_the_way_out(refusing_aws, body, sentence):
    refusing_aws.body = body

    assert sentence_of(aws.account_id) == sentence


def test_somebody_elses_bucket_is_said_to_be_that(refusing_aws):
    assert sentence_of(lambda: aws.bucket_region("theirs")) == (
        "bucket s3://theirs belongs to somebody else, or you may not use it: name another with"
        " BUCKET=s3://YOUR-BUCKET"
    )


def test_a_bucket_that_does_not_exist_is_offered_in_the_first_region(account, plan_of):
    found = check_bucket(plan_of(bucket="s3://new-one"))

    assert found.problems == ()
    assert found.bucket_to_create == "new-one us-east-1"


def test_a_run_that_names_its_bucket_is_kept_there_and_nowhere_else(account, plan_of):
    plan = plan_of(run="s3://new-one/x", data="fineweb-edu")

    assert check_bucket(plan).bucket_to_create == "new-one us-east-1"
    assert plan.workload.data_url == "s3://new-one/data/fineweb-edu-6efebf"


def test_the_default_bucket_carries_the_number_of_the_account(account, plan_of):
    assert check_bucket(plan_of()).bucket_to_create == "casallm-123456789012 us-east-1"


def test_a_bucket_that_was_created_is_private_and_passes_every_check(account, plan_of):
    aws.create_bucket("ours", "us-east-1")

    found = check_bucket(plan_of(bucket="s3://ours"))

    assert (found.problems, found.bucket_to_create) == ((), "")
    block = account.client("s3").get_public_access_block(Bucket="ours")
    assert all(block["PublicAccessBlockConfiguration"].values())
    assert "Contents" not in account.client("s3").list_objects_v2(Bucket="ours")


def test_a_bucket_on_another_continent_is_a_problem(account, plan_of):
    aws.create_bucket("far", "eu-west-1")

    found = check_bucket(plan_of(bucket="s3://far", region="us-east-1"))

    assert found.problems == (
        "bucket s3://far is in eu-west-1, far from the machines (us-east-1):"
        " add REGION=eu-west-1, or name a bucket near them with BUCKET=",
    )


@pytest.fixture
def granted(account, bare_laptop, stub):
    """AWS as moto has it, with so many vCPUs granted by every quota."""
    bare_laptop.setenv("AWS_ENDPOINT_URL_SERVICE_QUOTAS", stub.url)

    def grant(vcpus):
        stub.body = json.dumps({"Quota": {"Value": float(vcpus)}}).encode()

    return grant


def test_a_quota_of_zero_is_told_with_the_command_that_asks_for_more(granted, plan_of):
    granted(0)

    found = check_quotas(plan_of(gpu="A100:8", region="us-east-1"))

    assert found.problems == (
        "the quota 'All P4, P3 and P2 Spot Instance Requests' in us-east-1 is 0 vCPUs, but"
        " 1 x p4d.24xlarge need 96: `aws service-quotas request-service-quota-increase"
        " --service-code ec2 --quota-code L-7212CCBC --desired-value 96 --region us-east-1`"
        " (a day or two)",
    )


@pytest.mark.parametrize(("vcpus", "n_problems"), [(191, 1), (192, 0)])
def test_a_quota_must_suffice_for_all_nodes(granted, plan_of, vcpus, n_problems):
    granted(vcpus)

    assert len(check_quotas(plan_of(gpu="A100:8", nodes=2)).problems) == n_problems


def test_small_machines_have_a_quota_too(granted):
    granted(0)

    problem = aws.quota_problem("g5.xlarge", "us-east-1", is_spot=True, nodes=1)

    assert problem.startswith(
        "the quota 'All G and VT Spot Instance Requests' in us-east-1 is 0 vCPUs, but 1 x g5.xlarge"
        " need 4:"
    )


def test_skypilot_that_is_missing_or_too_new_is_told_with_the_install_command(monkeypatch):
    import importlib.metadata

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    missing = check_skypilot()
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.15.2")
    other = check_skypilot()

    assert missing.problems == ("SkyPilot is not installed: run `make setup EXTRAS=cloud`",)
    assert other.problems == (
        "SkyPilot is 0.15.2, but casallm speaks 0.14: run `make setup EXTRAS=cloud`",
    )


@pytest.fixture
def checkout(tmp_path):
    for command in ("init -q", "add .", "commit -q -m x"):
        (tmp_path / "casallm").mkdir(exist_ok=True)
        (tmp_path / "casallm/cli.py").write_text("one")
        identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
        subprocess.run(["git", *identity, *command.split()], cwd=tmp_path, check=True)
    return tmp_path


def test_a_dirty_tree_is_a_problem_unless_it_is_allowed(checkout):
    clean = check_tree(checkout, is_dirty_allowed=False)
    (checkout / "casallm/cli.py").write_text("two")

    dirty = check_tree(checkout, is_dirty_allowed=False)
    allowed = check_tree(checkout, is_dirty_allowed=True)

    assert clean.problems == ()
    assert dirty.problems == (
        "1 file is not committed (casallm/cli.py): run `git commit -am 'Before training'`, or"
        " insist with DIRTY=1 (--allow-dirty)",
    )
    assert allowed.notes == (
        "1 file is not committed (casallm/cli.py): the machine gets them as they are",
    )


def test_machines_outside_aws_need_keys_for_the_bucket(plan_of):
    plan = plan_of(cloud="lambda", is_spot=False, bucket="s3://ours", gpu="A100:8")

    assert check_keys(plan, {}).problems == (
        "machines of lambda have no role in AWS: run `export AWS_ACCESS_KEY_ID=…"
        " AWS_SECRET_ACCESS_KEY=…` with keys that may use the bucket and nothing else",
    )
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    assert check_keys(plan, keys).problems == ()


def test_wandb_online_needs_its_key_here(plan_of):
    plan = plan_of(settings=("log.wandb=online",))

    assert len(check_keys(plan, {}).problems) == 1
    assert check_keys(plan, {"WANDB_API_KEY": "key"}).problems == ()


def test_shards_that_are_not_there_are_a_problem(account):
    aws.create_bucket("ours", "us-east-1")

    assert check_data("s3://ours/data", 400).problems == (
        "there are no shards at s3://ours/data (no manifest.json): check DATA=, or make them"
        " with `make prepare DATA=DOCUMENTS OUT=s3://ours/data`",
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    source = open_source(str(write_documents(folder / "documents.jsonl", make_texts(400))))
    return prepare(source, folder / "shards", tokenizer=None, vocab_size=400, workers=1).directory


@pytest.fixture
def shards(prepared, tmp_path):
    """The directory of a small data set, vocabulary 400, that a test may damage."""
    return Path(shutil.copytree(prepared, tmp_path / "shards"))


def test_whole_shards_of_the_models_vocabulary_are_no_problem(shards):
    found = check_data(str(shards), 400)

    assert found.problems == ()
    assert "tokens of training data" in found.notes[0]


def test_shards_of_another_vocabulary_are_told_before_money_is_spent(shards):
    assert check_data(str(shards), 40960).problems == (
        f"the shards at {shards} were made with a vocabulary of 400, but the model has 40960: add"
        " SET=model.vocab_size=400",
    )


def test_a_shard_that_is_missing_or_cut_is_told(shards):
    first = min(shards.glob("train-*.npy"))
    first.write_bytes(first.read_bytes()[:-2])

    (problem,) = check_data(str(shards), 400).problems

    assert problem.startswith(f"1 of 2 shards at {shards} are missing or cut ({first.name})")


def test_a_manifest_that_was_cut_is_told(shards, plan_of):
    manifest = shards / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-10])

    with pytest.raises(DataError, match=r"manifest\.json was cut or changed"):
        check_data(str(shards), 400)


def test_an_assistant_needs_a_run_to_start_from(account, plan_of):
    aws.create_bucket("ours", "us-east-1")
    plan = plan_of(job="sft", start_from="350m", bucket="s3://ours")

    found = preflight(plan, Surroundings({}, is_dirty_allowed=True))

    assert (
        "there is no checkpoint of a run at s3://ours/350m: name a pretrained one with FROM=s3://…"
        in found.problems
    )


CONFIG = """
identity:
  model: {{family: classic, n_layers: {n_layers}, d_model: 1024, is_tied: true, d_ff: null}}
  train: {{steps: {steps}, global_batch_size: 256, context_length: 2048}}
"""


@pytest.mark.parametrize(
    ("n_layers", "steps", "words"),
    [
        (24, 19074, None),  # 10B tokens of 524,288 a step, as asked
        (24, 1908, "train.steps is 1908 there and 19074 here"),
        (12, 19074, "model.n_layers is 12 there and 24 here"),
    ],
)
def test_a_run_of_the_same_name_and_other_settings_is_not_continued(
    plan_of, tmp_path, n_layers, steps, words
):
    plan = plan_of(run=f"file://{tmp_path}/350m", preset="350m", tokens="10B")
    text = CONFIG.format(n_layers=n_layers, steps=steps)
    open_store(plan.request.run_url).write("config.yaml", text.encode())

    problems = check_run(plan).problems

    assert problems == (
        (
            f"{plan.request.run_url} is a run of other settings ({words}): give this one another"
            " name with RUN=, or the settings of that one",
        )
        if words
        else ()
    )


def test_a_run_whose_batch_the_node_chose_is_continued(plan_of, tmp_path):
    plan = plan_of(run=f"file://{tmp_path}/x", params="1.2B", tokens="10B")
    shape = plan.workload.config
    identity = (
        f"identity:\n  model: {{n_layers: {shape.n_layers}, d_model: {shape.d_model}}}\n"
        "  train: {steps: 9537, global_batch_size: 512, context_length: 2048}\n"
    )
    open_store(plan.request.run_url).write("config.yaml", identity.encode())

    assert check_run(plan).problems == ()


def test_a_checkpoint_of_a_base_may_be_named(plan_of, tmp_path):
    base = open_store(str(tmp_path / "base"))
    claim(base, parent=None)
    base.write("checkpoints/step-00000001-a1/manifest.json", b"{}")
    base.write("config.yaml", CONFIG.format(n_layers=24, steps=1).encode())
    plan = plan_of(
        job="sft", run=f"file://{tmp_path}/sft", start_from="s3://b/x", preset="350m", is_spot=False
    )

    assert check_base(plan, f"{base.url}@18000").problems == ()


def test_a_base_of_another_size_than_planned_is_told(plan_of, tmp_path):
    base = open_store(str(tmp_path / "base"))
    claim(base, parent=None)
    base.write("checkpoints/step-00000001-a1/manifest.json", b"{}")
    base.write("config.yaml", CONFIG.format(n_layers=12, steps=1).encode())
    plan = plan_of(
        job="sft", run=f"file://{tmp_path}/sft", start_from="s3://b/x", preset="350m", is_spot=False
    )

    assert check_base(plan, base.url).problems == (
        f"{base.url} is not of the planned size (model.n_layers is 12 there and 24 here): add the"
        " PRESET= or PARAMS= that it was made with",
    )


def test_all_problems_are_told_at_once_and_each_once(bare_laptop, plan_of, monkeypatch):
    plan = plan_of(settings=("log.wandb=online",))

    found = preflight(plan, Surroundings({}, is_dirty_allowed=True))

    assert sum("aws configure" in problem for problem in found.problems) == 1
    assert sum("WANDB_API_KEY" in problem for problem in found.problems) == 1


def test_an_unknown_gpu_is_told_with_the_nearest(plan_of):
    with pytest.raises(ConfigError, match="there is no GPU 'A1000', did you mean A100"):
        plan_of(gpu="A1000:8")
