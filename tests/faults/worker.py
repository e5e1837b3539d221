"""A training process in miniature that can be killed, stopped and continued."""

import functools
import multiprocessing
import os
import time
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import s3fs  # noqa: F401 - loaded once, for all workers
import torch

from casallm.errors import AttemptError
from casallm.storage import s3
from casallm.storage.local import LocalStore
from casallm.storage.remote import RemoteStore
from casallm.storage.retry import Patience
from casallm.storage.store import Store
from tests.faults.servers import CREDENTIALS
from tests.faults.tiny_run import Session

FENCED = 3
"""The exit code of a worker whose run is led by another."""

PART_BYTES = 128
"""Of workers' uploads: even the weights of this miniature have several parts."""


@functools.cache
def _context() -> ForkServerContext:
    """Processes made from one that has loaded torch and runs no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.worker"])
    return context


def start_local(directory: Path, progress: Path) -> ForkServerProcess:
    """A worker that trains the run in `directory` until it is killed."""
    process = _context().Process(target=_train_local, args=(directory, progress), daemon=True)
    process.start()
    return process


def start_in_bucket(
    bucket: str, endpoint_url: str, scratch: Path, progress: Path
) -> ForkServerProcess:
    """A worker that trains the run s3://`bucket`/run until it is killed or overtaken."""
    arguments = (bucket, endpoint_url, scratch, progress)
    process = _context().Process(target=_train_in_bucket, args=arguments, daemon=True)
    process.start()
    return process


def durable_step(progress: Path) -> int:
    """The last step that a worker has said to be durable."""
    lines = progress.read_text().split() if progress.exists() else []
    return int(lines[-1]) if lines else 0


def wait_for_progress(process: ForkServerProcess, progress: Path) -> None:
    """Wait until the worker has made one more step durable."""
    before = durable_step(progress)
    deadline = time.monotonic() + 120
    while durable_step(progress) == before:
        assert process.is_alive(), f"the worker ended by itself with {process.exitcode}"
        assert time.monotonic() < deadline, "the worker saved nothing in two minutes"
        time.sleep(0.002)


def _train_local(directory: Path, progress: Path) -> None:
    _train(LocalStore(directory), directory / "scratch", progress)


def _train_in_bucket(bucket: str, endpoint_url: str, scratch: Path, progress: Path) -> None:
    os.environ.update(CREDENTIALS)
    s3.PART_BYTES = PART_BYTES
    patience = Patience(tries=4, first_delay_seconds=0.01, request_seconds=10.0)
    client = s3.S3Bucket(bucket, endpoint_url=endpoint_url, patience=patience)
    _train(RemoteStore(client, "run/"), scratch, progress)


def _train(run: Store, scratch: Path, progress: Path) -> None:
    torch.set_num_threads(1)
    try:
        session = Session(run, scratch)
        while True:
            session.train()
            with progress.open("a") as file:
                file.write(f"{session.step}\n")
    except AttemptError:
        os._exit(FENCED)
