"""What a person asked the launcher for, and the names that follow from it.

A run is known by its URL and by nothing else: the name of its cluster or managed job, and the
label that its machines carry, are computed from the URL, so any laptop finds them again.
"""

import hashlib
import re
from dataclasses import dataclass, field
from typing import Literal

from casallm.data.sources import BUILTIN, source_name
from launch.aws import RUN_LABEL

Job = Literal["pretrain", "sft"]
JOBS: tuple[Job, ...] = ("pretrain", "sft")
"""What `up` launches; the other files in tasks/ are its first step, or for use by hand."""

ACCOUNT = "ACCOUNT"
"""Stands for the account's number in the name of the default bucket until it is known."""

DEFAULT_PRESET = "350m"
"""What is trained in a cloud when no size is given: the reference model."""

CAPACITY_HOURS = 2.0
"""How long machines are waited for: by the launcher, and by a spot run that was left to itself."""

PROJECT = {"project": "casallm"}
"""The label of everything that is rented for any run."""

NAME_LENGTH = 40
"""Of a cluster: AWS, GCP and Kubernetes all take this much."""


@dataclass(frozen=True)
class LaunchRequest:
    """One `up`; empty means: decide for me."""

    job: Job = "pretrain"
    cloud: str = "aws"
    run: str | None = None
    start_from: str | None = None
    preset: str | None = None
    params: str | None = None
    data: str | None = None
    tokens: str | None = None
    gpu: str | None = None
    nodes: int = 1
    ranks: int | None = None
    region: str | None = None
    is_spot: bool = True
    budget: str | None = None
    deadline: str | None = None
    bucket: str | None = None
    settings: tuple[str, ...] = field(default=())

    @property
    def bucket_url(self) -> str:
        """Where runs and data are kept: as asked, else where the run is, else the account's own."""
        if self.run and "://" in self.run and not self.bucket:
            return "/".join(self.run.split("/")[:3])
        return (self.bucket or f"s3://{own_bucket(ACCOUNT)}").rstrip("/")

    @property
    def run_url(self) -> str:
        """Where the run is kept."""
        if self.run and "://" in self.run:
            return self.run.rstrip("/")
        return f"{self.bucket_url}/{self.run or self._default_name}"

    @property
    def base_url(self) -> str | None:
        """Where the run lies that sft starts from: a URL, or a name in the bucket."""
        if not self.start_from or "://" in self.start_from:
            return self.start_from
        return f"{self.bucket_url}/{self.start_from}"

    @property
    def _default_name(self) -> str:
        if self.start_from:
            return f"{self.start_from.rstrip('/').rpartition('/')[2]}-{self.job}"
        size = (self.params or self.preset or DEFAULT_PRESET).lower()
        return f"{size}-{source_name(self.data or BUILTIN)}"


def own_bucket(account: str) -> str:
    """The bucket in which an account's runs are kept unless another is named."""
    return f"casallm-{account}"


def cluster_name(run_url: str) -> str:
    """What SkyPilot calls the machines of a run: readable, and different for every URL."""
    words = re.sub(r"[^a-z0-9]+", "-", run_url.rstrip("/").rpartition("/")[2].lower()).strip("-")
    digest = hashlib.sha256(run_url.rstrip("/").encode()).hexdigest()[:6]
    return f"casallm-{words[: NAME_LENGTH - 15].strip('-')}-{digest}"


def data_machine(run_url: str) -> str:
    """What SkyPilot calls the machine that prepares a run's data."""
    return f"{cluster_name(run_url)}-data"


def machine_names(run_url: str) -> list[str]:
    """Every name under which SkyPilot may have something of a run; the run's own is first."""
    return [cluster_name(run_url), data_machine(run_url)]


def run_labels(run_url: str) -> dict[str, str]:
    """The labels (on AWS: tags) of everything that is rented for a run."""
    return {**PROJECT, RUN_LABEL: cluster_name(run_url)}
