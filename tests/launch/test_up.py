import math
from dataclasses import replace

import pytest

from casallm.errors import CloudError
from casallm.storage.store import open_store
from launch import aws, cluster, launching, up
from launch.request import LaunchRequest, cluster_name, run_labels
from launch.sky_errors import NoCapacityError, NotUpError
from launch.up import launch_plan, prepare_task, three_commands, train_task

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
    assert task["resources"]["labels"]["casallm-run"] == plan.name
    places = task["resources"]["ordered"]
    assert [each["infra"] for each in places] == ["aws/us-east-1"] * len(plan.candidates)
    assert [each["max_hourly_cost"] for each in places] == [
        pytest.approx(1.5 * candidate.usd_per_hour, abs=0.011) for candidate in plan.candidates
    ]


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
    assert task["envs"]["HOURS"] == f"{plan.prepare_hours:g}"
    assert "WANDB_API_KEY" not in task["secrets"]


@pytest.fixture
def skypilot(monkeypatch, tmp_path):
    """SkyPilot as far as `launch_plan` asks it: what stands under which name, what was begun."""
    stands, begun = {}, []
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(cluster, "settle", lambda name: None)
    monkeypatch.setattr(cluster, "standing", lambda name: stands.get(name, cluster.Standing()))
    monkeypatch.setattr(cluster, "submit_job", lambda task, name: begun.append(name))
    monkeypatch.setattr(cluster, "launch_cluster", lambda task, name: begun.append(name))
    monkeypatch.setattr(cluster, "has_cluster", lambda name: name in stands)
    monkeypatch.setattr(cluster, "end_cluster", lambda name: begun.append(f"end {name}"))
    monkeypatch.setattr(cluster, "end_job", lambda name: begun.append(f"end {name}"))
    monkeypatch.setattr(cluster, "cancel_launches", lambda name: False)
    monkeypatch.setattr(cluster, "ends_itself", lambda name: True)
    monkeypatch.setattr(cluster, "cluster_job_status", lambda name: "")
    monkeypatch.setattr(cluster, "last_words", lambda name: begun.append(f"words of {name}"))
    monkeypatch.setattr(cluster, "end_idle_controller", lambda: False)
    monkeypatch.setattr(up, "reconcile", lambda plan: begun.append("reconcile"))
    monkeypatch.setattr(up, "CAPACITY_POLL_SECONDS", 0)
    monkeypatch.setattr(up, "PREPARE_POLL_SECONDS", 0)
    return stands, begun


def rented(account, plan):
    """A running machine that carries the label of the plan's run."""
    ec2 = account.client("ec2", region_name=plan.candidates[0].offer.region)
    tags = [{"Key": key, "Value": value} for key, value in run_labels(plan.request.run_url).items()]
    machine = ec2.run_instances(
        ImageId="ami-12c6146b",
        MinCount=1,
        MaxCount=1,
        InstanceType="p4d.24xlarge",
        TagSpecifications=[{"ResourceType": "instance", "Tags": tags}],
    )["Instances"][0]["InstanceId"]
    return lambda: ec2.describe_instances(InstanceIds=[machine])["Reservations"][0]["Instances"][0][
        "State"
    ]["Name"]


def test_the_machine_of_another_computers_launch_is_not_ended(account, plan_of, monkeypatch):
    plan = plan_of(run="s3://ours/x")
    state = rented(account, plan)
    monkeypatch.setattr(cluster, "cluster_names", set)
    monkeypatch.setattr(cluster, "job_names", set)

    with pytest.raises(CloudError, match=r"which this computer's SkyPilot did not rent: the run g"):
        up.reconcile(plan)

    assert state() == "running"


def test_the_machine_of_an_earlier_start_is_ended(account, plan_of, monkeypatch):
    plan = plan_of(run="s3://ours/x")
    state = rented(account, plan)
    monkeypatch.setattr(cluster, "cluster_names", set)
    monkeypatch.setattr(cluster, "job_names", lambda: {plan.name})

    up.reconcile(plan)

    assert state() in ("shutting-down", "terminated")


def test_a_machine_that_is_going_already_is_nobody_elses(account, plan_of, monkeypatch):
    plan = plan_of(run="s3://ours/x")
    rented(account, plan)
    seen = aws.survey([plan.candidates[0].offer.region], run_labels(plan.request.run_url)).found
    going = aws.Survey(tuple(replace(each, state="shutting-down") for each in seen))
    monkeypatch.setattr(aws, "survey", lambda regions, labels: going)
    monkeypatch.setattr(cluster, "cluster_names", set)
    monkeypatch.setattr(cluster, "job_names", set)

    up.reconcile(plan)


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

    launch_plan(plan, {})

    assert begun == ([f"end {plan.name}", plan.name] if begins else [])


def test_a_cluster_that_skypilot_does_not_reach_is_neither_ended_nor_launched_on(
    skypilot, plan_of, monkeypatch
):
    plan, (stands, begun) = plan_of(is_spot=False, run="s3://ours/x"), skypilot
    stands[plan.name] = cluster.Standing(kind="cluster", status="INIT")

    def unreachable(name):
        raise NotUpError("no connection")

    monkeypatch.setattr(cluster, "cluster_job_status", unreachable)

    with pytest.raises(CloudError) as refused:
        launch_plan(plan, {})

    assert str(refused.value) == (
        f"SkyPilot has {plan.name} and does not reach it (no connection): where `make status"
        " RUN=s3://ours/x` shows no progress, `make down` with the same RUN ends it, and this"
        " command begins anew"
    )
    assert begun == []


def test_a_machine_that_would_not_end_itself_is_ended(skypilot, plan_of, monkeypatch):
    plan, (_, begun) = plan_of(is_spot=False), skypilot

    def unsaid(name):
        raise CloudError("slow")

    monkeypatch.setattr(cluster, "ends_itself", unsaid)

    with pytest.raises(CloudError, match="slow"):
        launch_plan(plan, {})

    assert begun == ["reconcile", plan.name, f"end {plan.name}"]


def sold_out(begun: list[str], *, times: float = math.inf):
    """A `launch_cluster` that gets a machine only after so many refusals."""

    def launch_cluster(task, name):
        begun.append(f"ask {name}")
        if begun.count(f"ask {name}") <= times:
            raise NoCapacityError("no machine of the plan is to be had now (AWS: none)")

    return launch_cluster


def test_machines_that_are_sold_out_are_asked_for_again_and_that_is_said_once(
    skypilot, plan_of, monkeypatch, caplog
):
    plan, (_, begun) = plan_of(is_spot=False), skypilot
    monkeypatch.setattr(cluster, "launch_cluster", sold_out(begun, times=3))

    launch_plan(plan, {})

    assert begun == ["reconcile", *[f"ask {plan.name}"] * 4]
    assert caplog.text.count("no machine of the plan is to be had now (AWS: none): asking") == 1


def test_the_wait_for_machines_has_an_end_and_says_what_to_do(skypilot, plan_of, monkeypatch):
    plan, (_, begun) = plan_of(is_spot=False), skypilot
    monkeypatch.setattr(cluster, "launch_cluster", sold_out(begun))
    monkeypatch.setattr(up, "CAPACITY_HOURS", 0)
    monkeypatch.setattr(up, "CAPACITY_POLL_SECONDS", 1)

    with pytest.raises(CloudError) as ended:
        launch_plan(plan, {})

    assert str(ended.value) == (
        "no machine of the plan is to be had now (AWS: none), and was not within 0 hours: nothing"
        " is rented; run the same command again later, or add REGION=, GPU= or SPOT="
    )
    assert begun == ["reconcile", f"ask {plan.name}"]


def test_a_launch_that_was_called_off_asks_for_nothing_more(skypilot, plan_of, monkeypatch):
    plan, (_, begun) = plan_of(is_spot=False), skypilot
    refused = sold_out(begun)

    def launch_cluster(task, name):
        launching.withdraw(name)
        refused(task, name)

    monkeypatch.setattr(cluster, "launch_cluster", launch_cluster)

    with pytest.raises(CloudError, match="was called off by `make down`: nothing is rented"):
        launch_plan(plan, {})

    assert begun == ["reconcile", f"ask {plan.name}"]


@pytest.mark.parametrize(("is_spot", "begin"), [(False, "launch_cluster"), (True, "submit_job")])
def test_what_was_rented_while_down_was_at_work_is_ended(
    skypilot, plan_of, monkeypatch, is_spot, begin
):
    plan, (_, begun) = plan_of(is_spot=is_spot), skypilot
    monkeypatch.setattr(cluster, begin, lambda task, name: launching.withdraw(name))

    with pytest.raises(CloudError, match="called off"):
        launch_plan(plan, {})

    assert begun == ["reconcile", f"end {plan.name}"]


def test_a_second_start_takes_over_and_ends_nothing_of_the_first(skypilot, plan_of, monkeypatch):
    plan, (_, begun) = plan_of(is_spot=False), skypilot

    def another(task, name):
        with launching.announced(name):
            begun.append("another")

    monkeypatch.setattr(cluster, "launch_cluster", another)

    launch_plan(plan, {})

    assert begun == ["reconcile", "another"]


def documents(plan_of, tmp_path):
    """A plan whose documents must be prepared, into a bucket of this machine."""
    plan = plan_of(data="org/words", bucket="s3://ours", is_spot=False)
    object.__setattr__(plan.workload, "data_url", str(tmp_path / "shards"))
    return plan


@pytest.mark.parametrize("job", ["FAILED", "SUCCEEDED"])
def test_documents_that_give_no_shards_end_their_machine(
    skypilot, plan_of, tmp_path, monkeypatch, job
):
    plan, (stands, begun) = documents(plan_of, tmp_path), skypilot
    stands[f"{plan.name}-data"] = cluster.Standing(kind="cluster", status="UP")
    monkeypatch.setattr(cluster, "cluster_job_status", lambda name: job)

    with pytest.raises(CloudError, match="preparing org/words made no shards"):
        launch_plan(plan, {})

    data = f"{plan.name}-data"
    assert begun == [f"end {data}", data, f"words of {data}", f"end {data}"]


def test_a_machine_that_vanished_while_it_prepared_is_not_waited_for(skypilot, plan_of, tmp_path):
    plan, (_, begun) = documents(plan_of, tmp_path), skypilot

    with pytest.raises(CloudError, match="the same command goes on where it stopped"):
        launch_plan(plan, {})

    data = f"{plan.name}-data"
    assert begun == ["reconcile", f"end {data}", data, f"words of {data}", f"end {data}"]


def test_preparing_that_takes_too_long_is_ended(skypilot, plan_of, tmp_path, monkeypatch):
    plan, (stands, begun) = documents(plan_of, tmp_path), skypilot
    stands[f"{plan.name}-data"] = cluster.Standing(kind="cluster", status="UP")
    monkeypatch.setattr(cluster, "cluster_job_status", lambda name: "RUNNING")
    ticks = iter(range(0, 10**9, 3600))
    monkeypatch.setattr(up.time, "monotonic", lambda: next(ticks))

    with pytest.raises(CloudError, match=f"at most {plan.prepare_hours:g} h were allowed"):
        launch_plan(plan, {})

    data = f"{plan.name}-data"
    assert begun == [f"words of {data}", f"end {data}"]  # and no second job beside the one that ran


def test_a_server_that_does_not_answer_ends_no_machine_that_prepares(
    skypilot, plan_of, tmp_path, monkeypatch
):
    plan, (stands, begun) = documents(plan_of, tmp_path), skypilot
    stands[f"{plan.name}-data"] = cluster.Standing(kind="cluster", status="UP")
    answers = iter(["RUNNING", *[CloudError("slow")] * 5])

    def job_status(name):
        answer = next(answers, None)
        if answer is None:
            open_store(plan.workload.data_url).write("manifest.json", b"{}")
            answer = "SUCCEEDED"
        if isinstance(answer, CloudError):
            raise answer
        return answer

    monkeypatch.setattr(cluster, "cluster_job_status", job_status)

    launch_plan(plan, {})

    assert begun == [f"end {plan.name}-data", plan.name]


def test_a_start_that_is_killed_leaves_no_word_that_stops_the_next(skypilot, plan_of, tmp_path):
    plan, (_, begun) = plan_of(), skypilot
    word = tmp_path / ".cache/casallm/launching" / cluster_name(plan.request.run_url)
    word.parent.mkdir(parents=True)
    word.write_text(launching.CALLED_OFF)

    launch_plan(plan, {})

    assert begun == ["reconcile", plan.name]
    assert word.read_text() == launching.LAUNCHED
    assert launching.withdraw(plan.name) == []  # there is no launcher any more to call off


def test_several_nodes_ask_for_the_fast_network(plan_of):
    task = train_task(plan_of(nodes=2), {})

    assert (task["num_nodes"], task["resources"]["network_tier"]) == (2, "best")


@pytest.mark.parametrize(
    ("cloud", "is_launched", "lines"),
    [
        (
            "aws",
            True,
            [
                "it goes on without this computer, also while it waits for a machine:",
                "  make status RUN=s3://ours/x",
                "  make logs RUN=s3://ours/x",
                "  make down RUN=s3://ours/x",
            ],
        ),
        (
            "lambda",
            False,
            [
                "it may be being launched still: the same command again goes on, or",
                "  make status RUN=s3://ours/x",
                "  make logs RUN=s3://ours/x",
                "  make down RUN=s3://ours/x CLOUD=lambda",
            ],
        ),
    ],
)
def test_leaving_prints_the_three_commands_that_matter(cloud, is_launched, lines):
    request = LaunchRequest(run="s3://ours/x", cloud=cloud)

    assert three_commands(request, is_launched=is_launched).splitlines() == lines
