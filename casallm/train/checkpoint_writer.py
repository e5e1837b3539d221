"""Checkpoints as they are written: staged by a copy, then stored behind the training.

`save` copies the state aside and returns; a background thread writes the files, publishes the
journal, makes sure that this attempt still leads, and commits the manifest, after which older
checkpoints may go. One checkpoint at most is on its way, so memory is bounded and a slow store
makes checkpoints rarer, never training slower. No collective operation is issued from behind.

A run on this machine: files go straight into the run, and whatever goes wrong is raised by the
next `save` or `wait`; the older checkpoints stay as they are. A run in a bucket: files go to
`scratch` first (the local tier, from which a restart on the same machine reads) and are uploaded
from there; if the drive is full the tier is left out, and if the store cannot be reached training
goes on, with a warning that says how old the newest durable checkpoint is.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from casallm.errors import AttemptError, StoreError
from casallm.storage.entry import Digest
from casallm.storage.store import Store
from casallm.train.attempts import Attempt, CheckpointName, assert_leading
from casallm.train.checkpoint import CheckpointConfig, TrainState, find_problems, format_state
from casallm.train.journal import AttemptLog, lifetimes_seconds
from casallm.train.manifest import Manifest, directory_of, format_manifest
from casallm.train.pace import Pace
from casallm.train.retention import apply_retention, remove_checkpoint
from casallm.train.staging import Staging
from casallm.train.tensor_file import encode, partition, untied
from casallm.train.tiers import Files, keep_in_tier, write_bucket, write_local
from casallm.units import format_duration

log = logging.getLogger(__name__)

FILE_BYTES = 256 << 20
"""Tensors are gathered into files of at most this size (a larger tensor is a file of its own)."""


BACKGROUND_NICENESS = 10
"""Where training wants every core, writing and hashing get about a tenth of one."""


@dataclass(frozen=True)
class _Staged:
    """A copy of the state, on its way into the store."""

    state: TrainState
    files: Files
    stall_seconds: float


class CheckpointWriter:
    """Saves the state of one attempt, behind the training; used by one process of the run.

    `start` is the verified checkpoint that training continues from, if any.
    """

    def __init__(
        self,
        run: Store,
        attempt: Attempt,
        journal: AttemptLog,
        *,
        config: CheckpointConfig,
        identity_sha256: str,
        world_size: int,
        start: CheckpointName | None,
        scratch: Path,
    ) -> None:
        self.is_fenced = False
        """Whether another attempt leads the run by now; `save` and `wait` raise AttemptError."""
        self.newest_durable = start
        """The newest checkpoint that survives the loss of this process, or of the machine."""
        self._run = run
        self._attempt = attempt
        self._journal = journal
        self._config = config
        self._identity_sha256 = identity_sha256
        self._world_size = world_size
        self._scratch = scratch
        self._verified = {start} if start else set()
        lifetimes = lifetimes_seconds(run, attempt.number)
        self._pace = Pace(config, start.step if start else 0, lifetimes)
        self._durable_time = time.monotonic()
        self._staging = Staging()
        self._executor = ThreadPoolExecutor(
            1, thread_name_prefix="checkpoint", initializer=_let_training_go_first
        )
        self._job: Future[None] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is on its way."""
        return self._job is not None and not self._job.done()

    def is_due(self, step: int) -> bool:
        """Whether the state after `step` should be saved now: it is time and none is on its way."""
        return not self.is_busy and self._pace.is_due(step)

    def save(
        self, state: TrainState, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]
    ) -> None:
        """Copy the state aside, once the last save is through, and store it from behind.

        Raises AttemptError when another attempt leads, and, for a run on this machine, whatever
        the last save ended with. `is_due` keeps training from ever waiting here.
        """
        self._settle()
        begin = time.monotonic()
        files = self._stage(state, model, optimizer)
        staged = _Staged(state, files, time.monotonic() - begin)
        self._pace.saved(state.step)
        self._job = self._executor.submit(self._store, staged)

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Wait until the last save is durable, or raise why it is not; False if time ran out."""
        if not self.wait_until_idle(timeout_seconds):
            return False
        job, self._job = self._job, None
        if job is not None:
            job.result()
        return True

    def wait_until_idle(self, timeout_seconds: float | None = None) -> bool:
        """Wait until the last save has ended, well or not; False if time ran out.

        The next `save` says how it ended, and whether that matters.
        """
        return self._job is None or bool(wait([self._job], timeout_seconds).done)

    def close(self) -> None:
        """End the background thread once it has stored what is on its way."""
        self._executor.shutdown(wait=True)

    def _stage(
        self, state: TrainState, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]
    ) -> Files:
        """Every file of the checkpoint, as views of a copy of the tensors."""
        kinds = {"model": untied(model), "optim": optimizer}
        copies = self._staging.copy(
            {f"{kind}/{name}": t for kind, tensors in kinds.items() for name, t in tensors.items()}
        )
        files: dict[str, list[bytes | memoryview]] = {"state.json": [format_state(state)]}
        for kind, tensors in kinds.items():
            own = {name: copies[f"{kind}/{name}"] for name in tensors}
            for index, group in enumerate(partition(own, FILE_BYTES)):
                files[f"{kind}-{index:05d}.safetensors"] = list(encode(group))
        return files

    def _settle(self) -> None:
        """Raise what the last save ended with, or warn where training can do without it."""
        job, self._job = self._job, None
        try:
            if job is not None:
                job.result()
        except StoreError as error:
            if self._run.local_path is not None:
                raise
            age = format_duration(time.monotonic() - self._durable_time)
            log.warning(
                "the last checkpoint did not reach %s (%s); training goes on, and the newest safe"
                " state (%s) is %s old",
                self._run.url,
                error,
                self.newest_durable or "the start",
                age,
            )

    def _store(self, staged: _Staged) -> None:
        """Everything that happens behind the training, in the order that makes it safe."""
        name = CheckpointName(staged.state.step, self._attempt.number)
        try:
            if not self._is_stored(name):
                self._commit(name, staged)
            self._tidy(name)
        except AttemptError:
            self.is_fenced = True
            raise

    def _is_stored(self, name: CheckpointName) -> bool:
        """Whether this very step of this attempt is stored already; a damaged one is removed.

        A step is saved twice when a stop follows a save at once, or after ranks were restarted.
        """
        if name == self.newest_durable:
            return True
        if not self._run.exists(f"{directory_of(name)}/manifest.json"):
            return False
        if find_problems(self._run, name):
            remove_checkpoint(self._run, name)
            return False
        return True

    def _commit(self, name: CheckpointName, staged: _Staged) -> None:
        begin = time.monotonic()
        manifest = Manifest(
            name=name,
            sequences=staged.state.sequences,
            tokens=staged.state.tokens,
            world_size=self._world_size,
            identity_sha256=self._identity_sha256,
            parent=self.newest_durable,
            files=self._write_files(directory_of(name), staged.files),
        )
        self._journal.publish()
        assert_leading(self._run, self._attempt)
        self._run.create(f"{manifest.directory}/manifest.json", format_manifest(manifest))
        self.newest_durable = name
        self._verified.add(name)
        self._durable_time = time.monotonic()
        self._report(manifest, staged.stall_seconds, self._durable_time - begin)

    def _write_files(self, directory: str, files: Files) -> dict[str, Digest]:
        if self._run.local_path is not None:
            return write_local(self._run.local_path, directory, files)
        return write_bucket(self._run, directory, files, self._scratch)

    def _report(self, manifest: Manifest, stall_seconds: float, upload_seconds: float) -> None:
        self._pace.measured(stall_seconds, upload_seconds)
        self._journal.event(
            "save",
            checkpoint=str(manifest.name),
            step=manifest.name.step,
            bytes=manifest.bytes,
            stall_seconds=round(stall_seconds, 4),
            upload_seconds=round(upload_seconds, 4),
        )

    def _tidy(self, name: CheckpointName) -> None:
        """Delete what is no longer needed; that it cannot be deleted is no reason to stop."""
        try:
            apply_retention(self._run, self._attempt, self._config.keep, self._verified)
        except StoreError as error:
            log.warning("older checkpoints of %s are not deleted: %s", self._run.url, error)
        if self._run.local_path is None:
            keep_in_tier(self._scratch, directory_of(name))


def _let_training_go_first() -> None:
    """Lower the priority of this thread and of those that it will start; Linux knows how."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), BACKGROUND_NICENESS)
