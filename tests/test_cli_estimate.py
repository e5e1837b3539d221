import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from casallm.cli_estimate import estimate_command, parse_shape
from casallm.errors import ConfigError
from casallm.estimate.architecture import count_matmul_params, count_params, named_size

SHAPE = "n_layers=24,d_model=2048,n_heads=16,vocab_size=50304"
PRICED = ("--params", "1B", "--gpu", "A100:8", "--price-per-gpu-hour")
KNOWN = (
    "--shape", SHAPE, "--context", "2048",
    "--tokens", "26B", "--gpu", "A100-80GB:8", "--nodes", "16", "--stack", "eager",
    "--price-per-gpu-hour", "1.75",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _no_catalog(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The snapshot answers, whatever lies in the home of whoever runs the tests."""
    monkeypatch.setenv("SKY_RUNTIME_DIR", str(tmp_path))


def run(*arguments: str) -> str:
    app = typer.Typer()
    app.command()(estimate_command)
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def ask(*arguments: str) -> dict:
    return json.loads(run(*arguments, "--json"))


def test_a_known_machine_is_answered_without_a_catalog():
    answer = ask(*KNOWN)
    (only,) = answer["offers"]

    assert answer["tokens"] == 26_000_000_000
    assert (only["gpu"], only["gpus"], only["nodes"], only["spot"]) == ("A100-80GB", 8, 16, False)
    assert only["usd_per_hour"] == pytest.approx(224)
    assert only["usd"]["p50"] == pytest.approx(only["hours"]["p50"] * 224, rel=1e-3)


def test_params_mean_twenty_tokens_each():
    assert ask("--params", "1.2B")["tokens"] == 24_000_000_000


def test_a_preset_brings_its_own_tokens_and_context():
    answer = ask("--preset", "124m")

    assert answer["tokens"] == 4769 * 512 * 1024
    assert answer["context_length"] == 1024
    assert ask("--preset", "6.7b", "--gpu", "B200")["tokens"] == 20 * count_params(
        named_size("6.7b")
    )


def test_a_budget_finds_the_model_and_the_tokens():
    answer = ask("--budget", "$100", "--deadline", "24h")
    best = answer["offers"][answer["recommended"]]

    assert best["usd"]["p90"] <= 100
    assert best["hours"]["p90"] <= 24
    assert answer["params"] > 300e6


def test_clouds_regions_and_ways_of_renting_narrow_the_search():
    offers = ask("--params", "350M", "--cloud", "aws", "--region", "us-east-1", "--spot")["offers"]

    assert {(o["cloud"], o["region"], o["spot"]) for o in offers} == {("aws", "us-east-1", True)}


@pytest.mark.parametrize("model", [("--params", "1.2B"), ("--shape", SHAPE, "--tokens", "26B")])
def test_how_a_program_shards_can_be_told(model: tuple[str, ...]):
    def told(sharding: str) -> dict:
        machine = ("--gpu", "H100:8", "--nodes", "2", "--price-per-gpu-hour", "2")
        answer = ask(*model, *machine, "--micro-batch", "2", "--sharding", sharding)
        assert answer["offers"][0]["sharding"] == sharding
        lacks = [note for note in answer["notes"] if "casallm's own trainer has no" in note]
        assert bool(lacks) == (model[0] == "--params" and sharding != "ddp")
        return answer["offers"][0]

    whole, optimizer, everything = (told(each) for each in ("ddp", "zero1", "fsdp"))

    assert everything["memory_bytes"] < optimizer["memory_bytes"] < whole["memory_bytes"]
    rates = [each["tokens_per_second"]["p50"] for each in (everything, whole, optimizer)]
    assert rates == sorted(set(rates))


def test_offers_of_any_machine_are_answered_for_a_program_that_shards():
    with pytest.raises(ConfigError, match="--sharding fsdp answers for a program that shards it"):
        ask("--params", "13B")

    offers = ask("--params", "13B", "--sharding", "fsdp")["offers"]
    assert {offer["sharding"] for offer in offers} == {"fsdp"}


def test_a_bare_gpu_is_any_number_of_it():
    offers = ask("--params", "350M", "--gpu", "A100", "--on-demand")["offers"]

    assert {offer["gpus"] for offer in offers} == {1, 2, 4, 8}


def test_text_and_arithmetic_are_plain_elsewhere():
    assert "\x1b" not in run("--params", "350M")
    assert "> aws" in run("--params", "350M")
    assert "Bill\n  training" in run("--params", "350M", "--explain")


def test_a_terminal_gets_the_table_in_colour(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)

    estimate_command(params="350M", cloud="aws")
    shown = capsys.readouterr().out

    assert "\x1b[1;32m> aws" in shown
    assert "Recommended: aws" in shown


def test_a_plot_is_written_where_it_is_asked_for(tmp_path: Path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "cost.png"

    run("--params", "100M", "--cloud", "lambda", "--plot", str(path))

    assert path.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--params=-3"], "--params is -3, but must be positive"),
        (["--params", "1.2Q"], "'Q', which is no multiplier: use K, M, B or T, as in 1.2B"),
        (["--params", "1B", "--gpu", "B300:8"], "no GPU 'B300', did you mean B200"),
        (["--budget", "0.01"], r"a budget of \$0\.010 buys no model: .* add --budget 0\.\d\d$"),
        (["--params", "1B", "--tokens", "100T"], "more than there are: FineWeb holds"),
        (["--params", "1B", "--preset", "350m"], "exclude each other"),
        (["--preset", "351m"], "no size '351m', did you mean 350m"),
        (["--params", "1B", "--stack", "eagre"], "--stack 'eagre' is unknown, did you mean eager"),
        (["--params", "1B", "--micro-batch", "0"], "at least 1"),
        (["--params", "1B", "--deadline", "soon"], "--deadline 'soon'"),
        (["--params", "1.2"], "is 1.2, which is no whole number: did you mean 1.2B"),
        (["--params", "1,2B"], "has a comma for a decimal point: write it as 1.2B"),
        (["--params", "12"], "12 parameters make no sensible shape: ask for 1M to 1T"),
        (["--params", "1B", "--tokens", "0"], "--tokens is 0, but must be positive"),
        (["--params", "1B", "--context", "10000000"], "does not fit .* or a shorter context"),
        (["--params", "1B", "--nodes", "0"], "0 nodes train nothing: try --nodes 1"),
        (["--params", "1B", "--gpu", "A100:3"], "A100:3 .* it is sold by 1, 2, 4, 8, or give"),
        (["--params", "1B", "--region", "eu-north2"], "did you mean eu-north1"),
        (["--params", "1B", "--cloud", "azure"], r"known: aws, lambda, nebius, runpod"),
        (["--params", "1B", "--precision", "fp4"], "'fp4' is unknown, did you mean fp8"),
        (["--params", "1B", "--recompute", "half"], r"known: none, selective, full"),
        (["--params", "1B", "--sharding", "zero"], r"'zero' is unknown, did you mean zero1"),
        (["--params", "1B", "--sharding", "fdsp"], r"mean fsdp\? \(known: ddp, zero1, fsdp\)$"),
        (
            ["--budget", "100", "--deadline", "5m"],
            r"no model is trained within 5min: .*add --deadline",
        ),
        (["--budget", "-5"], "is not an amount of money: write it as 100"),
        ([*PRICED, "0"], "'0' is not an amount of money"),
        ([*PRICED, "-1"], "'-1' is not an amount of money"),
        ([*PRICED, "nan"], "'nan' is not a number"),
        (["--shape", "n_layers=24"], "lacks d_model, n_heads, vocab_size"),
        (["--shape", "n_layers 24"], "'n_layers 24' is not KEY=VALUE: write it as n_layers=24,"),
        (["--shape", f"{SHAPE},n_layers=25"], "says n_layers 2 times: keep one"),
        (["--shape", f"{SHAPE},tied=true,is_tied=false"], "says is_tied 2 times"),
        (["--shape", f"{SHAPE},d_ff=-1"], "d_ff is -1: input should be greater than 0"),
        (["--shape", SHAPE.replace("n_heads=16", "n_heads=15")], "n_heads 15: 16 would divide it"),
        (["--shape", "layers=24,d_model=8,n_heads=2,vocab_size=9,n_layers=2"], "no setting layers"),
        ([], "no model is named"),
    ],
)
def test_nonsense_gets_a_sentence_with_the_nearest_sensible_thing(arguments, sentence):
    with pytest.raises(ConfigError, match=sentence):
        run(*arguments)


@pytest.mark.parametrize("ending", ["nowhere/cost.png", "cost.xyz"])
def test_a_plot_that_fails_is_told_before_anything_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str
):
    pytest.importorskip("matplotlib")

    with pytest.raises(ConfigError, match=r"--plot|cannot be written"):
        estimate_command(params="100M", cloud="lambda", as_json=True, plot=tmp_path / ending)

    assert capsys.readouterr().out == ""


def test_a_shape_is_classic_and_tied_unless_said():
    plain = parse_shape("n_layers=2,d_model=64,n_heads=4,vocab_size=300")
    modern = parse_shape("n_layers=2,d_model=64,n_heads=4,vocab_size=300,family=modern,tied=false")

    assert (plain.family, plain.is_tied, plain.ff_width) == ("classic", True, 256)
    assert (modern.family, modern.is_tied) == ("modern", False)


def test_a_classic_shape_of_another_program_may_be_untied_and_grouped():
    text = "n_layers=2,d_model=64,n_heads=4,vocab_size=384"
    plain, untied = parse_shape(text), parse_shape(f"{text},tied=false,n_kv_heads=2")

    assert count_params(untied) == count_params(plain) + 384 * 64 - 2 * 2 * 64 * 32
    assert count_matmul_params(untied) == count_matmul_params(plain) - 2 * 2 * 64 * 32
    with pytest.raises(ConfigError, match="n_kv_heads"):
        parse_shape(f"{text},n_kv_heads=3")


def test_it_answers_without_torch_pandas_matplotlib_or_network(tmp_path: Path):
    code = (
        "import sys\n"
        "def no_network(event, _):\n"
        "    if event.startswith('socket.'): raise OSError(event)\n"
        "sys.addaudithook(no_network)\n"
        "from casallm.cli_estimate import estimate_command\n"
        "estimate_command(params='1.2B')\n"
        "heavy = {'torch', 'pandas', 'matplotlib', 'sky', 'requests'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "SKY_RUNTIME_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert "aws p4d.24xlarge " in done.stdout
    assert "$1,531" in done.stdout


def test_it_takes_about_a_second_of_computing(tmp_path: Path):
    before = os.times()

    subprocess.run(
        [sys.executable, "-m", "casallm", "estimate", "--params", "1.2B"],
        env={**os.environ, "SKY_RUNTIME_DIR": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        timeout=120,
        check=True,
    )
    after = os.times()

    spent = after.children_user - before.children_user
    assert spent + after.children_system - before.children_system < 2.0
