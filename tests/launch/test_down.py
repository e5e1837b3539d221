from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace

import pytest
from botocore.exceptions import ClientError

from casallm.errors import CloudError
from launch import aws, cluster, down, launching
from launch.down import TearDown
from launch.request import cluster_name, run_labels

LABELS = {"project": "casallm", "casallm-run": "casallm-x-123456"}
REGIONS = ("us-east-1", "us-west-2")
IMAGE = "ami-12c6146b"  # one that moto knows


def rent(account, region: str, labels: dict[str, str], *, is_spot: bool = False) -> str:
    """An instance and a volume of its own, labelled as SkyPilot labels them."""
    ec2 = account.client("ec2", region_name=region)
    tags = [{"Key": key, "Value": value} for key, value in labels.items()]
    specs = [{"ResourceType": kind, "Tags": tags} for kind in ("instance", "volume")]
    reservation = ec2.run_instances(
        ImageId=IMAGE,
        MinCount=1,
        MaxCount=1,
        InstanceType="p4d.24xlarge",
        TagSpecifications=specs,
        **({"InstanceMarketOptions": {"MarketType": "spot"}} if is_spot else {}),
    )
    return reservation["Instances"][0]["InstanceId"]


def test_what_carries_the_labels_is_found_in_every_region_and_nothing_else(account):
    ours = [rent(account, region, LABELS) for region in REGIONS]
    rent(account, "us-east-1", {**LABELS, "casallm-run": "another"})

    seen = aws.survey(REGIONS, LABELS)

    assert sorted(each.id for each in seen.found if each.kind == "instance") == sorted(ours)


def test_an_instance_that_is_removed_is_gone_with_its_volume(account):
    rent(account, "us-east-1", LABELS)

    for each in aws.survey(REGIONS, LABELS).found:
        if each.kind == "instance":
            aws.remove(each)

    assert aws.survey(REGIONS, LABELS) == aws.Survey(())


def test_removing_what_is_gone_already_is_fine(account):
    aws.remove(aws.Leftover("instance", "i-0123456789abcdef0", "us-east-1", "running"))
    aws.remove(aws.Leftover("upload", "run/x#nothing", "no-such-bucket", "unfinished"))


def test_unfinished_uploads_of_the_run_are_found_and_ended(account):
    aws.create_bucket("ours", "us-east-1")
    s3 = account.client("s3")
    s3.create_multipart_upload(Bucket="ours", Key="run/checkpoints/model")
    s3.create_multipart_upload(Bucket="ours", Key="other/model")

    found = aws.unfinished_uploads("ours", "run/")
    for each in found:
        aws.remove(each)

    assert [each.id.partition("#")[0] for each in found] == ["run/checkpoints/model"]
    left = s3.list_multipart_uploads(Bucket="ours")["Uploads"]
    assert [upload["Key"] for upload in left] == ["other/model"]


def denied(operation: str, code: str = "UnauthorizedOperation") -> Exception:
    return ClientError({"Error": {"Code": code, "Message": "no"}}, operation)


def closing(monkeypatch, regions, code="UnauthorizedOperation"):
    """Let a policy close the regions given to this user."""
    look = aws._left_in

    def left_in(region, ec2, labels):
        if region in regions:
            raise denied("DescribeInstances", code)
        return look(region, ec2, labels)

    monkeypatch.setattr(aws, "_left_in", left_in)


def test_a_region_that_a_policy_closes_hides_no_other(account, monkeypatch):
    ours = rent(account, "us-west-2", LABELS)
    closing(monkeypatch, ["us-east-1"])

    seen = aws.survey(REGIONS, LABELS)

    assert ours in {each.id for each in seen.found}
    assert seen.closed == ("us-east-1",)


def test_where_every_region_is_closed_nothing_is_proven(account, monkeypatch):
    closing(monkeypatch, REGIONS)

    with pytest.raises(CloudError, match="AWS does not let you DescribeInstances: attach the pol"):
        aws.survey(REGIONS, LABELS)


def test_a_busy_aws_is_not_taken_for_a_closed_region(account, monkeypatch):
    closing(monkeypatch, ["us-east-1"], code="RequestLimitExceeded")

    with pytest.raises(CloudError, match="AWS refused DescribeInstances"):
        aws.survey(REGIONS, LABELS)


def test_what_aws_refuses_to_end_is_said(account, monkeypatch):
    def refuse(leftover):
        raise denied("TerminateInstances")

    monkeypatch.setattr(aws, "_remove", refuse)

    with pytest.raises(CloudError, match="AWS does not let you TerminateInstances"):
        aws.remove(aws.Leftover("instance", "i-0123456789abcdef0", "us-east-1", "running"))


def _answer(has, answer):
    if has.is_silent:
        raise CloudError("SkyPilot's controller of managed jobs does not answer")
    return answer


@pytest.fixture
def skypilot(account, monkeypatch, tmp_path):
    """SkyPilot as far as `down` asks it, over moto's AWS: what it has, and what was ended."""
    has = SimpleNamespace(launches={}, jobs={}, clusters=[], controller=None, is_shared=False)
    has.is_silent = False
    ended = []

    def standing(name):
        return has.jobs.get(name, cluster.Standing())

    def end(name):
        ended.append(name)
        has.jobs.pop(name, None)
        has.clusters = [each for each in has.clusters if each != name]

    def end_idle_controller():
        is_ended = bool(has.controller) and not has.jobs and not has.is_shared
        has.controller = None if is_ended else has.controller
        return is_ended

    monkeypatch.setattr(aws, "enabled_regions", lambda: list(REGIONS))
    monkeypatch.setattr(down, "SETTLE_SECONDS", 0)
    monkeypatch.setattr(down, "POLL_SECONDS", 0)
    for name, answer in {
        "launches": lambda: has.launches,
        "cancel_launches": lambda name: bool(has.launches.pop(name, None)),
        "standing": standing,
        "has_cluster": lambda name: name in has.clusters,
        "job_names": lambda: _answer(has, set(has.jobs)),
        "cluster_names": lambda: set(has.clusters),
        "live_names": lambda: _answer(has, sorted({*has.jobs, *has.clusters})),
        "controller": lambda: has.controller,
        "end_job": end,
        "end_cluster": end,
        "end_idle_controller": end_idle_controller,
    }.items():
        monkeypatch.setattr(cluster, name, answer)
    return has, ended


RUN = "s3://ours/x"
NAME = cluster_name(RUN)
RUNNING = cluster.Standing(kind="job", status="RUNNING", job_id=4)


def test_down_ends_job_data_machine_launch_and_controller(skypilot):
    has, ended = skypilot
    has.jobs, has.clusters, has.controller = {NAME: RUNNING}, [f"{NAME}-data"], "UP"
    has.launches = {NAME: ["request"]}

    result = down.tear_down(RUN)

    assert ended == [NAME, f"{NAME}-data"]
    assert result.is_clean
    assert result.text(None).splitlines() == [
        f"ended launch of {NAME}",
        f"ended managed job 4 ({NAME})",
        f"ended cluster {NAME}-data",
        "ended SkyPilot's controller",
        "nothing left",
    ]


def test_a_controller_that_has_other_work_stays_and_is_named(skypilot):
    has, _ = skypilot
    has.jobs, has.controller, has.is_shared = {NAME: RUNNING}, "UP", True

    assert down.tear_down(RUN).text(None).splitlines()[1:] == [
        "SkyPilot's controller stays: it has other jobs, or had others'",
        "nothing left",
    ]


def test_an_idle_controller_is_ended_though_nothing_else_runs(skypilot):
    has, _ = skypilot
    has.controller = "UP"

    assert down.tear_down(None).text(None) == "ended SkyPilot's controller\nnothing left"


def rent_controller(account, region: str) -> str:
    """A controller as another computer's SkyPilot has it: with a name, and without our label."""
    return rent(account, region, {"Name": "sky-jobs-controller-abc123-def"})


def test_another_computers_controller_makes_the_end_of_an_unknown_run_uncertain(skypilot, account):
    other = rent_controller(account, "us-west-2")

    lines = down.tear_down(RUN).text(None).splitlines()

    assert lines == [
        f"controller {other} in us-west-2 is of another computer's SkyPilot: left alone",
        f"not certain: {NAME} is no launch of this computer's SkyPilot: if another still watches"
        " it, that one rents again, so run `make down` there",
        "run `make down` again; the console of the cloud shows the rest",
    ]


@pytest.mark.parametrize("known", [NAME, "sky-jobs-controller-abc123"])
def test_what_this_computers_skypilot_launched_is_certain(skypilot, account, known):
    has, _ = skypilot
    rent_controller(account, "us-west-2")
    has.jobs = {NAME: replace(RUNNING, status="SUCCEEDED")}
    has.clusters = [known] if known != NAME else []

    result = down.tear_down(RUN)

    assert (result.is_clean, len(result.notes)) == (True, int(known == NAME))


def test_a_controller_that_does_not_answer_keeps_no_cluster_and_no_launch_alive(skypilot, account):
    has, ended = skypilot
    own = "sky-jobs-controller-abc123"
    has.is_silent, has.clusters = True, ["casallm-a-123456", own]
    has.launches = {"casallm-b-123456": ["request"]}
    rent_controller(account, "us-west-2")

    result = down.tear_down(None)

    assert ended == ["casallm-a-123456"]
    assert "launch of casallm-b-123456" in result.ended
    assert result.problems == ["SkyPilot's controller of managed jobs does not answer"]
    assert not [note for note in result.notes if "another computer" in note]


def test_a_run_that_was_launched_from_here_is_certain_also_when_its_records_are_gone(
    skypilot, account
):
    rent_controller(account, "us-west-2")
    with launching.announced(NAME):
        pass

    assert down.tear_down(RUN).is_clean


def test_uploads_that_nobody_can_be_at_any_longer_are_ended_with_everything(skypilot, account):
    aws.create_bucket("casallm-123456789012", "us-east-1")
    s3 = account.client("s3")
    s3.create_multipart_upload(Bucket="casallm-123456789012", Key="run/checkpoints/model")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(down, "DEAD_UPLOAD", timedelta(days=40_000))
        fresh = down.tear_down(None)
    old = down.tear_down(None)  # for moto every upload was begun in 2010

    assert (fresh.ended, len(old.ended)) == ([], 1)
    assert "Uploads" not in s3.list_multipart_uploads(Bucket="casallm-123456789012")


def test_what_skypilot_cannot_end_is_still_ended_in_aws(skypilot, account, monkeypatch):
    has, _ = skypilot
    has.jobs = {NAME: RUNNING}
    ours = rent(account, "us-west-2", run_labels(RUN))

    def refuse(name):
        raise CloudError("SkyPilot has not cancelled it within 10 minutes")

    monkeypatch.setattr(cluster, "end_job", refuse)

    result = down.tear_down(RUN)

    assert any(ours in each for each in result.ended)
    assert not result.is_clean  # the job may be recovered: nobody may believe it is gone
    assert result.text(None).splitlines()[-2:] == [
        "not certain: SkyPilot has not cancelled it within 10 minutes",
        "run `make down` again; the console of the cloud shows the rest",
    ]


def test_one_thing_that_refuses_to_end_keeps_no_other(skypilot, account, monkeypatch):
    instances = [rent(account, region, run_labels(RUN)) for region in REGIONS]
    monkeypatch.setattr(down, "GONE_SECONDS", 0.5)
    remove = aws._remove

    def refuse_one(leftover):
        if leftover.id == instances[0]:
            raise denied("TerminateInstances")
        remove(leftover)

    monkeypatch.setattr(aws, "_remove", refuse_one)

    result = down.tear_down(RUN)

    assert [each for each in result.left if "instance" in each] == [
        f"instance {instances[0]} in us-east-1 (running)"
    ]
    assert result.problems == [
        "AWS does not let you TerminateInstances: attach the policy of"
        " docs/guides/pretrain-on-aws.md to your user"
    ]


def test_a_bucket_that_cannot_be_looked_into_keeps_no_machine_alive(skypilot, account, monkeypatch):
    rent(account, "us-east-1", run_labels(RUN))

    def refuse(bucket):
        raise CloudError("bucket s3://ours belongs to somebody else")

    monkeypatch.setattr(aws, "bucket_region", refuse)

    result = down.tear_down(RUN)

    assert (result.left, result.problems) == ([], ["bucket s3://ours belongs to somebody else"])


def test_spot_machines_of_another_computers_skypilot_are_ended_and_not_called_gone(
    skypilot, account
):
    rent(account, "us-east-1", run_labels(RUN), is_spot=True)

    first, second = down.tear_down(RUN), down.tear_down(RUN)

    assert first.left == []
    assert first.problems == [
        f"{NAME} is no launch of this computer's SkyPilot: if another still watches it, that one"
        " rents again, so run `make down` there"
    ]
    assert second.is_clean


def test_a_spot_machine_that_skypilot_remembers_is_simply_ended(skypilot, account):
    has, _ = skypilot
    has.jobs = {NAME: replace(RUNNING, status="CANCELLED")}
    rent(account, "us-east-1", run_labels(RUN), is_spot=True)

    assert down.tear_down(RUN).is_clean


def test_down_calls_off_a_launcher_that_waits(skypilot):
    with launching.announced(NAME) as waiting, launching.announced("casallm-other") as other:
        down.tear_down(RUN)

        assert (waiting.is_called_off, other.is_called_off) == (True, False)
        down.tear_down(None)
        assert other.is_called_off


@pytest.mark.parametrize(
    ("result", "last"),
    [
        (TearDown(is_proven=True), "nothing left"),
        (TearDown(), "nothing left that SkyPilot knows of; look into the cloud's console once"),
        (
            TearDown(left=["instance i-1"]),
            "run `make down` again; the console of the cloud shows the rest",
        ),
    ],
)
def test_the_end_says_what_it_proved(result, last):
    lines = replace(result, ended=["cluster c"]).text(12.5).splitlines()

    assert lines[:2] == ["ended cluster c", "the machines of this run cost $12.50"]
    assert lines[-1] == last


def test_regions_that_were_not_looked_at_are_named(skypilot, monkeypatch):
    closing(monkeypatch, ["us-east-1"])

    assert down.tear_down(RUN).text(None).splitlines() == [
        "not looked at, for AWS closes it to you: us-east-1",
        "nothing left",
    ]
