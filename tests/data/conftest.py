"""Small real data: documents that a vocabulary of 400 fits, and the shards made of them."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from casallm.data import prepare as prepare_module
from casallm.data import shards, sources, unit
from casallm.data.prepare import prepare
from casallm.data.shards import Dataset
from casallm.data.sources import open_source

PROSE = (
    "the model reads a page of text and learns what comes next while every page that it has not"
    " read is kept apart to see how well it does on words which were never shown before; so a loss"
    " that falls on known sentences but rises on unknown ones tells us about memory rather than"
    " understanding, and we stop early, naïve café 北京 Ελλάδα 😀 don't WE'LL 12345 3.14"
)


def write_documents(path: Path, texts: list[str]) -> Path:
    """A jsonl file of `texts`."""
    lines = (json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def make_texts(n: int, *, seed: int = 0) -> list[str]:
    """`n` different documents of 5 to 200 words."""
    rng, words = random.Random(seed), PROSE.split()
    return [f"{i}. " + " ".join(rng.choices(words, k=rng.randint(5, 200))) + "." for i in range(n)]


def files_of(directory: Path) -> dict[str, bytes]:
    """Every file beneath `directory` and its content."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def interrupt_after(n_calls: int) -> Callable[[object], None]:
    """A listener that behaves as Ctrl-C after so many calls."""
    calls = []

    def listen(progress: object) -> None:
        calls.append(progress)
        if len(calls) > n_calls:
            raise KeyboardInterrupt

    return listen


@pytest.fixture(autouse=True)
def without_power_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves bytes in the system's cache: killing a process loses none, and a busy disk waits."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return make_texts(400)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Dataset:
    """A dataset that tests must not change."""
    folder = tmp_path_factory.mktemp("prepared")
    source = open_source(str(write_documents(folder / "documents.jsonl", texts)))
    return prepare(source, folder / "shards", tokenizer=None, vocab_size=400, workers=1)


@pytest.fixture(scope="session")
def many_shards(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Dataset:
    """A dataset of about thirty small shards, which tests must not change."""
    folder = tmp_path_factory.mktemp("many")
    source = open_source(str(write_documents(folder / "documents.jsonl", texts)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_TOKENS", 2000)
        return prepare(source, folder / "shards", tokenizer=None, vocab_size=400, workers=1)


@pytest.fixture
def shard_dir(prepared: Dataset, tmp_path: Path) -> Path:
    """A copy of the dataset that a test may damage."""
    return Path(shutil.copytree(prepared.directory, tmp_path / "shards"))


@pytest.fixture
def tiktoken_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the real vocabularies (tiktoken deletes what it dislikes), or a skip."""
    shared = Path(os.environ.get("CASALLM_SHARED_DATA", "../shared/data")) / "tiktoken-cache"
    if not shared.is_dir():
        pytest.skip(f"the vocabularies of gpt2 and cl100k are not in {shared}")
    copy = tmp_path / "tiktoken"
    copy.mkdir()
    for file in shared.iterdir():
        shutil.copyfile(file, copy / file.name)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(copy))
    return copy


@pytest.fixture
def many_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source of six units that is not small, so that workers are started for it."""
    for module in (prepare_module, unit):
        monkeypatch.setattr(module, "SMALL_SOURCE_BYTES", 1000)
    monkeypatch.setattr(sources, "UNIT_BYTES", 20_000)
    folder = tmp_path / "source"
    folder.mkdir()
    write_documents(folder / "a.jsonl", make_texts(150, seed=1))
    write_documents(folder / "b.jsonl", make_texts(30, seed=2))
    return folder
