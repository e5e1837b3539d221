"""Fine-tuning: settings from the base, conversations each seen three times, and exact resumes."""

import itertools
import json
import math
import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch

from casallm.data.mixture import load_mixture
from casallm.errors import CasallmError, CheckpointError, ConfigError
from casallm.storage.store import Store, open_store
from casallm.train.distributed import World
from casallm.train.machine import Machine
from casallm.train.pretrain import PretrainRequest
from casallm.train.run import RunConfig, changes_of, load_config, save_config
from casallm.train.sft import SftRequest, open_feed
from casallm.train.stage import Material, Start
from tests.train.base_run import make_base, write_recipe
from tests.train.real_run import RealRun

MACHINE = Machine(
    device_kind="cpu",
    device_name="x86_64",
    n_gpus=0,
    gpu_memory_bytes=0,
    cpu_flops=1e11,
    n_cores=2,
    memory_bytes=16 << 30,
    python="3",
    torch="2",
    casallm="0",
)
SETTINGS = (
    "train.compile=off",
    "checkpoint.every_steps=4",
    "log.every_steps=1",
    "log.wandb=off",
)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and a base run, which tests must not change."""
    folder = tmp_path_factory.mktemp("workshop")
    make_base(folder / "runs" / "base")
    write_recipe(folder)
    return folder


@pytest.fixture
def folder(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The workshop as the working directory."""
    monkeypatch.chdir(workshop)
    return workshop


def request(*settings: str, run: str | None = None, **asked: str | None) -> SftRequest:
    words = {"start_from": "base", "data": "recipe.yaml", **asked}
    return SftRequest(Start(run=run, settings=settings), **words)


def settle(asked: SftRequest, run: Store | None = None) -> tuple[RunConfig, Material]:
    return asked.settle(MACHINE, run or open_store(asked.run_url(MACHINE)))


def begin(asked: SftRequest) -> Store:
    """The run as its first start leaves it before any step."""
    run = open_store(asked.run_url(MACHINE))
    config, material = settle(asked, run)
    for name, path in material.files.items():
        run.put(name, path)
    save_config(run, config, material.identity)
    return run


def refusal(asked: SftRequest) -> str:
    with pytest.raises(CasallmError) as caught:
        settle(asked)
    return str(caught.value)


def test_settings_follow_from_the_run_that_is_started_from(folder: Path):
    base, _ = load_config(open_store("runs/base"))

    config, material = settle(request())

    assert (config.stage, config.model) == ("sft", base.model)
    assert config.optim == base.optim.model_copy(update={"lr": 2e-4, "name": "adamw"})
    assert (config.schedule.name, config.schedule.warmup_fraction) == ("cosine", 0.03)
    assert config.train.context_length == base.train.context_length
    assert config.train.global_batch_size == base.train.global_batch_size // 4
    assert config.train.epochs == 3
    assert config.train.steps == math.ceil(3 * material.facts["rows_per_epoch"] / 4)
    assert config.base.checkpoint == "step-00000024-a1"


def test_what_is_asked_wins(folder: Path):
    config, material = settle(
        request("optim.lr=1e-3", "train.epochs=2", "train.global_batch_size=5", "identity.name=Eve")
    )

    assert (config.optim.lr, config.train.epochs) == (1e-3, 2)
    assert config.train.steps == math.ceil(2 * material.facts["rows_per_epoch"] / 5)
    assert load_mixture(material.directory / "mixture.npz").identity.name == "Eve"


def test_the_recipe_says_who_the_assistant_is_unless_asked(folder: Path):
    assert settle(request())[0].identity.name == "Ada"


def test_the_identity_holds_recipe_mixture_vocabulary_and_weights(folder: Path):
    _, material = settle(request())

    assert set(material.identity) == {
        "recipe_sha256",
        "mixture_fingerprint",
        "tokenizer_fingerprint",
        "base_weights_sha256",
    }
    other = settle(request("identity.maker=us"))[1].identity
    assert material.identity["recipe_sha256"] != other["recipe_sha256"]
    assert material.identity["base_weights_sha256"] == other["base_weights_sha256"]


def test_a_dry_run_writes_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    asked = request(start_from=str(folder / "runs/base"), data=str(folder / "recipe.yaml"))

    config = asked.plan(MACHINE, open_store(str(tmp_path / "runs/x")))

    assert config.train.steps > 1
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_named_after_the_one_that_it_starts_from(folder: Path):
    assert request().run_url(MACHINE) == "runs/base-sft"
    assert request(start_from="base@24").run_url(MACHINE) == "runs/base-sft"
    assert request(start_from="s3://ours/350m/").run_url(MACHINE) == "s3://ours/350m-sft"
    assert request(run="mine").run_url(MACHINE) == "runs/mine"


def test_by_default_the_newest_finished_pretraining_run_is_started_from(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(("unfinished", "tuned", "newer", "older")):
        shutil.copytree(workshop / "runs/base", tmp_path / "runs" / name)
        os.utime(tmp_path / "runs" / name / "finished.json", (0, 1000 - age))
    Path("runs/unfinished/finished.json").unlink()
    config, dataset = load_config(open_store("runs/tuned"))
    save_config(open_store("runs/tuned"), config.model_copy(update={"stage": "sft"}), dataset)

    assert request(start_from=None).run_url(MACHINE) == "runs/newer-sft"


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (
            {"start_from": "base@7"},
            "runs/base keeps no checkpoint of step 7 (kept: 24): name one of those, or no step for"
            " the newest",
        ),
        (
            {"start_from": "nothing"},
            "runs/nothing has no config.yaml, so it is no run: check it with `casallm runs`",
        ),
        (
            {"start_from": "runs/exported"},
            "runs/exported is an exported model, and only runs can be started from so far: name"
            " the run that it was exported from",
        ),
        (
            {"data": "recipee.yaml"},
            "there is no recipe 'recipee.yaml': name a YAML file, or one of reference, offline",
        ),
    ],
)
def test_what_cannot_be_started_from_is_said_in_a_sentence(folder: Path, asked, sentence):
    (folder / "runs/exported").mkdir(exist_ok=True)
    (folder / "runs/exported/config.json").write_text("{}")

    assert refusal(request(**asked)) == sentence


def test_without_a_finished_run_somebody_is_told_to_make_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(CheckpointError, match="make one with `make pretrain`"):
        request(start_from=None).run_url(MACHINE)


@pytest.mark.parametrize(
    "setting", ["model.d_model=64", "tokenizer.name=gpt2", "base.run=x", "train.steps=9"]
)
def test_what_follows_from_the_base_or_the_recipe_cannot_be_set(folder: Path, setting):
    with pytest.raises(ConfigError):
        settle(request(setting))


def test_stages_do_not_continue_each_other(folder: Path):
    run = begin(request(run="stages"))

    with pytest.raises(CheckpointError, match="is a run of sft, not of pretrain"):
        PretrainRequest(Start(run="stages")).plan(MACHINE, run)
    with pytest.raises(CheckpointError, match="is a run of pretrain, not of sft"):
        settle(request(run="base"))


def test_a_run_goes_on_with_the_mixture_that_it_keeps(folder: Path):
    asked = request(run="kept")
    run = begin(asked)
    first, material = settle(asked)
    (material.directory / "mixture.npz").unlink()
    rows = (folder / "chats.jsonl").read_text()
    (folder / "chats.jsonl").unlink()
    try:
        config, again = settle(asked)
    finally:
        (folder / "chats.jsonl").write_text(rows)

    assert config == first
    assert again.identity == material.identity
    assert changes_of(run, config, again.identity) == []


@pytest.mark.parametrize(
    ("asked", "difference"),
    [
        ({"data": "other.yaml"}, "dataset.mixture_fingerprint"),
        ({"start_from": "base2"}, "dataset.base_weights_sha256"),
    ],
)
def test_another_recipe_or_base_is_another_run(folder: Path, asked, difference):
    run = begin(request(run="changed"))
    make_base(folder / "runs" / "base2", settings=("train.seed=5",))
    (folder / "other.yaml").write_text("sources: [{path: chats.jsonl}]\n")

    config, material = settle(request(run="changed", **asked))

    changed = [line.split(":")[0] for line in changes_of(run, config, material.identity)]
    assert difference in changed


def test_another_name_or_rate_is_another_run(folder: Path):
    run = begin(request(run="renamed"))

    config, material = settle(request("identity.name=Eve", "optim.lr=0.5", run="renamed"))

    differences = changes_of(run, config, material.identity)
    assert "identity.name: Ada -> Eve" in differences
    assert "optim.lr: 0.0002 -> 0.5" in differences


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_conversation_is_seen_exactly_three_times(folder: Path, world_size):
    config, material = settle(request())
    seen: Counter[tuple[int, ...]] = Counter()
    for rank in range(world_size):
        world = World(rank, world_size, 0, torch.device("cpu"), None)
        feed = open_feed(material.directory, config, world, 2)
        for step in range(config.train.steps):
            for batch in feed.loader.batches(step):
                seen.update(conversations(batch))
        feed.loader.close()

    mixture = load_mixture(material.directory / "mixture.npz")
    expected = Counter(tuple(sample.ids[:-1].tolist()) for sample in mixture.train)
    assert {ids: n // 3 for ids, n in seen.items()} == expected
    assert all(n % 3 == 0 for n in seen.values())


def conversations(batch) -> list[tuple[int, ...]]:
    """The ids of each document of a batch that has a target."""
    found = []
    inputs, targets = batch.inputs_BT.flatten(), batch.targets_BT.flatten()
    for start, stop in itertools.pairwise(batch.document_offsets.tolist()):
        if (targets[start:stop] >= 0).any():
            found.append(tuple(inputs[start:stop].tolist()))
    return found


def test_chats_that_leave_no_room_for_an_answer_are_not_sampled(folder: Path):
    config, material = settle(request(f"eval.prompts=[Hello, {'long ' * 60}]"))
    world = World(0, 1, 0, torch.device("cpu"), None)

    feed = open_feed(material.directory, config, world, 2)
    feed.loader.close()

    assert [prompt.text for prompt in feed.prompts] == ["Hello"]
    assert set(feed.sources) == {"chats.jsonl", "greetings"}


@pytest.fixture(scope="module")
def tuned(workshop: Path) -> RealRun:
    """A fine-tuning that nothing disturbed."""
    run = tuning(workshop, "calm-sft")
    done = run.start().wait_for_exit()
    assert done.code == 0, done.stderr
    return run


def tuning(workshop: Path, name: str) -> RealRun:
    command = ("sft", "--from", "base", *SETTINGS)
    return RealRun(workshop / "recipe.yaml", name, ranks=1, command=command)


@pytest.mark.slow
def test_killed_in_the_second_epoch_a_run_ends_with_the_weights_of_the_calm_one(tuned, workshop):
    n_steps = tuned.metrics()[-1]["step"]
    killed = tuning(workshop, "killed-sft")
    killed.start().wait_for_step(n_steps // 3 + 3)
    killed.signal(signal.SIGKILL)
    killed.wait_for_exit()
    assert killed.newest_step() < 2 * n_steps // 3 + 3

    done = killed.start().wait_for_exit()

    assert done.code == 0, done.stderr
    assert "continues from step" in done.stderr
    assert killed.weights() == tuned.weights()
    assert [line["loss"] for line in killed.metrics()] == [line["loss"] for line in tuned.metrics()]


def test_a_fine_tuning_records_losses_by_source_and_judges_the_chat(tuned):
    lines = (tuned.directory / "metrics.jsonl").read_text().splitlines()
    last = [json.loads(line) for line in lines if "val_loss" in line][-1]
    report = (tuned.directory / "report.md").read_text()

    assert {"val_loss/chats.jsonl", "val_loss/greetings"} <= last.keys()
    assert "| Started from | runs/base, step-00000024-a1 |" in report
    assert "| chats.jsonl | 54 learned, 6 held out |" in report
    assert "Says its name when asked" in report
    assert "casallm sft --from runs/base@24 --run runs/calm-sft-again" in report
