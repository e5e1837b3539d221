"""Reading checkpoints: whatever is wrong with one is found, named, and passed over."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from casallm.errors import CheckpointError, StoreError
from casallm.storage.entry import digest_file
from casallm.storage.local import LocalStore
from casallm.storage.sealed import seal
from casallm.storage.store import Store
from casallm.train.attempts import CheckpointName, claim
from casallm.train.checkpoint import (
    fetch,
    list_checkpoints,
    load,
    newest_good,
    verify_run,
)
from casallm.train.manifest import parse_manifest
from tests.faults.tiny_run import Session, is_right, model_at, optimizer_at, sha256_at


@pytest.fixture
def run(tmp_path: Path) -> LocalStore:
    """A run with checkpoints at steps 10, 20 and 30."""
    store = LocalStore(tmp_path / "run")
    session = Session(store, tmp_path / "scratch", keep=3)
    for _ in range(3):
        session.train()
    session.close()
    return store


def folder(run: Store, step: int) -> Path:
    return Path(run.url, "checkpoints", f"step-{step:08d}-a1")


def reseal(run: Store, changes: dict[str, object]) -> None:
    """Change the newest manifest as an attacker would: with a right hash of itself."""
    path = folder(run, 30) / "manifest.json"
    path.write_bytes(seal({**json.loads(path.read_bytes()), **changes}, "manifest_sha256"))


def overtake(run: Store) -> None:
    """A second attempt continues from step 20; what it commits at step 25 is not whole."""
    claim(run, parent=CheckpointName(20, 1))
    run.write("checkpoints/step-00000025-a2/manifest.json", b"")


def good_step(run: Store, tmp_path: Path) -> int:
    checkpoint = newest_good(run, tmp_path / "scratch")
    assert checkpoint is not None
    assert is_right(checkpoint)
    return checkpoint.name.step


def test_the_files_and_the_manifest_are_as_specified(run: LocalStore):
    manifest = json.loads((folder(run, 30) / "manifest.json").read_bytes())

    assert sorted(path.name for path in folder(run, 30).iterdir()) == [
        "manifest.json", "model-00000.safetensors", "optim-00000.safetensors", "state.json",
    ]  # fmt: skip
    files = manifest.pop("files")
    assert manifest.pop("manifest_sha256")
    assert manifest == {
        "format": "casallm-checkpoint",
        "version": 1,
        "step": 30,
        "attempt": 1,
        "sequences": 240,
        "tokens": 3840,
        "world_size": 1,
        "identity_sha256": "1d" * 32,
        "parent": "step-00000020-a1",
    }
    for item in files:
        digest = digest_file(folder(run, 30) / item["name"])
        assert item == {"name": item["name"], "bytes": digest.bytes, "sha256": digest.sha256}
    assert json.loads((folder(run, 30) / "state.json").read_bytes()) == {
        "step": 30,
        "sequences": 240,
        "tokens": 3840,
        "decisions": [{"step": 0, "kind": "compile", "value": True}],
    }


def test_the_newest_checkpoint_comes_back_as_it_was(run: LocalStore, tmp_path: Path):
    assert [name.step for name in list_checkpoints(run)] == [10, 20, 30]
    assert good_step(run, tmp_path) == 30


def test_a_run_without_checkpoints_has_none(tmp_path: Path):
    assert newest_good(LocalStore(tmp_path), tmp_path) is None


def test_tied_weights_are_stored_once_and_restored_together(run: LocalStore, tmp_path: Path):
    checkpoint = newest_good(run, tmp_path)
    assert checkpoint is not None
    embedding = torch.zeros(6, 4)
    model = {
        "embedding.weight": embedding,
        "norm.weight": torch.zeros(4).bfloat16(),
        "output.weight": embedding,
    }

    load(checkpoint, model=model, optimizer=optimizer_at(0))

    assert torch.equal(model["output.weight"], model_at(30)["output.weight"])


def test_a_model_with_one_tensor_more_or_less_is_refused(run: LocalStore, tmp_path: Path):
    checkpoint = newest_good(run, tmp_path)
    assert checkpoint is not None
    more = model_at(0) | {"extra": torch.zeros(1)}
    less = {"embedding.weight": torch.zeros(6, 4)}

    with pytest.raises(CheckpointError, match="lacks extra and 0 more that are needed here"):
        load(checkpoint, model=more, optimizer=optimizer_at(0))
    with pytest.raises(CheckpointError, match=r"holds norm\.weight, which this model"):
        load(checkpoint, model=less, optimizer=optimizer_at(0))


def test_every_flipped_bit_is_noticed_and_the_file_is_named(
    run: LocalStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    source = random.Random(10)
    paths = sorted(folder(run, 30).iterdir())

    for _ in range(300):
        path = source.choice(paths)
        data = path.read_bytes()
        flipped = bytearray(data)
        flipped[source.randrange(len(data))] ^= 1 << source.randrange(8)
        path.write_bytes(flipped)
        caplog.clear()

        checkpoint = newest_good(run, tmp_path)

        assert checkpoint is not None
        assert checkpoint.name.step == 20
        assert f"step-00000030-a1/{path.name}" in caplog.text
        path.write_bytes(data)
    assert is_right(checkpoint)


@pytest.mark.parametrize("name", ["model-00000.safetensors", "state.json", "manifest.json"])
def test_torn_empty_and_missing_files_are_passed_over(run: LocalStore, tmp_path: Path, name: str):
    path = folder(run, 30) / name
    data = path.read_bytes()

    for torn in (data[:-1], data[: len(data) // 2], b"", data + b"\0"):
        path.write_bytes(torn)
        assert good_step(run, tmp_path) == 20
    path.unlink()
    assert good_step(run, tmp_path) == 20


def test_files_swapped_between_two_steps_are_noticed(run: LocalStore, tmp_path: Path):
    for name in ("model-00000.safetensors", "manifest.json", "state.json"):
        new, old = folder(run, 30) / name, folder(run, 20) / name
        data = new.read_bytes()
        new.write_bytes(old.read_bytes())
        assert good_step(run, tmp_path) == 20
        new.write_bytes(data)
    shutil.rmtree(folder(run, 30))
    shutil.copytree(folder(run, 10), folder(run, 30))
    assert good_step(run, tmp_path) == 20


def test_two_bad_checkpoints_are_passed_over_aloud_and_none_good_is_an_error(
    run: LocalStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    for step in (30, 20):
        (folder(run, step) / "model-00000.safetensors").write_bytes(b"")
    assert good_step(run, tmp_path) == 10
    assert "step-00000030-a1 is not used, the next older one is tried" in caplog.text
    assert "step-00000020-a1 is not used, the next older one is tried" in caplog.text

    (folder(run, 10) / "state.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"no checkpoint of .* is whole \(the newest: .*has 0"
    ):
        newest_good(run, tmp_path)


def test_checkpoints_without_attempts_are_not_taken_for_a_new_run(run: LocalStore, tmp_path: Path):
    shutil.rmtree(Path(run.url, "attempts"))

    with pytest.raises(
        CheckpointError, match=r"holds step-00000010-a1, but attempts/000001, which .* is gone"
    ):
        newest_good(run, tmp_path)


def test_a_store_that_fails_is_an_error_and_no_reason_to_fall_back(
    run: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def unreachable(self: LocalStore, name: str, digest: object) -> bool:
        raise StoreError("the network is down")

    monkeypatch.setattr(LocalStore, "matches", unreachable)

    with pytest.raises(StoreError, match="the network is down"):
        newest_good(run, tmp_path)


def test_what_an_overtaken_attempt_wrote_does_not_count(run: LocalStore, tmp_path: Path):
    overtake(run)

    assert list_checkpoints(run) == [
        CheckpointName(10, 1), CheckpointName(20, 1), CheckpointName(25, 2),
    ]  # fmt: skip
    assert [name.step for name in list_checkpoints(run, before=2)] == [10, 20, 30]
    assert good_step(run, tmp_path) == 20


class Bomb:
    """Runs code when unpickled: makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "name",
    ["../../../etc/passwd", "/etc/passwd", "model.pt", "model-00000.safetensors.pkl", "a\n", "", 7],
)
def test_a_manifest_that_names_other_files_is_refused(
    run: LocalStore, tmp_path: Path, name: object
):
    torch.save({"w": Bomb(tmp_path / "was-here")}, folder(run, 30) / "model.pt")
    files = json.loads((folder(run, 30) / "manifest.json").read_bytes())["files"]

    reseal(run, {"files": [*files, {"name": name, "bytes": 1, "sha256": "0" * 64}]})

    assert good_step(run, tmp_path) == 20
    assert not (tmp_path / "was-here").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "other"},
        {"version": 2},
        {"step": 31},
        {"attempt": 2},
        {"tokens": -1},
        {"world_size": True},
        {"identity_sha256": "x"},
        {"parent": "../x"},
        {"parent": 3},
        {"files": []},
        {"files": None},
        {"files": [3]},
        {"files": [{"name": "state.json", "bytes": 10**12, "sha256": "0" * 64}]},
    ],
)
def test_a_manifest_that_lies_is_refused(
    run: LocalStore, tmp_path: Path, changes: dict[str, object]
):
    reseal(run, changes)

    assert good_step(run, tmp_path) == 20


def test_sizes_that_lie_are_refused_before_anything_is_read(run: LocalStore, tmp_path: Path):
    files = json.loads((folder(run, 30) / "manifest.json").read_bytes())["files"]
    reseal(run, {"files": [{**item, "bytes": 10**12} for item in files]})

    with pytest.raises(CheckpointError, match=r"has \d+ bytes instead of 1,000,000,000,000"):
        fetch(run, CheckpointName(30, 1), tmp_path)
    with (folder(run, 30) / "manifest.json").open("r+b") as file:
        file.truncate(10**12)
    with pytest.raises(CheckpointError, match="has 1 TB, too much for a manifest"):
        fetch(run, CheckpointName(30, 1), tmp_path)


def test_a_malicious_tensor_file_with_right_hashes_is_refused(run: LocalStore, tmp_path: Path):
    path = folder(run, 30) / "model-00000.safetensors"
    for content in ((10**12).to_bytes(8, "little") + b"{}", b"\x80\x04N."):
        path.write_bytes(content)
        digest = digest_file(path)
        files = json.loads((folder(run, 30) / "manifest.json").read_bytes())["files"]
        others = [item for item in files if item["name"] != path.name]
        own = {"name": path.name, "bytes": digest.bytes, "sha256": digest.sha256}
        reseal(run, {"files": [*others, own]})

        assert good_step(run, tmp_path) == 20


def test_verify_reports_every_checkpoint_and_the_hash_of_the_weights(
    run: LocalStore, tmp_path: Path
):
    overtake(run)
    size = (folder(run, 10) / "state.json").stat().st_size
    (folder(run, 10) / "state.json").write_bytes(b"{}")
    problem = f"checkpoints/step-00000010-a1/state.json has 2 bytes instead of {size}"

    report = verify_run(run, tmp_path)

    assert report == {
        "run": run.url,
        "checkpoints": [
            {
                "name": "step-00000010-a1",
                "step": 10,
                "attempt": 1,
                "ok": False,
                "problems": [problem],
            },
            {"name": "step-00000020-a1", "step": 20, "attempt": 1, "ok": True, "problems": []},
            {
                "name": "step-00000025-a2",
                "step": 25,
                "attempt": 2,
                "ok": False,
                "problems": ["checkpoints/step-00000025-a2/manifest.json: it is empty"],
            },
            {
                "name": "step-00000030-a1",
                "step": 30,
                "attempt": 1,
                "ok": False,
                "problems": ["its attempt was overtaken by another: it is not part of the run"],
            },
        ],
        "newest_good": "step-00000020-a1",
        "weights_sha256": sha256_at(20),
    }


def test_verify_of_a_run_without_checkpoints_is_empty(tmp_path: Path):
    report = verify_run(LocalStore(tmp_path), tmp_path)

    assert report["checkpoints"] == []
    assert report["newest_good"] is report["weights_sha256"] is None


def test_a_manifest_comes_back_as_it_was(run: LocalStore):
    from casallm.train.manifest import format_manifest

    name = CheckpointName(30, 1)
    data = run.read(f"checkpoints/{name}/manifest.json")

    assert format_manifest(parse_manifest(data, name)) == data
