"""What AWS itself says: who we are, whether a bucket and a quota will do, and what is still there.

SkyPilot's own records are not asked here, so that what it has lost track of is found as well.
Everything that is rented for a run carries its label (an EC2 tag on instances and volumes).
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from casallm.errors import CloudError, MissingExtraError

T = TypeVar("T")

PARALLEL = 8

CONTROLLER = "sky-jobs-controller-"
"""How SkyPilot names the machine that watches managed jobs."""

RUN_LABEL = "casallm-run"
"""The tag that says of which run a machine is."""

GONE = ("terminated",)
"""States of an instance that bills nothing and will not come back."""

DENIED = ("AccessDenied", "UnauthorizedOperation", "AccessDeniedException")
"""What AWS answers to somebody who may not do a thing."""

CLOSED = (*DENIED, "AuthFailure", "OptInRequired")
"""What it answers where a whole region is closed to somebody."""

# Names of the quotas on running vCPUs, by (family, is spot): docs.aws.amazon.com/general/latest/gr
QUOTAS = {
    ("p4", True): ("L-7212CCBC", "All P4, P3 and P2 Spot Instance Requests"),
    ("p5", True): ("L-C4BD4855", "All P5 Spot Instance Requests"),
    ("p", False): ("L-417A185B", "Running On-Demand P instances"),
    ("g", True): ("L-3819A6DF", "All G and VT Spot Instance Requests"),
    ("g", False): ("L-DB2E81BA", "Running On-Demand G and VT instances"),
}


@dataclass(frozen=True)
class Leftover:
    """Something of ours that still exists and may bill."""

    kind: str
    """instance, volume or upload."""
    id: str
    region: str
    state: str
    spot_run: str = ""
    """The run of a spot machine, by its label: something may be there that replaces it."""

    def __str__(self) -> str:
        return f"{self.kind} {self.id} in {self.region} ({self.state})"


@dataclass(frozen=True)
class Survey:
    """What a look into several regions found."""

    found: tuple[Leftover, ...]
    closed: tuple[str, ...] = ()
    """Regions into which a policy lets this user not look: nothing can be rented there either."""


def account_id() -> str:
    """The number of the account; CloudError says how to get credentials that work."""
    with _explained():
        return str(_client("sts", None).get_caller_identity()["Account"])


def bucket_region(bucket: str) -> str | None:
    """Where the bucket lies; None if there is none; CloudError if it is not ours."""
    errors = _errors()
    with _explained():
        s3 = _client("s3", None)
        try:
            s3.head_bucket(Bucket=bucket)
            return str(s3.get_bucket_location(Bucket=bucket)["LocationConstraint"] or "us-east-1")
        except errors.ClientError as error:
            code = error.response["Error"]["Code"]
            if code in ("404", "NoSuchBucket"):
                return None
            if code in ("403", "AccessDenied", "301", "PermanentRedirect"):
                raise CloudError(
                    f"bucket s3://{bucket} belongs to somebody else, or you may not use it:"
                    " name another with BUCKET=s3://YOUR-BUCKET"
                ) from None
            raise


def create_bucket(bucket: str, region: str) -> None:
    """Make a private bucket in which unfinished uploads end after a week."""
    with _explained():
        s3 = _client("s3", region)
        where = {} if region == "us-east-1" else {"LocationConstraint": region}
        extra = {"CreateBucketConfiguration": where} if where else {}
        s3.create_bucket(Bucket=bucket, **extra)
        block = (
            "BlockPublicAcls",
            "IgnorePublicAcls",
            "BlockPublicPolicy",
            "RestrictPublicBuckets",
        )
        s3.put_public_access_block(
            Bucket=bucket, PublicAccessBlockConfiguration=dict.fromkeys(block, True)
        )
        rule = {
            "ID": "end-unfinished-uploads",
            "Status": "Enabled",
            "Filter": {"Prefix": ""},
            "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 7},
        }
        s3.put_bucket_lifecycle_configuration(
            Bucket=bucket, LifecycleConfiguration={"Rules": [rule]}
        )


def quota_problem(instance: str, region: str, *, is_spot: bool, nodes: int) -> str | None:
    """Why the account may not run these machines, in one sentence; None if it may."""
    family = instance[0] if not is_spot or instance[0] == "g" else instance[:2]
    code, name = QUOTAS.get((family, is_spot), ("", ""))
    if not code:
        return None
    errors = _errors()
    with _explained():
        try:
            quotas, ec2 = _client("service-quotas", region), _client("ec2", region)
            granted = quotas.get_service_quota(ServiceCode="ec2", QuotaCode=code)["Quota"]["Value"]
            kinds = ec2.describe_instance_types(InstanceTypes=[instance])["InstanceTypes"]
        except errors.ClientError:
            return None
    needed = sum(kind["VCpuInfo"]["DefaultVCpus"] for kind in kinds) * nodes
    if granted >= needed:
        return None
    return (
        f"the quota {name!r} in {region} is {granted:.0f} vCPUs, but {nodes} x {instance} need"
        f" {needed}: `aws service-quotas request-service-quota-increase --service-code ec2"
        f" --quota-code {code} --desired-value {needed} --region {region}` (a day or two)"
    )


def enabled_regions() -> list[str]:
    """Every region that the account may use."""
    with _explained():
        answer = _client("ec2", "us-east-1").describe_regions()
        return sorted(region["RegionName"] for region in answer["Regions"])


def survey(regions: Iterable[str], labels: dict[str, str]) -> Survey:
    """Instances and volumes that carry all `labels`, in the regions given.

    A region that a policy closes to this user is named and does not hide the others; CloudError
    where all of them are closed.
    """
    answers = _look_into(regions, lambda region, ec2: _left_in(region, ec2, labels))
    refused = {n: a for n, a in answers.items() if isinstance(a, CloudError)}
    if refused and len(refused) == len(answers):
        raise next(iter(refused.values()))
    seen = (each for each in answers.values() if not isinstance(each, CloudError))
    found = (leftover for each in seen for leftover in each)
    return Survey(tuple(sorted(found, key=str)), tuple(refused))


def controllers(regions: Iterable[str]) -> dict[str, str]:
    """The live controllers of managed jobs in the account, anybody's: name in EC2 to a phrase.

    SkyPilot gives them no label; regions that are closed to this user have none.
    """
    answers = _look_into(regions, _controllers_in).values()
    seen = (each for each in answers if not isinstance(each, CloudError))
    return {name: phrase for each in seen for name, phrase in each.items()}


def unfinished_uploads(
    bucket: str, prefix: str, *, older_than: timedelta = timedelta(0)
) -> list[Leftover]:
    """Multipart uploads below `prefix` that were begun and never ended; they bill as storage."""
    began_before = datetime.now(UTC) - older_than
    with _explained():
        s3 = _client("s3", None)
        pages = s3.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix)
        return [
            Leftover("upload", f"{upload['Key']}#{upload['UploadId']}", bucket, "unfinished")
            for page in pages
            for upload in page.get("Uploads", [])
            if upload["Initiated"] <= began_before
        ]


def remove(leftover: Leftover) -> None:
    """End it; what is already gone is fine, and CloudError says why it cannot be ended."""
    errors = _errors()
    with _explained():
        try:
            _remove(leftover)
        except errors.ClientError as error:
            code = str(error.response["Error"]["Code"])
            if not code.startswith("NoSuch") and not code.endswith((".NotFound", "InUse")):
                raise


def _remove(leftover: Leftover) -> None:
    if leftover.kind == "upload":
        key, _, upload_id = leftover.id.rpartition("#")
        s3 = _client("s3", None)
        s3.abort_multipart_upload(Bucket=leftover.region, Key=key, UploadId=upload_id)
        return
    ec2 = _client("ec2", leftover.region)
    if leftover.kind == "instance":
        ec2.terminate_instances(InstanceIds=[leftover.id])
    else:
        ec2.delete_volume(VolumeId=leftover.id)


def _look_into(regions: Iterable[str], look: Callable[[str, Any], T]) -> dict[str, T | CloudError]:
    """What `look` finds in each region, by its client of EC2, or why this user may not look."""
    names, errors = list(regions), _errors()

    def ask(region: str) -> T | CloudError:
        with _explained():
            try:
                return look(region, clients[region])
            except errors.ClientError as error:
                if error.response["Error"]["Code"] not in CLOSED:
                    raise
                return CloudError(_refusal(error))

    with _explained():
        clients = dict(zip(names, _clients("ec2", names), strict=True))
    return dict(zip(names, _in_parallel(ask, names), strict=True))


def _left_in(region: str, ec2: Any, labels: dict[str, str]) -> list[Leftover]:
    filters = [{"Name": f"tag:{key}", "Values": [value]} for key, value in labels.items()]
    reservations = _all(ec2, "describe_instances", "Reservations", filters)
    instances = [each for reservation in reservations for each in reservation["Instances"]]
    found = [
        Leftover("instance", each["InstanceId"], region, each["State"]["Name"], _spot_run(each))
        for each in instances
        if each["State"]["Name"] not in GONE
    ]
    found += [
        Leftover("volume", each["VolumeId"], region, each["State"])
        for each in _all(ec2, "describe_volumes", "Volumes", filters)
        if each["State"] != "deleting"
    ]
    return found


def _controllers_in(region: str, ec2: Any) -> dict[str, str]:
    filters = [
        {"Name": "tag:Name", "Values": [f"{CONTROLLER}*"]},
        {"Name": "instance-state-name", "Values": ["pending", "running"]},
    ]
    reservations = _all(ec2, "describe_instances", "Reservations", filters)
    return {
        tag["Value"]: f"controller {each['InstanceId']} in {region}"
        for reservation in reservations
        for each in reservation["Instances"]
        for tag in each["Tags"]
        if tag["Key"] == "Name"
    }


def _spot_run(instance: Mapping[str, Any]) -> str:
    tags = {tag["Key"]: tag["Value"] for tag in instance.get("Tags", [])}
    return tags.get(RUN_LABEL, "") if instance.get("InstanceLifecycle") == "spot" else ""


def _all(client: Any, method: str, key: str, filters: Sequence[dict[str, Any]]) -> Iterator[Any]:
    for page in client.get_paginator(method).paginate(Filters=list(filters)):
        yield from page[key]


def _in_parallel(function: Callable[[str], T], items: Sequence[str]) -> list[T]:
    with ThreadPoolExecutor(PARALLEL, thread_name_prefix="aws") as executor:
        return list(executor.map(function, items))


def _client(service: str, region: str | None) -> Any:
    return _clients(service, [region])[0]


def _clients(service: str, regions: Sequence[str | None]) -> list[Any]:
    """One client a region; they share a session, which reads botocore's large tables once."""
    try:
        import boto3
        from botocore.config import Config
    except ImportError:
        raise MissingExtraError("boto3", "cloud") from None
    limits = Config(connect_timeout=5, read_timeout=20, retries={"total_max_attempts": 3})
    session = boto3.Session()
    home = session.region_name or "us-east-1"
    return [
        session.client(service, region_name=region or home, config=limits) for region in regions
    ]


def _errors() -> Any:
    try:
        import botocore.exceptions
    except ImportError:
        raise MissingExtraError("boto3", "cloud") from None
    return botocore.exceptions


def _unreadable() -> type[Exception]:
    """What botocore raises where somebody else answers in AWS's place, such as a proxy."""
    from botocore.parsers import ResponseParserError

    return ResponseParserError


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turn botocore's errors into one sentence with the command that helps."""
    errors = _errors()
    try:
        yield
    except (errors.NoCredentialsError, errors.PartialCredentialsError, errors.ProfileNotFound):
        raise CloudError(
            "this computer has no AWS credentials: run `aws configure` (or `aws sso login`)"
        ) from None
    except (errors.TokenRetrievalError, errors.SSOTokenLoadError, errors.UnauthorizedSSOTokenError):
        raise CloudError(_EXPIRED) from None
    except errors.ClientError as error:
        raise CloudError(_refusal(error)) from None
    except (errors.BotoCoreError, _unreadable()) as error:
        raise CloudError(
            f"AWS cannot be reached ({error}): check the network and AWS_ENDPOINT_URL"
        ) from None


_EXPIRED = "the AWS credentials have expired: run `aws sso login` (or `aws configure` again)"


def _refusal(error: Any) -> str:
    code, message = error.response["Error"]["Code"], error.response["Error"].get("Message", "")
    if code in ("ExpiredToken", "ExpiredTokenException", "RequestExpired"):
        return _EXPIRED
    if code in (
        "InvalidClientTokenId",
        "AuthFailure",
        "SignatureDoesNotMatch",
        "InvalidAccessKeyId",
    ):
        return f"AWS does not know these credentials ({code}): run `aws configure`"
    if code in DENIED:
        return (
            f"AWS does not let you {error.operation_name}: attach the policy of"
            " docs/guides/pretrain-on-aws.md to your user"
        )
    return (
        f"AWS refused {error.operation_name} ({code}: {message}): see"
        " docs/guides/pretrain-on-aws.md"
    )
