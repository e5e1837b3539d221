"""Checkpoints as they are read: listed, verified, and loaded tensor by tensor.

Nothing of a checkpoint is used before every one of its files has been hashed and found to be
what the manifest says; then it is hashed once more while it is read. A bad checkpoint is passed
over aloud and the next older good one is taken; a store that cannot be reached is an error and
never a reason to fall back. Loading needs no more memory than the model, the optimizer and one
tensor. The format is specified in `manifest`; writing is done by `checkpoint_writer`.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field
from torch import Tensor

from casallm.config import Config, canonical_json
from casallm.errors import CheckpointError, StoreDamagedError, StoreError, StoreNotFoundError
from casallm.storage.entry import digest_file
from casallm.storage.local import free_bytes
from casallm.storage.store import Store
from casallm.train.attempts import (
    CheckpointName,
    attempt_numbers,
    list_committed,
    next_number,
    read_chain,
)
from casallm.train.manifest import (
    MAX_MANIFEST_BYTES,
    Manifest,
    directory_of,
    parse_manifest,
)
from casallm.train.tensor_file import copy_tensors, read_header, untied, weights_sha256_of_files
from casallm.units import format_bytes

log = logging.getLogger(__name__)


class CheckpointConfig(Config):
    """When checkpoints are made and how many are kept."""

    keep: int = Field(default=2, ge=2)
    """The newest so many verified checkpoints are kept; older ones are deleted."""
    every_steps: int | None = Field(default=None, gt=0)
    """Steps between checkpoints; empty: by time."""
    every_seconds: float | None = Field(default=None, gt=0)
    """Seconds between checkpoints; empty: from what a save costs and how often runs stop."""
    mtbf_hours: float = Field(default=24.0, gt=0)
    """Mean hours between stops, as expected before any is seen; for a machine of one's own."""


@dataclass(frozen=True)
class Decision:
    """Something that could not be computed from the step, and is replayed on resume."""

    step: int
    kind: str
    value: Any


@dataclass(frozen=True)
class TrainState:
    """How far training has come, and what was decided on the way."""

    step: int = 0
    sequences: int = 0
    tokens: int = 0
    decisions: tuple[Decision, ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """A whole, verified checkpoint whose files are on this machine."""

    manifest: Manifest
    directory: Path

    @property
    def name(self) -> CheckpointName:
        """Its step and the attempt that wrote it."""
        return self.manifest.name

    def paths(self, kind: str) -> list[Path]:
        """Its files of one kind: "model" or "optim"."""
        return [self.directory / name for name in self.manifest.names(kind)]


def list_checkpoints(run: Store, *, before: int | None = None) -> list[CheckpointName]:
    """The committed checkpoints of the run's valid history, oldest first; nothing is verified.

    With `before`, the history that attempt `before` continues.
    """
    chain = read_chain(run, before=before)
    return [name for name in list_committed(run) if chain.has(name.step, name.attempt)]


def newest_good(run: Store, scratch: Path, *, before: int | None = None) -> Checkpoint | None:
    """The newest checkpoint that is whole, on this machine; None if the run has none yet.

    With `before`, of the history that attempt `before` continues.

    A run in a bucket is copied to `scratch`, where files that are there already and still what
    the manifest says are used. CheckpointError if there are checkpoints and none is whole.
    """
    names = list_checkpoints(run, before=before)
    _check_authors(run)
    problem = None
    while names:
        name = names.pop()
        try:
            return fetch(run, name, scratch)
        except CheckpointError as error:
            if not run.exists(f"{directory_of(name)}/manifest.json"):
                names = list_checkpoints(run, before=before)  # a newer one is there, this one went
                continue
            log.warning("%s is not used, the next older one is tried: %s", name, error)
            problem = problem or error
    if problem is not None:
        raise CheckpointError(
            f"no checkpoint of {run.url} is whole (the newest: {problem}): restore its files, or"
            " begin anew under another run name"
        )
    return None


def fetch(run: Store, name: CheckpointName, scratch: Path) -> Checkpoint:
    """Checkpoint `name`, every file verified; CheckpointError names the first bad file."""
    manifest = read_manifest(run, name)
    sizes = _sizes(run, name)
    for file in manifest.files:
        _raise_if(_wrong_size(manifest, file, sizes))
    local = run.local_path or scratch
    directory = local / manifest.directory
    for file in manifest.files:
        if run.local_path is not None:
            _raise_if(_wrong_content(run, manifest, file))
        else:
            _download(run, manifest, file, directory)
    checkpoint = Checkpoint(manifest, directory)
    load_state(checkpoint)
    for path in (*checkpoint.paths("model"), *checkpoint.paths("optim")):
        read_header(path)
    return checkpoint


def read_manifest(run: Store, name: CheckpointName) -> Manifest:
    """The manifest of checkpoint `name`; CheckpointError if it is missing, torn or another's."""
    path = f"{directory_of(name)}/manifest.json"
    size = _sizes(run, name).get("manifest.json", 0)
    if size > MAX_MANIFEST_BYTES:
        raise CheckpointError(f"{path} has {format_bytes(size)}, too much for a manifest")
    try:
        return parse_manifest(run.read(path), name)
    except StoreNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except CheckpointError as error:
        raise CheckpointError(f"{directory_of(name)}/{error}") from None


def find_problems(run: Store, name: CheckpointName) -> list[str]:
    """What is wrong with checkpoint `name`, file by file; empty if it is whole."""
    try:
        manifest = read_manifest(run, name)
    except CheckpointError as error:
        return [str(error)]
    sizes = _sizes(run, name)
    found = [
        _wrong_size(manifest, file, sizes) or _wrong_content(run, manifest, file)
        for file in sorted(manifest.files)
    ]
    return [problem for problem in found if problem]


def load(
    checkpoint: Checkpoint, *, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]
) -> TrainState:
    """Copy the checkpoint into these tensors, which stay where they are; its state.

    CheckpointError if names, shapes or types differ, or a tensor here is not in the checkpoint.
    """
    for kind, targets in (("model", model), ("optim", optimizer)):
        load_tensors(checkpoint, kind, targets)
    return load_state(checkpoint)


def load_tensors(checkpoint: Checkpoint, kind: str, targets: Mapping[str, Tensor]) -> None:
    """Copy the checkpoint's tensors of one kind ("model", "optim") into `targets`."""
    read: set[str] = set()
    for path in checkpoint.paths(kind):
        read |= copy_tensors(path, targets, sha256=checkpoint.manifest.files[path.name].sha256)
    missing = sorted(untied(targets).keys() - read)
    if missing:
        raise CheckpointError(
            f"{checkpoint.directory} lacks {missing[0]} and {len(missing) - 1} more that are"
            " needed here: the run was made with other settings"
        )


def load_state(checkpoint: Checkpoint) -> TrainState:
    """The checkpoint's step, counts and decisions."""
    path = checkpoint.directory / "state.json"
    try:
        tree = json.loads(path.read_bytes())
        decisions = tuple(
            Decision(item["step"], item["kind"], item["value"]) for item in tree["decisions"]
        )
        state = TrainState(tree["step"], tree["sequences"], tree["tokens"], decisions)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{path} is no state of a run ({error})") from None
    if state.step != checkpoint.name.step:
        raise CheckpointError(f"{path} is of step {state.step}, not {checkpoint.name.step}")
    return state


def format_state(state: TrainState) -> bytes:
    """The content of `state.json`."""
    decisions = [{"step": d.step, "kind": d.kind, "value": d.value} for d in state.decisions]
    tree = {
        "step": state.step,
        "sequences": state.sequences,
        "tokens": state.tokens,
        "decisions": decisions,
    }
    return canonical_json(tree).encode()


def verify_run(run: Store, scratch: Path) -> dict[str, Any]:
    """Every checkpoint checked to the last byte, as `casallm verify --json` prints it."""
    chain = read_chain(run, before=next_number(run))
    checkpoints = []
    newest = None
    for name in list_committed(run):
        problems = find_problems(run, name)
        if not chain.has(name.step, name.attempt):
            problems.append("its attempt was overtaken by another: it is not part of the run")
        if not problems:
            newest = name
        checkpoints.append(
            {
                "name": str(name),
                "step": name.step,
                "attempt": name.attempt,
                "ok": not problems,
                "problems": problems,
            }
        )
    weights = fetch(run, newest, scratch).paths("model") if newest else None
    return {
        "run": run.url,
        "checkpoints": checkpoints,
        "newest_good": None if newest is None else str(newest),
        "weights_sha256": weights_sha256_of_files(weights) if weights else None,
    }


def _check_authors(run: Store) -> None:
    """Refuse to go on without the records that say how the checkpoints follow each other."""
    numbers = set(attempt_numbers(run))
    for name in list_committed(run):
        if name.attempt not in numbers:
            raise CheckpointError(
                f"{run.url} holds {name}, but attempts/{name.attempt:06d}, which says what it"
                " follows, is gone: restore it, or begin anew under another run name"
            )


def _sizes(run: Store, name: CheckpointName) -> dict[str, int]:
    prefix = f"{directory_of(name)}/"
    return {entry.name.removeprefix(prefix): entry.bytes for entry in run.list(prefix)}


def _wrong_size(manifest: Manifest, file: str, sizes: Mapping[str, int]) -> str | None:
    expected = manifest.files[file].bytes
    if file not in sizes:
        return f"{manifest.directory}/{file} is missing"
    if sizes[file] != expected:
        return f"{manifest.directory}/{file} has {sizes[file]:,} bytes instead of {expected:,}"
    return None


def _wrong_content(run: Store, manifest: Manifest, file: str) -> str | None:
    try:
        if run.matches(f"{manifest.directory}/{file}", manifest.files[file]):
            return None
    except StoreNotFoundError:
        return f"{manifest.directory}/{file} is missing"
    expected = manifest.files[file].sha256
    return f"{manifest.directory}/{file} is damaged (its sha256 is not {expected[:12]}…)"


def _raise_if(problem: str | None) -> None:
    if problem:
        raise CheckpointError(problem)


def _download(run: Store, manifest: Manifest, file: str, directory: Path) -> None:
    """Have `file` in `directory`: the copy there if it is what the manifest says, or a new one."""
    expected = manifest.files[file]
    path = directory / file
    if path.is_file() and digest_file(path) == expected:
        return
    path.unlink(missing_ok=True)
    free = free_bytes(directory)
    if expected.bytes > free:
        raise StoreError(
            f"{manifest.directory}/{file} needs {format_bytes(expected.bytes)} in {directory} and"
            f" {format_bytes(free)} are free: free some space or use another scratch directory"
        )
    try:
        run.get(f"{manifest.directory}/{file}", path, sha256=expected.sha256)
    except (StoreDamagedError, StoreNotFoundError) as error:
        raise CheckpointError(str(error)) from None
