"""Fixtures of an S3 bucket with a misbehaving network in front; used by several folders."""

import atexit
import contextlib
import functools
import itertools
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from casallm.storage.remote import RemoteStore
from casallm.storage.retry import Patience
from casallm.storage.s3 import S3Bucket
from tests.faults.proxy import FaultProxy
from tests.faults.servers import CREDENTIALS, client, moto_server, rclone_server

HURRIED = Patience(
    tries=8, first_delay_seconds=0.01, longest_delay_seconds=0.05, request_seconds=2.0
)
"""The patience of tests: as many tries, short delays."""

_numbers = itertools.count()
_servers = ExitStack()


def memory_directory() -> str | None:
    """A directory in memory, if there is one: a hundred saves sync a thousand small files."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


@pytest.fixture
def memory_path() -> Iterator[Path]:
    """Like `tmp_path`, in memory where possible."""
    with tempfile.TemporaryDirectory(dir=memory_directory()) as directory:
        yield Path(directory)


@functools.cache
def moto() -> tuple[str, FaultProxy, Any]:
    """The one moto server of this process: its URL, a proxy in front and a client behind."""
    atexit.register(stop_servers)
    url = _servers.enter_context(moto_server())
    return url, _servers.enter_context(contextlib.closing(FaultProxy(url))), client(url)


def stop_servers() -> None:
    """End what `moto` began."""
    _servers.close()
    moto.cache_clear()


@dataclass(frozen=True)
class Bucket:
    """A fresh bucket, a proxy in front of it, and a client behind."""

    name: str
    proxy: FaultProxy
    direct_url: str
    client: Any

    def store(self, prefix: str = "run", patience: Patience = HURRIED) -> RemoteStore:
        """A store that sees the bucket through the proxy."""
        return RemoteStore(
            S3Bucket(self.name, endpoint_url=self.proxy.url, patience=patience), f"{prefix}/"
        )

    def direct(self, prefix: str = "run") -> RemoteStore:
        """A store that sees the bucket as it is."""
        return RemoteStore(S3Bucket(self.name, endpoint_url=self.direct_url), f"{prefix}/")

    def names(self) -> list[str]:
        """What is in the bucket."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name)
        return [item["Key"] for page in pages for item in page.get("Contents", [])]

    def open_uploads(self) -> list[str]:
        """Multipart uploads that nobody has ended."""
        answer = self.client.list_multipart_uploads(Bucket=self.name)
        return [item["Key"] for item in answer.get("Uploads", [])]


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def s3(credentials: None) -> Bucket:
    """A fresh bucket on moto."""
    url, proxy, s3_client = moto()
    proxy.behave()
    name = f"bucket-{next(_numbers)}"
    s3_client.create_bucket(Bucket=name)
    return Bucket(name, proxy, url, s3_client)


@pytest.fixture
def s3_on_disk(credentials: None, memory_path: Path) -> Iterator[tuple[Bucket, Path]]:
    """A bucket on rclone, and the directory in which its objects are plain files."""
    server = memory_path / "server"
    (server / "bucket").mkdir(parents=True)
    with rclone_server(server) as url, contextlib.closing(FaultProxy(url)) as proxy:
        yield Bucket("bucket", proxy, url, client(url)), server / "bucket"
