import json
import math
from dataclasses import replace

import pytest

from casallm.estimate.architecture import flops_per_token, named_size
from casallm.estimate.hardware import CPU_CORE, gpu_named
from casallm.train.metrics import (
    EVALUATION_FIELDS,
    TRAINING_FIELDS,
    Line,
    Measurement,
    Metrics,
    Yardstick,
    bits_per_byte,
    evaluation_line,
    evaluation_lines,
    training_line,
    training_lines,
)

MEASURED = Measurement(
    step=10,
    tokens=5_242_880,
    loss=7.5,
    lr=3e-4,
    grad_norm=1.25,
    interval_tokens=500_000,
    interval_seconds=10.0,
    elapsed_seconds=100.0,
    usd=0.25,
    attempt=2,
)
A100 = Yardstick(flops_per_token(named_size("350m"), 2048), gpu_named("A100"), 1)


def test_a_training_line_has_the_published_fields_in_their_order():
    assert tuple(training_line(MEASURED, A100)) == TRAINING_FIELDS


def test_mfu_of_the_reference_model_at_50000_tokens_per_second_uses_2668_mflop_each():
    line = training_line(MEASURED, A100)

    assert line["tokens_per_second"] == 50_000
    assert line["mfu"] == pytest.approx(2.668e9 * 50_000 / 312e12, rel=1e-3)


def test_mfu_counts_every_device():
    two_cores = Yardstick(1e6, CPU_CORE, 2)

    assert two_cores.mfu(16_000) == pytest.approx(0.1)


def test_mfu_is_null_where_the_peak_is_not_known():
    line = training_line(MEASURED, Yardstick(1e6, None, 1))

    assert line["mfu"] is None


def test_an_evaluation_line_has_the_published_fields_in_their_order():
    line = evaluation_line(400, 1_000, val_loss=3.2, val_bpb=1.1)

    assert tuple(line) == EVALUATION_FIELDS
    assert list(line.values()) == [400, 1_000, 3.2, 1.1]


def test_one_bit_for_each_byte_is_one_bit_per_byte():
    assert bits_per_byte(80 * math.log(2), 80) == pytest.approx(1.0)


def test_bits_per_byte_of_nothing_is_not_a_number():
    assert math.isnan(bits_per_byte(0.0, 0))


def test_what_is_not_finite_is_null_so_that_every_line_is_strict_json():
    measured = replace(MEASURED, loss=math.nan, grad_norm=math.inf)

    line = training_line(measured, A100)

    assert (line["loss"], line["grad_norm"]) == (None, None)
    assert evaluation_line(1, 2, val_loss=math.nan)["val_loss"] is None
    json.dumps(line, allow_nan=False)


def test_training_and_validation_lines_are_told_apart():
    train: Line = {"step": 1, "loss": 2.0}
    val: Line = {"step": 1, "val_loss": 2.5}

    assert training_lines([train, val]) == [train]
    assert evaluation_lines([train, val]) == [val]


class Listener:
    def __init__(self) -> None:
        self.heard: list[Line | str] = []

    def log(self, line: Line) -> None:
        self.heard.append(line)

    def close(self) -> None:
        self.heard.append("closed")


def test_every_line_is_written_and_then_told_to_every_listener():
    rows: list[str] = []
    listener = Listener()
    metrics = Metrics(lambda line: rows.append(json.dumps(line)), [listener])

    metrics.log({"step": 1, "loss": 2.0})
    metrics.close()

    assert rows == ['{"step": 1, "loss": 2.0}']
    assert listener.heard == [{"step": 1, "loss": 2.0}, "closed"]


def test_a_line_that_cannot_be_written_is_not_announced():
    def full(line: Line) -> None:
        raise OSError("no space left")

    listener = Listener()

    with pytest.raises(OSError, match="no space left"):
        Metrics(full, [listener]).log({"step": 1})
    assert listener.heard == []
