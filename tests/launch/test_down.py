import pytest

from launch import aws
from launch.down import TearDown

LABELS = {"project": "casallm", "casallm-run": "casallm-x-123456"}
REGIONS = ("us-east-1", "us-west-2")
IMAGE = "ami-12c6146b"  # one that moto knows


def rent(account, region: str, labels: dict[str, str]) -> str:
    """An instance and a volume of its own, labelled as SkyPilot labels them."""
    ec2 = account.client("ec2", region_name=region)
    tags = [{"Key": key, "Value": value} for key, value in labels.items()]
    specs = [{"ResourceType": kind, "Tags": tags} for kind in ("instance", "volume")]
    reservation = ec2.run_instances(
        ImageId=IMAGE, MinCount=1, MaxCount=1, InstanceType="p4d.24xlarge", TagSpecifications=specs
    )
    return reservation["Instances"][0]["InstanceId"]


def test_what_carries_the_labels_is_found_in_every_region_and_nothing_else(account):
    ours = [rent(account, region, LABELS) for region in REGIONS]
    rent(account, "us-east-1", {**LABELS, "casallm-run": "another"})

    found = aws.leftovers(REGIONS, LABELS)

    assert sorted(each.id for each in found if each.kind == "instance") == sorted(ours)


def test_an_instance_that_is_removed_is_gone_with_its_volume(account):
    rent(account, "us-east-1", LABELS)

    for each in aws.leftovers(REGIONS, LABELS):
        if each.kind == "instance":
            aws.remove(each)

    assert aws.leftovers(REGIONS, LABELS) == []


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


@pytest.mark.parametrize(
    ("left", "is_proven", "last"),
    [
        ((), True, "nothing left"),
        ((), False, "nothing left that SkyPilot knows of; look into the cloud's console once"),
        (("instance i-1",), True, "run `make down` again; the console of the cloud shows the rest"),
    ],
)
def test_the_end_says_what_it_proved(left, is_proven, last):
    text = TearDown(("cluster c",), left, is_proven).text(12.5)

    lines = text.splitlines()
    assert lines[:2] == ["ended cluster c", "the machines of this run cost $12.50"]
    assert lines[-1] == last
