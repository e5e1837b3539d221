import pytest

from casallm.errors import CloudError
from casallm.storage.store import open_store
from launch import cluster, up
from launch.progress import RunProgress
from launch.up import bring_home, follow, launch_plan, prepare_task, three_commands, train_task

KEYS = {
    "WANDB_API_KEY": "w",
    "HF_TOKEN": "h",
    "AWS_ACCESS_KEY_ID": "a",
    "AWS_SECRET_ACCESS_KEY": "s",
}


def test_the_task_carries_the_plan_to_the_node(plan_of):
    plan = plan_of(
        run="s3://ours/x", preset="350m", budget="80", deadline="20h", region="us-east-1"
    )

    task = train_task(plan, {})

    assert task["name"] == plan.name
    assert task["envs"]["RUN"] == "s3://ours/x"
    assert (task["envs"]["BUDGET"], task["envs"]["DEADLINE"]) == ("80", "20")
    assert task["envs"]["OFFERS"].startswith("aws/us-east-1/p4d.24xlarge=6.28")
    assert task["resources"]["max_hourly_cost"] == plan.max_hourly_usd
    assert task["resources"]["labels"]["casallm-run"] == plan.name
    assert [each["infra"] for each in task["resources"]["ordered"]] == ["aws/us-east-1"] * 3


def test_machines_in_aws_get_no_keys_of_aws(plan_of):
    task = train_task(plan_of(), KEYS)

    assert task["secrets"]["WANDB_API_KEY"] == "w"
    assert task["secrets"]["AWS_ACCESS_KEY_ID"] == ""


def test_machines_elsewhere_get_the_keys_of_the_bucket_as_secrets(plan_of):
    task = train_task(plan_of(cloud="lambda", is_spot=False, gpu="A100:8"), KEYS)

    assert task["secrets"]["AWS_SECRET_ACCESS_KEY"] == "s"
    assert "s" not in task["envs"].values()


def test_shards_of_a_bucket_are_trained_on_by_their_url(plan_of):
    there = train_task(plan_of(data="s3://ours/data/fineweb"), {})
    made = train_task(plan_of(data="org/name:sample", bucket="s3://ours"), {})

    assert there["envs"]["DATA"] == "s3://ours/data/fineweb"
    assert made["envs"]["DATA"] == "s3://ours/data/name-sample-c55b24"


def test_documents_are_prepared_with_the_vocabulary_of_the_model(plan_of):
    plan = plan_of(preset="tiny", data="fineweb-edu", bucket="s3://ours")

    task = prepare_task(plan, KEYS)

    assert task["envs"]["DATA"] == "fineweb-edu"
    assert task["envs"]["OUT"] == "s3://ours/data/fineweb-edu-6efebf"
    assert task["envs"]["VOCAB_SIZE"] == "4096"
    assert "WANDB_API_KEY" not in task["secrets"]


@pytest.fixture
def skypilot(monkeypatch):
    """SkyPilot as far as `launch_plan` asks it: what stands under which name, what was begun."""
    stands, begun = {}, []
    monkeypatch.setattr(cluster, "settle", lambda name: None)
    monkeypatch.setattr(cluster, "standing", lambda name: stands.get(name, cluster.Standing()))
    monkeypatch.setattr(cluster, "submit_job", lambda task, name: begun.append(name))
    monkeypatch.setattr(up, "reconcile", lambda plan: begun.append("reconcile"))
    return stands, begun


def test_what_an_earlier_start_left_is_ended_before_another_begins(skypilot, plan_of):
    plan, (_, begun) = plan_of(), skypilot

    launch_plan(plan, {})

    assert begun == ["reconcile", plan.name]


def test_a_run_that_is_live_is_not_started_twice(skypilot, plan_of):
    plan, (stands, begun) = plan_of(), skypilot
    stands[plan.name] = cluster.Standing(kind="job", status="RECOVERING")

    launch_plan(plan, {})

    assert begun == []


def test_a_machine_that_still_prepares_data_is_not_taken_for_a_leftover(skypilot, plan_of):
    plan, (stands, begun) = plan_of(), skypilot
    stands[f"{plan.name}-data"] = cluster.Standing(kind="cluster", status="UP")

    launch_plan(plan, {})

    assert begun == [plan.name]


@pytest.mark.parametrize(("job", "begins"), [("RUNNING", False), ("FAILED_SETUP", True)])
def test_a_cluster_whose_job_has_ended_gets_another(skypilot, plan_of, monkeypatch, job, begins):
    plan, (stands, begun) = plan_of(is_spot=False), skypilot
    stands[plan.name] = cluster.Standing(kind="cluster", status="UP")
    monkeypatch.setattr(cluster, "cluster_job_status", lambda name: job)
    monkeypatch.setattr(cluster, "ends_itself", lambda name: True)
    monkeypatch.setattr(
        cluster, "launch_cluster", lambda task, name, wait_hours: begun.append(name)
    )

    launch_plan(plan, {})

    assert begun == ([plan.name] if begins else [])


def test_a_server_that_does_not_answer_is_no_reason_to_stop_following(plan_of, monkeypatch):
    answers = iter([CloudError("slow"), cluster.Standing(kind="job", status="FAILED")])

    def standing(name):
        answer = next(answers)
        if isinstance(answer, CloudError):
            raise answer
        return answer

    monkeypatch.setattr(cluster, "standing", standing)
    monkeypatch.setattr(up, "read_progress", lambda run: RunProgress(run.url))
    monkeypatch.setattr(up, "FOLLOW_SECONDS", 0)
    monkeypatch.setattr(up, "ASK_SECONDS", 0)

    ending = follow(plan_of(run="s3://ours/x"))

    assert ending.reason == "the job ended (FAILED): it never began"


def test_several_nodes_ask_for_the_fast_network(plan_of):
    task = train_task(plan_of(nodes=2), {})

    assert (task["num_nodes"], task["resources"]["network_tier"]) == (2, "best")


def test_what_comes_home_is_the_report_and_the_model_and_no_checkpoint(tmp_path):
    run = open_store(str(tmp_path / "run"))
    kept = [
        "config.yaml",
        "finished.json",
        "metrics.jsonl",
        "model/model.safetensors",
        "report.html",
    ]
    for name in [*kept, "checkpoints/step-00000001-a1/manifest.json", "attempts/000001/x.json"]:
        run.write(name, name.encode())

    bring_home(run.url, tmp_path / "home")

    home = tmp_path / "home"
    assert sorted(str(p.relative_to(home)) for p in home.rglob("*") if p.is_file()) == kept


def test_leaving_prints_the_three_commands_that_matter():
    assert three_commands("s3://ours/x") == (
        "it goes on without this computer:\n"
        "  make status RUN=s3://ours/x\n"
        "  make logs RUN=s3://ours/x\n"
        "  make down RUN=s3://ours/x"
    )
