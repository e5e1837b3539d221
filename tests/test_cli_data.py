import json
import os
import subprocess
import sys

import pytest

from casallm.cli import app
from tests.data.conftest import make_texts, tiktoken_cache, write_documents
from tests.faults.fixtures import credentials, s3

__all__ = ["credentials", "s3", "tiktoken_cache"]


@pytest.fixture
def run(capsys):
    """Runs a command in this process; what it printed."""

    def call(*arguments):
        with pytest.raises(SystemExit) as ended:
            app([str(argument) for argument in arguments], standalone_mode=True)
        assert ended.value.code in (0, None)
        return capsys.readouterr().out

    return call


@pytest.fixture
def documents(tmp_path):
    return write_documents(tmp_path / "documents.jsonl", make_texts(300))


def test_a_data_set_is_made_in_a_bucket_shown_and_verified(
    run, s3, documents, tmp_path, monkeypatch
):
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.proxy.url)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    url = f"s3://{s3.name}/set"

    made = run("prepare", "--data", documents, "--out", url, "--vocab-size", 400)
    shown = json.loads(run("data", "show", url, "--json"))
    verified = run("data", "verify", url)

    assert made.startswith(f"{url} holds train: ")
    assert shown["splits"]["train"]["documents"] + shown["splits"]["val"]["documents"] == 300
    assert verified == f"{url}: every shard is whole\n"


def test_a_share_says_that_others_are_awaited(run, documents, tmp_path):
    out = tmp_path / "out"
    command = ("prepare", "--data", documents, "--out", out, "--vocab-size", 400, "--node")

    assert "the share of node 2/2 is done; the last of the others completes it" in run(
        *command, "2/2"
    )
    assert f"{out} holds train: " in run(*command, "1/2")


def test_vocabularies_are_compared_on_what_is_held_out(run, documents, tiktoken_cache, tmp_path):
    run("tokenizer", "train", "--data", documents, "--vocab-size", 400, "--out", tmp_path / "own")

    shown = run("tokenizer", "show", "gpt2", tmp_path / "own", "--data", documents, "--json")

    gpt2, own = json.loads(shown)
    assert (gpt2["name"], own["name"]) == ("gpt2", "bpe-400")
    assert gpt2["bytes_of_text"] == own["bytes_of_text"] < 30_000
    assert gpt2["bytes_per_token"] > own["bytes_per_token"] > 1


@pytest.mark.slow
def test_preparing_loads_no_torch(documents, tmp_path):
    script = (
        "import sys\nfrom casallm.cli import app\n"
        "try: app(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print('torch' in sys.modules)"
    )
    arguments = ["prepare", "--data", documents, "--out", tmp_path / "out", "--vocab-size", "400"]

    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": "."},
    )

    assert done.stdout.splitlines()[-1] == "False"
