"""Real S3 servers on this machine: moto for the semantics, rclone for files that can be damaged."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import boto3

SMALL = {"S3_UPLOAD_PART_MIN_SIZE": "64", "MOTO_S3_DEFAULT_MAX_KEYS": "50"}
"""For moto: parts may be small and listings have many pages, so that tests need little data."""

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "testtest",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@contextlib.contextmanager
def moto_server() -> Iterator[str]:
    """The URL of a moto server, which enforces If-None-Match and lists multipart uploads."""
    port = _free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with _server(command, port) as url:
        yield url


@contextlib.contextmanager
def rclone_server(directory: Path) -> Iterator[str]:
    """The URL of an rclone server, whose buckets are the directories below `directory`.

    It remembers directories for 0.2 s; with no memory at all (0s) it deadlocks now and then.
    """
    port = _free_port()
    rclone = Path(sys.executable).with_name("rclone")
    command = [
        str(rclone), "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", "test,testtest",
        "--vfs-cache-mode", "off", "--dir-cache-time", "200ms", "--config", os.devnull,
        str(directory),
    ]  # fmt: skip
    with _server(command, port) as url:
        yield url


def client(endpoint_url: str) -> "boto3.client":
    """A plain client, to make buckets with and to look behind the back of our own code."""
    return boto3.client(
        "s3",
        endpoint_url=endpoint_url,
        aws_access_key_id=CREDENTIALS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
        region_name=CREDENTIALS["AWS_DEFAULT_REGION"],
    )


@contextlib.contextmanager
def _server(command: list[str], port: int) -> Iterator[str]:
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=quiet, stderr=quiet, env={**os.environ, **SMALL})
    try:
        _wait_for(port, process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, "the S3 server ended at once"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise TimeoutError("the S3 server did not start within a minute")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
