"""Where the files of a checkpoint go: into the run, or to a local tier and then to the bucket."""

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from casallm.errors import StoreError
from casallm.storage.entry import Digest, digest_bytes
from casallm.storage.local import free_bytes, write_file
from casallm.storage.store import Store
from casallm.units import format_bytes

log = logging.getLogger(__name__)

Files = Mapping[str, Sequence[bytes | memoryview]]
"""The content of each file, in pieces."""


def write_local(root: Path, directory: str, files: Files) -> dict[str, Digest]:
    """Write the files below `root`; on any error none is left, and the error says why."""
    needed, free = _bytes(files), free_bytes(root)
    if needed > free:
        raise StoreError(
            f"{root / directory} needs {format_bytes(needed)} and {format_bytes(free)} are free:"
            " free some space; what was saved before is untouched"
        )
    try:
        return {name: write_file(root / directory / name, files[name]) for name in files}
    except StoreError:
        shutil.rmtree(root / directory, ignore_errors=True)
        raise


def write_bucket(run: Store, directory: str, files: Files, tier: Path) -> dict[str, Digest]:
    """Write the files below `tier`, if there is room, and upload them; each is verified there."""
    try:
        digests = write_local(tier, directory, files)
    except StoreError as error:
        log.warning("%s goes to %s without a copy on this machine: %s", directory, run.url, error)
        return {name: _upload(run, f"{directory}/{name}", files[name]) for name in files}
    for name, digest in digests.items():
        run.put(f"{directory}/{name}", tier / directory / name, sha256=digest.sha256)
    return digests


def keep_in_tier(tier: Path, directory: str) -> None:
    """Delete all checkpoints of the local tier but the one in `directory`."""
    kept = tier / directory
    for folder in kept.parent.glob("step-*"):
        if folder != kept:
            shutil.rmtree(folder, ignore_errors=True)


def _upload(run: Store, name: str, pieces: Sequence[bytes | memoryview]) -> Digest:
    data = b"".join(pieces)
    run.write(name, data)
    return digest_bytes(data)


def _bytes(files: Files) -> int:
    return sum(len(piece) for pieces in files.values() for piece in pieces)
