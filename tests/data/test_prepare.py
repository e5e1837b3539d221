import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from casallm.data import shards, unit
from casallm.data.prepare import load_or_prepare, prepare
from casallm.data.progress import Progress
from casallm.data.shards import open_dataset, verify_dataset
from casallm.data.sources import DataConfig, open_source
from casallm.data.summary import documents_in
from casallm.data.tokenizer import (
    QWEN2_PATTERN,
    Tokenizer,
    TokenizerConfig,
    train_tokenizer,
)
from casallm.data.vocabulary import train_on_source
from casallm.errors import DataError
from tests.data.conftest import files_of, interrupt_after, make_texts, write_documents


def texts_of(dataset, split):
    tokenizer = dataset.tokenizer()
    return [tokenizer.decode(ids.tolist()) for ids in documents_in(dataset, split)]


def run(source, out, **changes):
    settings = {"tokenizer": None, "vocab_size": 400, "workers": 1} | changes
    return prepare(open_source(str(source)), out, **settings)


def test_train_and_val_hold_every_document_in_order(prepared, texts):
    train, val = texts_of(prepared, "train"), texts_of(prepared, "val")

    assert sorted([*train, *val]) == sorted(texts)
    assert train == [text for text in texts if text in set(train)]
    assert val == [text for text in texts if text in set(val)]
    assert 5 <= len(val) <= 40  # 5 % of 400


def test_equal_documents_stay_in_one_split(tmp_path, texts):
    dataset = run(write_documents(tmp_path / "a.jsonl", texts * 2), tmp_path / "out")

    train, val = texts_of(dataset, "train"), texts_of(dataset, "val")

    assert set(train).isdisjoint(val)
    assert len(train) + len(val) == 2 * len(texts)


def test_a_held_out_file_is_the_held_out_part(tmp_path, texts):
    write_documents(tmp_path / "train.jsonl", texts[:300])
    write_documents(tmp_path / "val.jsonl", texts[300:])

    dataset = run(f"{tmp_path}/*.jsonl", tmp_path / "out")

    assert texts_of(dataset, "train") == texts[:300]
    assert texts_of(dataset, "val") == texts[300:]


@pytest.mark.parametrize("n_texts", [2, 5, 12])
def test_a_few_documents_still_hold_one_out(tmp_path, texts, caplog, n_texts):
    path = write_documents(tmp_path / "a.jsonl", texts[:n_texts])

    dataset = run(path, tmp_path / "out", vocab_size=280)

    assert dataset.splits["val"].documents >= 1
    assert dataset.splits["train"].documents >= 1
    assert "documents are held out, so validation figures will be rough" in caplog.text


def test_the_vocabulary_is_trained_on_what_is_not_held_out(prepared):
    trained = train_tokenizer(texts_of(prepared, "train"), 400)

    assert trained.fingerprint == prepared.manifest.tokenizer.fingerprint


def test_a_vocabulary_is_trained_as_prepare_trains_it(prepared, tmp_path, texts):
    path = write_documents(tmp_path / "documents.jsonl", texts)

    tokenizer = train_on_source(open_source(str(path)), 400)

    assert tokenizer.fingerprint == prepared.manifest.tokenizer.fingerprint


def test_any_number_of_workers_makes_the_same_files(many_units, tmp_path):
    for workers in (1, 2, 3):
        run(many_units, tmp_path / str(workers), workers=workers)

    calm = files_of(tmp_path / "1")
    assert len([name for name in calm if name.startswith("train-")]) == 6
    assert files_of(tmp_path / "2") == calm
    assert files_of(tmp_path / "3") == calm
    assert verify_dataset(tmp_path / "3") == []


def test_threads_and_the_size_of_batches_make_no_difference(tmp_path, texts, monkeypatch):
    path = write_documents(tmp_path / "a.jsonl", texts)
    monkeypatch.setattr(shards, "SHARD_TOKENS", 3000)
    run(path, tmp_path / "calm", workers=1)

    monkeypatch.setattr(unit, "_BATCH_BYTES", 700)
    run(path, tmp_path / "out", workers=3)

    assert files_of(tmp_path / "out") == files_of(tmp_path / "calm")
    assert len(list((tmp_path / "out").glob("train-*.npy"))) > 5


def test_the_same_documents_in_another_format_have_the_same_ids(tmp_path, texts, prepared):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"content": texts}), path, row_group_size=50)

    dataset = prepare(
        open_source(str(path), text_column="content"),
        tmp_path / "out",
        tokenizer=prepared.tokenizer(),
        vocab_size=400,
    )

    names = [shard.sha256 for shard in dataset.splits["train"].shards]
    assert names == [shard.sha256 for shard in prepared.splits["train"].shards]


def test_ids_beyond_sixteen_bits_make_wide_shards(tmp_path, texts):
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"th": 70_000}
    wide = Tokenizer("wide", pattern=QWEN2_PATTERN, ranks=ranks, reserved={})

    dataset = run(write_documents(tmp_path / "a.jsonl", texts), tmp_path / "out", tokenizer=wide)

    assert dataset.manifest.dtype == "uint32"
    assert 70_000 in dataset.shard("train", 0)
    assert sorted([*texts_of(dataset, "train"), *texts_of(dataset, "val")]) == sorted(texts)


def test_the_same_again_does_nothing(tmp_path, texts):
    path = write_documents(tmp_path / "a.jsonl", texts)
    run(path, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}

    run(path, tmp_path / "out")

    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_shards_of_something_else_are_not_overwritten(shard_dir, tmp_path, texts):
    path = write_documents(tmp_path / "other.jsonl", texts[:200])

    with pytest.raises(DataError) as caught:
        run(path, shard_dir)

    assert str(caught.value) == (
        f"{shard_dir} holds the shards of 'documents.jsonl' with the vocabulary 'bpe-400', not"
        " those asked for: choose another directory, or remove it"
    )


def test_a_directory_of_other_files_is_not_prepared_into(tmp_path, texts):
    path = write_documents(tmp_path / "a.jsonl", texts)

    with pytest.raises(DataError, match="holds other files: choose an empty directory"):
        run(path, tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["a.jsonl"]


def test_rows_without_text_are_in_the_manifest_and_said_aloud(tmp_path, texts, caplog):
    path = write_documents(tmp_path / "a.jsonl", texts)
    with path.open("a") as file:
        file.write('{"text": null}\n{"text": ""}\n{"text": null}\n{"text": "a\\ud800"}\n')

    dataset = run(path, tmp_path / "out")

    assert dataset.manifest.source["oddities"] == {
        "left out, null": 2,
        "left out, empty": 1,
        "repaired, lone surrogates": 1,
    }
    assert f"2 rows: left out, null (the first: {path}:401)" in caplog.text


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_line_is_one_sentence_and_leaves_no_manifest(many_units, tmp_path, prepared, workers):
    write_documents(many_units / "val.jsonl", make_texts(5, seed=3))
    with (many_units / "b.jsonl").open("a") as file:
        file.write("{broken\n")

    with pytest.raises(DataError, match=r"b\.jsonl:31 is not JSON"):
        run(many_units, tmp_path / "out", workers=workers, tokenizer=prepared.tokenizer())

    assert list((tmp_path / "out" / "_prepare").glob("unit-*.json"))
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert list((tmp_path / "out").glob(".*.tmp")) == []


def test_what_fails_before_a_unit_is_finished_leaves_nothing(tmp_path):
    path = write_documents(tmp_path / "a.jsonl", ["too little text", "for any vocabulary"])

    with pytest.raises(DataError, match="too little text for a vocabulary of 400"):
        run(path, tmp_path / "out")

    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("texts", [["", " "], ["the only document"]])
def test_a_source_of_nothing_to_train_on_is_one_sentence(tmp_path, texts):
    path = write_documents(tmp_path / "a.jsonl", texts)

    with pytest.raises(DataError, match="the source holds no text to train on"):
        run(path, tmp_path / "out")


def test_a_stopped_preparation_of_another_source_is_not_continued(many_units, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(many_units, tmp_path / "out", on_progress=interrupt_after(3))
    (many_units / "b.jsonl").unlink()

    with pytest.raises(DataError, match="a stopped preparation of another source or vocabulary"):
        run(many_units, tmp_path / "out")


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path, texts):
    path = write_documents(tmp_path / "a.jsonl", texts)

    def meddle(_):
        with path.open("a") as file:
            file.write('{"text": "one more"}\n')

    with pytest.raises(DataError, match=r"the files of a\.jsonl changed while they were read"):
        run(path, tmp_path / "out", on_progress=meddle)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_two_processes_do_not_prepare_one_directory(tmp_path, texts):
    path = write_documents(tmp_path / "a.jsonl", texts)
    asked = []

    def ask_another(_):
        context = multiprocessing.get_context("fork")
        with context.Pool(1) as pool:
            asked.append(pool.apply(what_prepare_says, (path, tmp_path / "out")))

    run(path, tmp_path / "out", on_progress=ask_another)

    assert "another process is preparing" in asked[0]
    assert verify_dataset(tmp_path / "out") == []


def what_prepare_says(path, out):
    try:
        run(path, out)
    except DataError as error:
        return str(error)
    return "nothing"


def test_progress_is_told_in_all_that_was_done(many_units, tmp_path):
    told: list[Progress] = []

    dataset = run(many_units, tmp_path / "out", on_progress=told.append)

    last = told[-1]
    splits = dataset.splits.values()
    assert last.documents == sum(split.documents for split in splits) == 180
    assert last.tokens == sum(split.tokens for split in splits)
    assert last.bytes_of_text == sum(split.bytes_of_text for split in splits)
    assert last.text_bytes == sum(path.stat().st_size for path in many_units.iterdir())
    assert [each.documents for each in told] == sorted(each.documents for each in told)


def test_documents_are_prepared_once_under_their_fingerprint(tmp_path, texts):
    data = DataConfig(source=str(write_documents(tmp_path / "a.jsonl", texts)))

    first = load_or_prepare(data, TokenizerConfig(), vocab_size=400, root=tmp_path / "data")
    second = load_or_prepare(data, TokenizerConfig(), vocab_size=400, root=tmp_path / "data")
    other = load_or_prepare(data, TokenizerConfig(), vocab_size=390, root=tmp_path / "data")

    assert first.directory == second.directory != other.directory
    assert first.directory.parent == tmp_path / "data"
    assert len(first.directory.name) == 16


def test_shards_named_as_the_source_are_opened_where_they_lie(shard_dir):
    data = DataConfig(source=str(shard_dir))

    dataset = load_or_prepare(data, TokenizerConfig(), vocab_size=999)

    assert dataset.directory == shard_dir


def test_a_full_disk_is_one_sentence_and_what_is_finished_is_kept(many_units, tmp_path):
    calm = files_of(run(many_units, tmp_path / "calm").directory)
    largest = max(len(content) for name, content in calm.items() if name.endswith(".npy"))

    said = in_child(prepare_with_limit, many_units, tmp_path / "out", largest - 1)

    assert said == (
        f"the disk that holds {tmp_path / 'out'} is full: make room and run the same again"
        " (finished parts are kept)"
    )
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert list((tmp_path / "out").glob(".*.tmp")) == []
    run(many_units, tmp_path / "out")
    assert files_of(tmp_path / "out") == calm


def in_child(function, *arguments):
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, arguments)


def prepare_with_limit(path, out, n_bytes):
    """What prepare says where no file may grow beyond `n_bytes`."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))
    return what_prepare_says(path, out)


KILLED = """
import sys
from pathlib import Path
from casallm.data import prepare, sources, unit
from casallm.data.sources import open_source
prepare.SMALL_SOURCE_BYTES = unit.SMALL_SOURCE_BYTES = 1000
sources.UNIT_BYTES = 20_000
if __name__ == "__main__":
    prepare.prepare(
        open_source(sys.argv[1]), Path(sys.argv[2]), tokenizer=None, vocab_size=400, workers=2
    )
"""


def kill_at(moment, script, source, out):
    """Starts a preparation and kills it after `moment` seconds; whether it was still running."""
    environment = os.environ | {"PYTHONPATH": "."}
    with subprocess.Popen([sys.executable, script, source, out], env=environment) as process:
        time.sleep(moment)
        process.kill()
    return process.returncode != 0


@pytest.mark.parametrize(
    "n_kills", [1, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
def test_a_killed_preparation_goes_on_to_the_same_files(many_units, tmp_path, n_kills):
    script, out = tmp_path / "main.py", tmp_path / "out"
    script.write_text(KILLED)
    started = time.monotonic()
    subprocess.run(
        [sys.executable, str(script), str(many_units), str(tmp_path / "calm")],
        env=os.environ | {"PYTHONPATH": "."},
        check=True,
    )
    seconds = time.monotonic() - started
    calm = files_of(tmp_path / "calm")
    rng = random.Random(1)

    for _ in range(n_kills):
        if not kill_at(rng.uniform(0.2, 1.1) * seconds, str(script), str(many_units), str(out)):
            assert files_of(out) == calm
            shutil.rmtree(out)
    run(many_units, out, workers=2)

    assert files_of(out) == calm
    assert open_dataset(out).manifest == open_dataset(tmp_path / "calm").manifest


def test_finished_units_are_not_done_again(many_units, tmp_path):
    (many_units / "c.jsonl").write_text('{"text": "x"}\n' * 2000)
    run(many_units, tmp_path / "calm")
    with pytest.raises(KeyboardInterrupt):
        run(many_units, tmp_path / "out", on_progress=interrupt_after(3))
    finished = {
        path: path.stat().st_mtime_ns
        for record in (tmp_path / "out" / "_prepare").glob("unit-*.json")
        for path in (tmp_path / "out").glob(f"*-{record.stem.removeprefix('unit-')}-*.npy")
    }

    run(many_units, tmp_path / "out")

    assert finished
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert files_of(tmp_path / "out") == files_of(tmp_path / "calm")


def test_a_finished_unit_whose_shard_was_cut_is_done_again(many_units, tmp_path):
    run(many_units, tmp_path / "calm")
    with pytest.raises(KeyboardInterrupt):
        run(many_units, tmp_path / "out", on_progress=interrupt_after(3))
    record = json.loads(next((tmp_path / "out" / "_prepare").glob("unit-*.json")).read_bytes())
    name = record["splits"]["train"]["shards"][0]["name"]
    os.truncate(tmp_path / "out" / name, 200)

    run(many_units, tmp_path / "out")

    assert files_of(tmp_path / "out") == files_of(tmp_path / "calm")
