import json
import shlex

import pytest

from casallm.config import build, merge, parse_overrides
from casallm.data.manifest import Manifest
from casallm.errors import CheckpointError
from casallm.storage.store import open_store
from casallm.train.report_data import Baseline
from casallm.train.report_loader import dataset_facts, format_time, load_report_data
from casallm.train.run import RunConfig, identity_of, load_config, load_preset
from tests.train.generated_run import DATASET, MACHINE, Stretch, make_run

THREE = (
    Stretch(100, None),
    Stretch(250, "stopped", "SIGTERM"),
    Stretch(400, "finished", "all 400 steps are done"),
)


def test_a_finished_run_tells_what_it_was_and_how_it_ended(tmp_path):
    data = load_report_data(make_run(tmp_path / "run"))

    assert (data.name, data.stage, data.state) == ("run", "pretrain", "finished")
    assert data.reason == "all 400 steps are done"
    assert (data.total_steps, data.tokens_per_step, data.context_length) == (400, 8_192, 256)
    assert data.baseline == Baseline(4.1023, 1.7312)
    assert data.hardware == "2 CPU cores"


def test_each_start_tells_its_steps_its_end_and_its_dollars(tmp_path):
    data = load_report_data(make_run(tmp_path / "run", stretches=THREE, usd_per_hour=36.0))

    rows = [(a.number, a.first_step, a.last_step, a.ending, a.is_lost) for a in data.attempts]
    assert rows == [
        (1, 0, 100, "lost without a word", True),
        (2, 100, 250, "stopped: SIGTERM", False),
        (3, 250, 400, "finished: all 400 steps are done", False),
    ]
    paid = [line["usd"] for line in data.lines if line.get("usd") is not None][-1]
    assert sum(a.usd for a in data.attempts) == pytest.approx(paid)
    assert data.attempts[0].usd == pytest.approx(paid / 4, rel=0.05)


def test_a_run_that_goes_on_is_not_called_lost(tmp_path):
    data = load_report_data(make_run(tmp_path / "run", stretches=[Stretch(130, None)]))

    assert data.state == "running"
    assert data.attempts[0].ending == "no end on record yet"
    assert not data.attempts[0].is_lost


def test_a_stopped_run_says_why(tmp_path):
    data = load_report_data(
        make_run(tmp_path / "run", stretches=[Stretch(130, "stopped", "SIGTERM")])
    )

    assert (data.state, data.reason) == ("stopped", "SIGTERM")


def test_a_run_without_facts_about_its_data_has_a_report_that_does_not_speak_of_them(tmp_path):
    data = load_report_data(make_run(tmp_path / "run", has_facts=False))

    (section,) = [section for section in data.sections if section.title == "Data"]
    assert data.baseline is None
    assert [name for name, _ in section.rows] == [
        "Source",
        "Tokenizer fingerprint",
        "Manifest sha256",
    ]


def test_the_data_section_names_source_sizes_and_vocabulary(tmp_path):
    data = load_report_data(make_run(tmp_path / "run"))

    (section,) = [section for section in data.sections if section.title == "Data"]
    assert dict(section.rows) == {
        "Source": "builtin (botocore 1.43.117)",
        "Training text": "5,210,430 tokens in 9,412 documents (18.3 MB)",
        "Held-out text": "274,120 tokens in 495 documents (962 kB)",
        "Passes over it": "0.63",
        "Tokenizer": "trained, 4,096 tokens",
        "Tokenizer fingerprint": "cd" * 32,
        "Manifest sha256": "ab" * 32,
    }


def test_the_machine_section_names_gpus_price_and_software(tmp_path):
    gpu = {
        **MACHINE,
        "device_kind": "cuda",
        "device_name": "NVIDIA H100 80GB HBM3",
        "n_gpus": 8,
        "gpu_memory_bytes": 85_000_000_000,
    }
    data = load_report_data(make_run(tmp_path / "run", machine=gpu, usd_per_hour=55.04))

    (section,) = [section for section in data.sections if section.title == "Machine"]
    assert dict(section.rows) == {
        "Hardware": "8 x NVIDIA H100 80GB HBM3",
        "Memory of a GPU": "85 GB",
        "Main memory": "24 GB",
        "Ranks": "1",
        "Price": "$55.04 an hour",
        "Software": "casallm 0.1.0, torch 2.13.0, python 3.11.7",
    }


def test_the_command_to_do_it_again_has_the_same_identity(tmp_path):
    run = make_run(tmp_path / "run", overrides=["model.n_layers=3", "optim.lr=0.00123"])
    text = {c.purpose: c.text for c in load_report_data(run).commands}["Do the same again"]

    words = shlex.split(text)
    again = build(RunConfig, merge(load_preset("350m"), parse_overrides(words[4:])))

    assert words[:4] == ["casallm", "pretrain", "--run", f"{run.url}-again"]
    assert identity_of(again, DATASET) == identity_of(load_config(run)[0], DATASET)


def test_names_that_a_shell_would_split_are_quoted(tmp_path):
    run = make_run(tmp_path / "a run; rm x")

    for command in load_report_data(run).commands:
        assert any(word.startswith(run.url) for word in shlex.split(command.text))


def test_only_a_run_that_is_not_over_can_be_continued(tmp_path):
    over = load_report_data(make_run(tmp_path / "over"))
    stopped = load_report_data(make_run(tmp_path / "s", stretches=[Stretch(130, "stopped", "x")]))

    assert "Continue it" not in [command.purpose for command in over.commands]
    assert stopped.commands[0].text == f"casallm pretrain --run {stopped.url}"


def test_steps_beyond_the_chain_are_not_told_but_their_dollars_are(tmp_path):
    run = make_run(tmp_path / "run", stretches=THREE, usd_per_hour=36.0)
    lost = {"step": 110, "tokens": 901_120, "loss": 99.0, "usd": 1000.0, "attempt": 1}
    with (tmp_path / "run/attempts/000001/metrics.jsonl").open("a") as file:
        file.write(json.dumps(lost) + "\n")

    data = load_report_data(run)

    assert 99.0 not in [line.get("loss") for line in data.lines]
    assert data.attempts[0].usd == 1000.0


def test_a_directory_that_is_no_run_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(CheckpointError) as refused:
        load_report_data(open_store(str(tmp_path / "nothing")))

    assert str(refused.value) == (
        f"{open_store(str(tmp_path / 'nothing')).url} has no config.yaml, so it is no run: check"
        " the name with `casallm runs`"
    )


def test_times_are_shown_as_people_read_them():
    assert format_time("2026-11-02T09:05:59+00:00") == "2 Nov 2026, 09:05 UTC"
    assert format_time("") == ""


def test_the_facts_of_a_data_set_are_what_the_report_shows():
    split = {"tokens": 10, "documents": 2, "bytes_of_text": 40, "shards": []}
    manifest = Manifest(
        tokenizer={"name": "trained", "fingerprint": "cd" * 32, "vocab_size": 300, "bos_id": 290},
        dtype="uint16",
        source={"name": "builtin", "fingerprint": "ef" * 32},
        splits={"train": split, "val": split},
    )

    facts = dataset_facts(manifest)

    assert facts["splits"]["val"] == {"tokens": 10, "documents": 2, "bytes_of_text": 40}
    assert facts["tokenizer"]["vocab_size"] == 300
    assert facts["source"] == {"name": "builtin", "fingerprint": "ef" * 32}
