import datetime
import json
import re
from dataclasses import replace

import pytest

from casallm.errors import ConfigError, MissingExtraError
from casallm.estimate.answer import (
    format_table,
    heading,
    notes,
    rich_table,
    to_json,
)
from casallm.estimate.architecture import NAMED_SIZES, ModelConfig, shape_for_params
from casallm.estimate.estimator import Estimate, EstimateRequest, estimate
from casallm.estimate.explain import format_explain
from casallm.estimate.hardware import GPUS
from casallm.estimate.layout import Wishes
from casallm.estimate.plot import plot
from casallm.estimate.prices import load_snapshot
from casallm.estimate.throughput import Constants, Spread

DAY = datetime.date(2026, 11, 25)
CONSTANTS = Constants(
    matmul=0.92,
    tail_eager=1.5,
    tail_compiled=0.6,
    attention_eager=0.4,
    attention_compiled=0.6 * (1 + 250 / 2048),
    exposed=1.0,
    hop_seconds=3e-5,
    recompute_share=0.9,
    straggling=0.01,
)
SPREAD = Spread(system=0.14, skew=1.5, chip=0.2, layout=0.07, doubling=0.02, measured=0.02)


WIDE = """\
344M parameters on 10B tokens (29.1 a parameter, context 2,048): 2.67e+19 FLOP
Recommended: aws p4d.24xlarge spot in us-east-1, $43.96 ($31.87 to $66.47) and 7.8 h; it is the
cheapest of 4 offers that end within a week; without preemptions lambda gpu_1x_a100 costs $94.96.

  machine                    where    $/h  tokens/s  MFU           hours           dollars
> aws p4d.24xlarge spot  us-east-1   6.29      487K  52%  7.8 (5.6-12.5)     $44 ($32-$66)
  lambda gpu_1x_a100     us-east-1   1.99       62K  53%      45 (35-58)    $95 ($75-$119)
  aws p4d.24xlarge       us-east-1  21.96      487K  52%   5.9 (4.6-7.5)  $132 ($104-$167)
  aws p5.48xlarge        us-east-1  55.04      1.2M  40%   2.5 (2.0-3.1)  $139 ($110-$174)
  aws p3.2xlarge spot    us-east-1   0.48       14K  30%   269 (168-476)  $165 ($105-$269)
  aws p3.2xlarge         us-east-1   3.06       14K  30%   201 (134-297)  $623 ($417-$920)

Ranges hold eight of ten runs; hours count from the first boot to the end.
Expected loss 2.79 (2.70 to 2.90) nats a token by Chinchilla's law as refitted by Besiroglu et al.
2024, on Chinchilla's text.
Older articles: 2.67e+19 FLOP at 45% of 8 x 312 TFLOP/s are 6.6 h, at a p4d's $32.77/h before AWS's
cut of 2025 $216. At $21.96/h that is $145; at the 52% MFU expected here, $132 with all else.
Prices: test prices of 2026-11-22 (3 days old).
"""

NARROW = """\
344M parameters on 10B tokens (29.1 a parameter, context 2,048): 2.67e+19 FLOP
Recommended: aws p4d.24xlarge spot in us-east-1, $43.96 ($31.87 to $66.47) and
7.8 h; it is the cheapest of 4 offers that end within a week; without
preemptions lambda gpu_1x_a100 costs $94.96.

  machine                  $/h  tokens/s  MFU           hours           dollars
> aws p4d.24xlarge spot   6.29      487K  52%  7.8 (5.6-12.5)     $44 ($32-$66)
  lambda gpu_1x_a100      1.99       62K  53%      45 (35-58)    $95 ($75-$119)
  aws p4d.24xlarge       21.96      487K  52%   5.9 (4.6-7.5)  $132 ($104-$167)
  aws p5.48xlarge        55.04      1.2M  40%   2.5 (2.0-3.1)  $139 ($110-$174)
  aws p3.2xlarge spot     0.48       14K  30%   269 (168-476)  $165 ($105-$269)
  aws p3.2xlarge          3.06       14K  30%   201 (134-297)  $623 ($417-$920)

Ranges hold eight of ten runs; hours count from the first boot to the end.
Expected loss 2.79 (2.70 to 2.90) nats a token by Chinchilla's law as refitted
by Besiroglu et al. 2024, on Chinchilla's text.
Older articles: 2.67e+19 FLOP at 45% of 8 x 312 TFLOP/s are 6.6 h, at a p4d's
$32.77/h before AWS's cut of 2025 $216. At $21.96/h that is $145; at the 52% MFU
expected here, $132 with all else.
Prices: test prices of 2026-11-22 (3 days old).
"""

EXPLAIN = """\
aws p4d.24xlarge spot, recommended: it is the cheapest of 4 offers that end within a week; without
          preemptions lambda gpu_1x_a100 costs $94.96.

Work      344M parameters: classic, 24 layers of 1024, 16 heads, MLP 4096, vocabulary 40,960
          6 x 343,932,928 matrix weights + 12 x 24 layers x 1024 x 2048 context
          = 2.6676 GFLOP a token, x 10,000,000,000 tokens = 2.668e+19 FLOP
Machine   8 x A100, 312 TFLOP/s peak each, of which large products sustain 86%
Layout    micro-batch 16 x 2048 tokens, global batch 256, recompute none; every GPU holds the whole
          model
Memory    30.8 GB of 42.4 GB: weights 1.38 GB + gradients 1.38 GB + optimizer 2.75 GB + activations
          17.1 GB + logits 5.37 GB + margin 2.86 GB
          at most 24 sequences would fit; DDP fits
Rate      a step of 524,288 tokens takes 0.947 s:
          matrix 72%, attention 18%, tail 8%, communication 1%, optimizer 1%
          x 0.88, what whole runs keep of it elsewhere (casallm's own is not measured)
          = 487,179 tokens/s (381K to 623K), 52.1% MFU (standard convention)
Hours     10,000,000,000 / 487,179 tokens/s = 5.7018 h of training; 7.84 h with the machine's other
          hours below and the waiting
          goodput 94.1%: training, evaluation and sft, as a share of the hours after the startup
Bill
  training               35.86  5.7018 h x $6.2900/h: 10B tokens at 487,179 tokens/s
  startup                 0.84  0.13333 h x $6.2900/h: 480 s of boot, image, sync, compilation
          (assumed)
  evaluation              0.10  0.015603 h x $6.2900/h: 82.1M tokens forward at 3 x 487,179 tokens/s
  checkpoints             0.28  0.045293 h x $6.2900/h: a stall of 1.0 s for 4.13 GB every 2.2 min
  preemptions             1.97  0.31302 h x $6.2900/h: 2.7 in all, one in 2.3 h (median of 23 traces
          of V100 on AWS): restarts of 360 s, work done twice; 1.6 h of waiting are not billed
  sft                     0.22  0.034211 h x $6.2900/h: 60M tokens at 487,179 tokens/s (default
          recipe)
  data preparation        2.13  2.7778 h x $0.768/h: 10B tokens at 1M/s on 16 cores (m6i.4xlarge)
  disk                    0.18  2.1894 GB-months x $0.08: 1 x 256 GB for 6.2 h (gp3)
  object storage          0.78  33.767 GB-months x $0.023: tokens, 3 checkpoints, the model, for a
          month (S3)
  requests                0.06  12017 PUTs x $0.000005: 69 a checkpoint (S3)
  controller              1.54  8.0038 h x $0.192/h: SkyPilot's controller (m6i.xlarge), 10 idle min
          included
  total                  43.96  $31.87 to $66.47
Range     of 2,001 seeded draws, eight of ten: the rate 381K to 623K tokens/s; within a factor of
          the middle the startup 1.57, the time between preemptions 2.45, the waiting 2.45, a lower
          spot price 1.17, a higher one 1.53
"""


@pytest.fixture
def answer(few_prices, monkeypatch: pytest.MonkeyPatch) -> Estimate:
    """The reference run at fixed prices and fixed constants."""
    monkeypatch.setattr("casallm.estimate.throughput.load_constants", lambda: CONSTANTS)
    monkeypatch.setattr("casallm.estimate.throughput.load_spread", lambda: SPREAD)
    config = NAMED_SIZES["350m"]
    return estimate(EstimateRequest(config=config, tokens=10**10, prices=few_prices))


def test_the_table_reads_like_this(answer: Estimate):
    assert format_table(answer, width=100, today=DAY) == WIDE.rstrip("\n")


def test_a_narrow_table_leaves_columns_out(answer: Estimate):
    assert format_table(answer, width=80, today=DAY) == NARROW.rstrip("\n")


def test_the_arithmetic_reads_like_this(answer: Estimate):
    assert format_explain(answer) == EXPLAIN.rstrip("\n")


@pytest.mark.parametrize(
    ("name", "gpu", "n_nodes", "said"),
    [
        ("175b", "H100", 16, "4 GPUs share a sequence, 8 stages of a pipeline share the blocks"),
        ("6.7b", "H100-PCIE", 4, "2 stages of a pipeline share the blocks"),
    ],
)
def test_the_arithmetic_says_how_a_model_is_split(name, gpu, n_nodes, said):
    request = EstimateRequest(
        config=NAMED_SIZES[name],
        tokens=10**9,
        hardware=GPUS[gpu],
        n_gpus=8,
        n_nodes=n_nodes,
        usd_per_gpu_hour=2.0,
    )

    lines = format_explain(estimate(request)).split("\n")

    assert f"          {said}" in lines


@pytest.mark.parametrize("is_spot", [True, False])
@pytest.mark.parametrize("cloud", ["aws", "runpod", "nebius"])
def test_the_bill_can_be_done_again_by_hand(cloud: str, is_spot: bool):
    """The two factors printed for an item multiply to its dollars, the items to the total."""
    request = EstimateRequest(
        config=shape_for_params(10**9), prices=load_snapshot(), cloud=cloud, n_nodes=2
    )
    answer = estimate(request)
    bill = next((e.bill for e in answer.offers if e.job.is_spot == is_spot), answer.offers[0].bill)

    for item in bill.items:
        amount, usd = re.match(r"([\d.]+) [\w-]+ x \$([\d.,]+)", item.source).groups()
        product = float(amount) * float(usd.replace(",", "").rstrip("."))
        assert product == pytest.approx(item.usd, abs=0.0051, rel=2e-4), item
    assert f"{sum(item.usd for item in bill.items):.2f}" == f"{bill.usd.p50:.2f}"


def test_the_rate_and_the_hours_can_be_done_again_by_hand():
    request = EstimateRequest(config=shape_for_params(10**9), prices=load_snapshot(), is_spot=True)
    answer = estimate(request)
    text = " ".join(format_explain(answer).replace(",", "").split())

    def found(pattern: str) -> list[float]:
        return [float(each) for each in re.search(pattern, text).groups()]

    weights, layers, width, context, gflop, tokens, flop = found(
        r"6 x (\d+) matrix weights \+ 12 x (\d+) layers x (\d+) x (\d+) context = ([\d.]+) GFLOP a"
        r" token x (\d+) tokens = (\S+) FLOP"
    )
    gpus, tflops = found(r"Machine (\d+) x \S+ (\d+) TFLOP/s peak")
    step, seconds, share, rate, mfu = found(
        r"a step of (\d+) tokens takes ([\d.]+) s: .* x ([\d.]+) what .* = (\d+) tokens/s .*?"
        r" ([\d.]+)% MFU"
    )
    (hours,) = found(r"tokens/s = ([\d.]+) h of training")
    parts = found(
        r"([\d.]+) GB of .* weights ([\d.]+) GB \+ gradients ([\d.]+) GB \+ optimizer"
        r" ([\d.]+) GB \+ activations ([\d.]+) GB \+ logits ([\d.]+) GB \+ margin"
        r" ([\d.]+) GB"
    )

    assert 6 * weights + 12 * layers * width * context == pytest.approx(gflop * 1e9, rel=1e-4)
    assert gflop * 1e9 * tokens == pytest.approx(flop, rel=1e-3)
    assert step / seconds * share == pytest.approx(rate, rel=1e-3)
    assert rate * gflop / (gpus * tflops * 1e3) == pytest.approx(mfu / 100, abs=1e-3)
    assert tokens / rate / 3600 == pytest.approx(hours, rel=1e-4)
    assert sum(parts[1:]) == pytest.approx(parts[0], abs=0.2)


@pytest.mark.parametrize("width", [60, 80, 100, 120])
@pytest.mark.parametrize("n_params", [10**6, 350 * 10**6, 3 * 10**9])
def test_no_line_is_longer_than_the_width(n_params: int, width: int):
    config = shape_for_params(n_params)
    answer = estimate(EstimateRequest(config=config, prices=load_snapshot(), n_nodes=2))

    for line in format_table(answer, width=width).split("\n"):
        assert len(line) <= width


def test_the_old_fifteen_hundred_dollars_are_explained():
    config = shape_for_params(1_200_000_000)
    answer = estimate(EstimateRequest(config=config, tokens=24 * 10**9, prices=load_snapshot()))

    (old,) = [note for note in notes(answer, today=DAY) if note.startswith("Older articles")]

    assert "at 45% of 8 x 312 TFLOP/s are 46.7 h, at a p4d's $32.77/h" in old
    assert "before AWS's cut of 2025 $1,531. At $21.96/h that is $1,025" in old
    assert "aws p4d.24xlarge  " in format_table(answer, today=DAY)


def test_the_old_articles_rent_one_machine_however_many_are_asked_for():
    config = shape_for_params(1_200_000_000)
    request = EstimateRequest(
        config=config, tokens=24 * 10**9, prices=load_snapshot(), n_nodes=4, hardware=GPUS["A100"]
    )
    answer = estimate(request)
    paid = next(e for e in answer.offers if e.name == "aws 4 x p4d.24xlarge").bill.usd.p50

    (old,) = [note for note in notes(answer, today=DAY) if note.startswith("Older articles")]

    assert "at 45% of 8 x 312 TFLOP/s are 46.7 h" in old
    assert "before AWS's cut of 2025 $1,531. At $21.96/h that is $1,025" in old
    assert old.endswith(f"MFU expected here of 4 of them, ${paid:,.0f} with all else.")


def test_old_prices_are_called_old(answer: Estimate):
    text = format_table(answer, today=datetime.date(2027, 3, 1))

    assert "(99 days old): old, look again before spending" in text


def test_rich_shows_the_same_cells(answer: Estimate):
    table = rich_table(answer, width=100)

    assert [column.header for column in table.columns][1:] == [
        "where", "$/h", "tokens/s", "MFU", "hours", "dollars",
    ]  # fmt: skip
    assert table.row_count == len(answer.offers)
    assert heading(answer).startswith("344M parameters on 10B tokens")


def test_json_has_the_promised_keys(answer: Estimate):
    tree = json.loads(json.dumps(to_json(answer)))
    first = tree["offers"][tree["recommended"]]

    assert tree.keys() >= {
        "params", "tokens", "flops_per_token", "total_flops", "offers", "recommended",
        "prices_as_of",
    }  # fmt: skip
    assert first.keys() >= {
        "cloud", "region", "instance", "gpu", "gpus", "nodes", "spot", "usd_per_hour",
        "tokens_per_second", "mfu", "hours", "usd", "items",
    }  # fmt: skip
    assert tree["params"] == 344_180_736
    assert tree["prices_as_of"] == "2026-11-22"
    for name in ("tokens_per_second", "hours", "usd"):
        assert first[name]["p10"] < first[name]["p50"] < first[name]["p90"]
    assert round(sum(first["items"].values()), 2) == first["usd"]["p50"]


def test_json_rate_is_of_the_whole_job():
    config = NAMED_SIZES["350m"]
    one = {"hardware": GPUS["H100"], "n_gpus": 8, "usd_per_gpu_hour": 2.0, "config": config}

    alone = to_json(estimate(EstimateRequest(**one)))["offers"][0]
    four = to_json(estimate(EstimateRequest(n_nodes=4, **one)))["offers"][0]

    assert four["nodes"] == 4
    assert 3 < four["tokens_per_second"]["p50"] / alone["tokens_per_second"]["p50"] < 4
    assert four["usd_per_hour"] == 64


@pytest.mark.parametrize(
    ("name", "context_length", "wishes", "lacking"),
    [
        ("13b", 2048, Wishes(), "state sharded over the GPUs and no recomputation"),
        ("175b", 2048, Wishes(), "tensor or pipeline parallelism"),
        ("1.2b", 65_536, Wishes(), "recomputation of activations"),
        ("1.2b", 2048, Wishes(precision="fp8"), "fp8"),
        ("1.2b", 2048, Wishes(sharding="fsdp"), "state sharded over the GPUs"),
        ("1.2b", 2048, Wishes(sharding="zero1"), "optimizer sharded over the GPUs"),
    ],
)
def test_what_casallms_own_trainer_lacks_is_said(name, context_length, wishes, lacking):
    n_nodes = 16 if name == "175b" else 1
    machine = {"hardware": GPUS["H100"], "n_gpus": 8, "usd_per_gpu_hour": 2.0, "n_nodes": n_nodes}
    request = EstimateRequest(
        config=NAMED_SIZES[name], context_length=context_length, wishes=wishes, **machine
    )
    sentence = f"another program: casallm's own trainer has no {lacking}"

    assert any(sentence in note for note in notes(estimate(request)))
    assert sentence in " ".join(format_explain(estimate(request)).split())
    assert not any("own trainer" in n for n in notes(estimate(replace(request, is_own=False))))


def test_machines_without_fp8_are_not_called_too_small(few_prices):
    request = EstimateRequest(
        config=NAMED_SIZES["350m"], prices=few_prices, wishes=Wishes(precision="fp8")
    )

    assert any(
        note.endswith("offers are left out: the model does not fit them or they have no fp8.")
        for note in notes(estimate(request))
    )


def test_a_region_in_which_the_launcher_does_not_look_is_said():
    def told(region: str | None) -> list[str]:
        request = EstimateRequest(
            config=NAMED_SIZES["350m"], prices=load_snapshot(), cloud="aws", region=region
        )
        return [note for note in notes(estimate(request)) if "looks in US regions" in note]

    assert told("ap-south-1") == [
        "make pretrain CLOUD=aws looks in US regions: add REGION=ap-south-1 for this one."
    ]
    assert told("us-east-1") == []


def test_machines_that_slow_each_other_down_are_named():
    machine = {"hardware": GPUS["B200"], "prices": load_snapshot(), "n_gpus": 8}
    request = EstimateRequest(config=NAMED_SIZES["1.2b"], cloud="lambda", n_nodes=2, **machine)

    assert any("2 of these machines are slower than one" in n for n in notes(estimate(request)))
    assert not any(
        "slower than one" in note for note in notes(estimate(replace(request, cloud="aws")))
    )


def test_what_speaks_against_a_machine_is_said():
    one = {"hardware": GPUS["H100"], "n_gpus": 8, "usd_per_gpu_hour": 2.0, "is_own": False}
    config = ModelConfig(family="classic", n_layers=48, d_model=7168, n_heads=56, vocab_size=50_432)
    tight = EstimateRequest(config=config, context_length=8192, wishes=Wishes("eager"), **one)
    short = EstimateRequest(config=NAMED_SIZES["350m"], tokens=10, **one)

    assert "cut the loss in pieces" in format_explain(estimate(tight), width=200)
    assert any("more than the whole run" in note for note in notes(estimate(short)))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("c.xyz", "try cost.png"), ("no/c.png", "No such"), ("folder.png", "a folder of yours")],
)
def test_a_plot_that_cannot_be_written_gets_a_sentence_and_leaves_nothing(
    answer: Estimate, tmp_path, name, sentence
):
    pytest.importorskip("matplotlib")
    (tmp_path / "folder.png").mkdir()

    with pytest.raises(ConfigError, match=sentence):
        plot(answer, tmp_path / name)

    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_more_than_fineweb_edu_is_said(few_prices):
    request = EstimateRequest(config=NAMED_SIZES["124m"], tokens=2 * 10**12, prices=few_prices)

    assert any("more than FineWeb-Edu's 1.3T" in note for note in notes(estimate(request)))


def test_the_plot_is_a_picture(answer: Estimate, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "cost.png"

    plot(answer, path)

    assert path.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_plot_says_what_to_install(
    answer: Estimate, tmp_path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)

    with pytest.raises(MissingExtraError, match=r"casallm\[train\]"):
        plot(answer, tmp_path / "cost.png")
