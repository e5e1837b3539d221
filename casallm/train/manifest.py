"""The format of a checkpoint: which files, and the manifest that makes them one.

    checkpoints/step-00001000-a3/      the state after step 1000, written by attempt 3
        model-00000.safetensors …      weights; tied ones once, under the first of their names
        optim-00000.safetensors …      optimizer state, `<parameter>.<what>`
        state.json                     step, sequences, tokens, decisions
        manifest.json                  written last, by conditional create

A checkpoint exists when its manifest does. The manifest is sealed JSON (key `manifest_sha256`):
`format` ("casallm-checkpoint"), `version` (1), `step`, `attempt`, `sequences`, `tokens`,
`world_size`, `identity_sha256`, `parent` (the checkpoint before it in the history, or null) and
`files`: [{`name`, `bytes`, `sha256`}]. Nothing else may be listed: no path, no pickle.

`state.json` is canonical JSON: `step`, `sequences`, `tokens`, `decisions`: [{`step`, `kind`,
`value`}].
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from casallm.errors import CheckpointError
from casallm.storage.entry import Digest
from casallm.storage.sealed import seal, unseal
from casallm.train.attempts import CheckpointName

FORMAT = "casallm-checkpoint"
VERSION = 1
SEAL = "manifest_sha256"
MAX_MANIFEST_BYTES = 4 << 20
"""About 30,000 files; a larger manifest is refused unread."""

_FILE = re.compile(r"(model|optim)-\d{5}\.safetensors|state\.json")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Manifest:
    """What one checkpoint is and what its files must be."""

    name: CheckpointName
    sequences: int
    tokens: int
    world_size: int
    identity_sha256: str
    parent: CheckpointName | None
    files: Mapping[str, Digest]

    @property
    def directory(self) -> str:
        """Where in the run the checkpoint is."""
        return directory_of(self.name)

    @property
    def bytes(self) -> int:
        """The size of all its files."""
        return sum(digest.bytes for digest in self.files.values())

    def names(self, kind: str) -> list[str]:
        """The files of one kind ("model", "optim"), in order."""
        return sorted(name for name in self.files if name.startswith(f"{kind}-"))


def directory_of(name: CheckpointName) -> str:
    """Where in a run the checkpoint `name` is."""
    return f"checkpoints/{name}"


def format_manifest(manifest: Manifest) -> bytes:
    """The content of `manifest.json`."""
    files = [
        {"name": name, "bytes": digest.bytes, "sha256": digest.sha256}
        for name, digest in sorted(manifest.files.items())
    ]
    tree = {
        "format": FORMAT,
        "version": VERSION,
        "step": manifest.name.step,
        "attempt": manifest.name.attempt,
        "sequences": manifest.sequences,
        "tokens": manifest.tokens,
        "world_size": manifest.world_size,
        "identity_sha256": manifest.identity_sha256,
        "parent": None if manifest.parent is None else str(manifest.parent),
        "files": files,
    }
    return seal(tree, SEAL)


def parse_manifest(data: bytes, name: CheckpointName) -> Manifest:
    """The manifest of checkpoint `name`; CheckpointError says what is wrong with it."""
    try:
        tree = unseal(data, SEAL)
        return _parse(tree, name)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"manifest.json: {reason}") from None


def _parse(tree: Mapping[str, Any], name: CheckpointName) -> Manifest:
    if tree["format"] != FORMAT or tree["version"] != VERSION:
        raise ValueError(
            f"it is {tree['format']!r} version {tree['version']!r}, and this casallm reads"
            f" {FORMAT!r} version {VERSION}"
        )
    if (tree["step"], tree["attempt"]) != (name.step, name.attempt):
        raise ValueError(f"it belongs to step {tree['step']} of attempt {tree['attempt']}")
    parent = tree["parent"]
    parent_name = None if parent is None else CheckpointName.parse(parent)
    if parent is not None and parent_name is None:
        raise ValueError(f"{parent!r} is no checkpoint")
    return Manifest(
        name=name,
        sequences=_count(tree, "sequences"),
        tokens=_count(tree, "tokens"),
        world_size=_count(tree, "world_size"),
        identity_sha256=_sha256(tree["identity_sha256"]),
        parent=parent_name,
        files=_parse_files(tree["files"]),
    )


def _parse_files(items: list[Mapping[str, Any]]) -> dict[str, Digest]:
    files: dict[str, Digest] = {}
    for item in items:
        name = item["name"]
        if not _FILE.fullmatch(name) or name in files:
            raise ValueError(f"{name[:100]!r} is no file of a checkpoint, or is there twice")
        files[name] = Digest(_count(item, "bytes"), _sha256(item["sha256"]))
    if "state.json" not in files or not any(name.startswith("model-") for name in files):
        raise ValueError("it names no state.json or no weights")
    return files


def _count(tree: Mapping[str, Any], key: str) -> int:
    value = tree[key]
    if type(value) is not int or value < 0:
        raise ValueError(f"{key} is {value!r}, not a count")
    return value


def _sha256(value: str) -> str:
    if not _SHA256.fullmatch(value):
        raise ValueError(f"{value[:80]!r} is no sha256")
    return value
