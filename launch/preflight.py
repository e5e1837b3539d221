"""Everything that can be checked before money is spent, at once, in seconds.

Each check answers with problems (sentences that end in what to do) and notes; none stops another,
so that a person sees all of them together.
"""

import importlib.metadata
import math
import re
import secrets
import shutil
import subprocess
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from casallm.config import Tree
from casallm.data.manifest import parse_manifest
from casallm.errors import CasallmError, StoreExistsError, StoreNotFoundError
from casallm.storage.store import open_store
from casallm.units import format_count
from launch import aws
from launch.plan import Plan
from launch.progress import read_identity, read_progress
from launch.request import ACCOUNT
from launch.tasks import CHECKOUT

SKYPILOT = (0, 14)
"""The minor version whose YAML and Python interface the launcher speaks."""

_PROBE = "casallm-probe"


@dataclass(frozen=True)
class Findings:
    """What a check, or all of them, found."""

    problems: tuple[str, ...] = ()
    """Each must be fixed first."""
    notes: tuple[str, ...] = ()
    account: str = ""
    """The number of the AWS account, where one was asked."""
    bucket_to_create: str = ""
    """A bucket that does not exist yet, and the region for it, as `name region`."""

    def __add__(self, other: "Findings") -> "Findings":
        return Findings(
            self.problems + other.problems,
            self.notes + other.notes,
            self.account or other.account,
            self.bucket_to_create or other.bucket_to_create,
        )


@dataclass(frozen=True)
class Surroundings:
    """What the checks look at beside the plan; a test changes it."""

    environment: Mapping[str, str] = field(repr=False)
    is_dirty_allowed: bool = False


def preflight(plan: Plan, around: Surroundings) -> Findings:
    """All problems of `plan` on this computer and in this account, together."""
    checks: list[Callable[[], Findings]] = [
        check_skypilot,
        lambda: check_tree(CHECKOUT, is_dirty_allowed=around.is_dirty_allowed),
        lambda: check_keys(plan, around.environment),
    ]
    if plan.request.run_url.startswith("s3://"):
        checks.append(lambda: check_bucket(plan))
    if plan.request.cloud == "aws":
        checks.append(lambda: check_quotas(plan))
    if plan.workload.data == "shards":
        workload = plan.workload
        checks.append(lambda: check_data(workload.data_url, workload.config.vocab_size))
    checks.append(lambda: check_run(plan))
    if base_url := plan.request.base_url:
        checks.append(lambda: check_base(plan, base_url))
    with ThreadPoolExecutor(len(checks), thread_name_prefix="preflight") as executor:
        results = list(executor.map(_guarded, checks))
    found = sum(results, start=Findings())
    return replace(found, problems=tuple(dict.fromkeys(found.problems)))


def check_skypilot() -> Findings:
    """SkyPilot is here, in the version we speak, with the `aws` command that it needs."""
    fix = "run `make setup EXTRAS=cloud`"
    try:
        version = importlib.metadata.version("skypilot")
    except importlib.metadata.PackageNotFoundError:
        return Findings((f"SkyPilot is not installed: {fix}",))
    if tuple(int(part) for part in version.split(".")[:2]) != SKYPILOT:
        wanted = ".".join(map(str, SKYPILOT))
        return Findings((f"SkyPilot is {version}, but casallm speaks {wanted}: {fix}",))
    return Findings()


def check_tree(checkout: Path, *, is_dirty_allowed: bool) -> Findings:
    """The code that goes to the machine is a commit, so that the run can be made again."""
    if shutil.which("git") is None or not (checkout / ".git").exists():
        return Findings()
    status = subprocess.run(
        ["git", "status", "--porcelain", "--", "casallm", "launch", "tasks", "constraints.txt"],
        cwd=checkout,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    changed = [line[3:] for line in status.stdout.splitlines()]
    if not changed:
        return Findings()
    named = ", ".join(changed[:3]) + (" …" if len(changed) > 3 else "")
    verb = "file is" if len(changed) == 1 else "files are"
    text = f"{len(changed)} {verb} not committed ({named})"
    if is_dirty_allowed:
        return Findings(notes=(f"{text}: the machine gets them as they are",))
    return Findings(
        (f"{text}: run `git commit -am 'Before training'`, or insist with DIRTY=1 (--allow-dirty)",)
    )


def check_keys(plan: Plan, environment: Mapping[str, str]) -> Findings:
    """The keys that the run will need on the machine are in the environment here."""
    problems = []
    settings = dict(each.partition("=")[::2] for each in plan.request.settings)
    if settings.get("log.wandb") == "online" and not environment.get("WANDB_API_KEY"):
        problems.append(
            "log.wandb=online needs a key on the machine: run `export WANDB_API_KEY=…` first"
        )
    has_keys = environment.get("AWS_ACCESS_KEY_ID") and environment.get("AWS_SECRET_ACCESS_KEY")
    if plan.request.cloud != "aws" and plan.request.run_url.startswith("s3://") and not has_keys:
        problems.append(
            f"machines of {plan.request.cloud} have no role in AWS: run `export AWS_ACCESS_KEY_ID=…"
            " AWS_SECRET_ACCESS_KEY=…` with keys that may use the bucket and nothing else"
        )
    if plan.request.cloud != "aws" and environment.get("AWS_SESSION_TOKEN"):
        problems.append(
            "the keys of AWS here are temporary (AWS_SESSION_TOKEN), and would end before the run:"
            " export those of a user, and `unset AWS_SESSION_TOKEN`"
        )
    return Findings(tuple(problems))


def check_bucket(plan: Plan) -> Findings:
    """The bucket is ours, near the machines, and honours a conditional write."""
    account = aws.account_id()
    bucket = plan.request.run_url.replace(ACCOUNT, account).split("/")[2]
    region = aws.bucket_region(bucket)
    regions = [candidate.offer.region for candidate in plan.candidates]
    if region is None:
        where = regions[0] if plan.request.cloud == "aws" else "us-east-1"
        note = f"bucket s3://{bucket} does not exist: it will be created in {where}, private"
        return Findings(notes=(note,), account=account, bucket_to_create=f"{bucket} {where}")
    problems = tuple(_far_away(bucket, region, regions)) if plan.request.cloud == "aws" else ()
    notes: tuple[str, ...] = ()
    if not problems and plan.request.cloud == "aws" and region != regions[0]:
        notes = (f"s3://{bucket} is in {region}: moving data to {regions[0]} costs $0.02/GB",)
    return Findings(problems + tuple(probe_bucket(f"s3://{bucket}")), notes, account)


def probe_bucket(url: str) -> list[str]:
    """Write, win and lose a conditional create, delete: what every run relies on."""
    store, name = open_store(url), f"{_PROBE}-{secrets.token_hex(4)}"
    try:
        store.create(name, b"1")
        try:
            store.create(name, b"2")
        except StoreExistsError:
            return []
        return [
            f"{url} does not honour conditional writes, by which two starts of a run are told"
            " apart: use a bucket of AWS S3, R2 or GCS"
        ]
    finally:
        store.delete(name)


def check_quotas(plan: Plan) -> Findings:
    """At least one candidate is within the account's quota."""
    refused: list[str] = []
    for candidate in plan.candidates:
        offer = candidate.offer
        problem = aws.quota_problem(
            offer.instance, offer.region, is_spot=candidate.is_spot, nodes=plan.request.nodes
        )
        if problem is None:
            return Findings(notes=tuple(refused))
        refused.append(problem)
    return Findings(tuple(refused[:1]))


def check_data(url: str, vocab_size: int) -> Findings:
    """Whole shards lie at `url`, made with the model's vocabulary; their bytes are read later."""
    shards = open_store(url)
    try:
        manifest = parse_manifest(shards.read("manifest.json"), where=f"{url}/manifest.json")
    except StoreNotFoundError:
        return Findings(
            (
                f"there are no shards at {url} (no manifest.json): check DATA=, or make them with"
                f" `make prepare DATA=DOCUMENTS OUT={url}`",
            )
        )
    problems = []
    made_with = manifest.tokenizer.vocab_size
    if made_with != vocab_size:
        problems.append(
            f"the shards at {url} were made with a vocabulary of {made_with}, but the model has"
            f" {vocab_size}: add SET=model.vocab_size={made_with}"
        )
    sizes = {entry.name: entry.bytes for entry in shards.list()}
    listed = [shard for split in manifest.splits.values() for shard in split.shards]
    damaged = [shard.name for shard in listed if sizes.get(shard.name) != shard.bytes]
    if damaged:
        problems.append(
            f"{len(damaged)} of {len(listed)} shards at {url} are missing or cut ({damaged[0]}"
            f"{' …' if len(damaged) > 1 else ''}): make them again with `make prepare"
            f" DATA=DOCUMENTS OUT={url}`"
        )
    tokens = format_count(manifest.splits["train"].tokens)
    return Findings(tuple(problems), (f"{url} holds {tokens} tokens of training data",))


def check_run(plan: Plan) -> Findings:
    """A run that was begun at this URL is this run, not one of the same name."""
    url = _with_account(plan.request.run_url)
    identity = read_identity(open_store(url))
    differences = [] if plan.request.job == "sft" else _other_size(identity, plan)
    train = _section(identity, "train")
    steps, *batch = (
        int(str(train.get(name) or 0)) for name in ("steps", "global_batch_size", "context_length")
    )
    if plan.request.tokens and steps and all(batch):
        planned = math.ceil(plan.workload.tokens / math.prod(batch))
        if abs(steps - planned) > 1:
            differences.append(f"train.steps is {steps} there and {planned} here")
    if not differences:
        return Findings()
    return Findings(
        (
            f"{url} is a run of other settings ({'; '.join(differences)}): give this one"
            " another name with RUN=, or the settings of that one",
        )
    )


def check_base(plan: Plan, base: str) -> Findings:
    """The run that an assistant is made of has a checkpoint, and the size of the plan."""
    if read_identity(open_store(_with_account(plan.request.run_url))):
        return Findings()  # begun before: it holds what it needs of its base
    url = _with_account(re.sub(r"@\d+$", "", base))  # RUN@STEP names one checkpoint
    if not read_progress(open_store(url)).checkpoint:
        return Findings(
            (f"there is no checkpoint of a run at {url}: name a pretrained one with FROM=s3://…",)
        )
    differences = _other_size(read_identity(open_store(url)), plan)
    if not differences:
        return Findings()
    return Findings(
        (
            f"{url} is not of the planned size ({'; '.join(differences)}): add the PRESET= or"
            " PARAMS= that it was made with",
        )
    )


def _with_account(url: str) -> str:
    return url.replace(ACCOUNT, aws.account_id()) if ACCOUNT in url else url


def _other_size(identity: Tree, plan: Plan) -> list[str]:
    """Where the model of a run is of another size than the planned one."""
    there, config = _section(identity, "model"), plan.workload.config
    sizes = {"n_layers": config.n_layers, "d_model": config.d_model}
    return [
        f"model.{name} is {there[name]} there and {here} here"
        for name, here in sizes.items()
        if name in there and str(there[name]) != str(here)
    ]


def _section(identity: Tree, name: str) -> Tree:
    section = identity.get(name)
    return section if isinstance(section, dict) else {}


def _far_away(bucket: str, region: str, regions: list[str]) -> list[str]:
    continent = region.partition("-")[0]
    if any(each.startswith(f"{continent}-") for each in regions):
        return []
    sought = ", ".join(dict.fromkeys(regions))
    return [
        f"bucket s3://{bucket} is in {region}, far from the machines ({sought}):"
        f" add REGION={region}, or name a bucket near them with BUCKET="
    ]


def _guarded(check: Callable[[], Findings]) -> Findings:
    try:
        return check()
    except CasallmError as error:
        return Findings((str(error),))
