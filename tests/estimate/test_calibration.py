"""The model against runs that it never saw: the promise of the estimator."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from casallm.errors import DataError
from casallm.estimate import calibration
from casallm.estimate.calibration import PRIORS, Run, Score
from casallm.estimate.throughput import Z90, load_constants, load_spread, step_time

HERE = Path(__file__).parents[2] / "benchmarks" / "calibration"
GROUPS = {
    "gpu": lambda run: run.setup.hardware.name,
    "size": lambda run: (run.setup.config.n_layers, run.setup.config.d_model),
}


def foundry(shared_data: Path) -> list[Run]:
    return calibration.read_foundry_runs(shared_data / "published-runs" / "calibration.csv")


def others() -> list[Run]:
    return calibration.read_other_runs(HERE / "other_systems.csv")


def told() -> list[Run]:
    return calibration.read_other_runs(HERE / "other_systems.csv", is_told=True)


def coverage(score: Score, runs: list[Run]) -> float:
    pairs = zip(runs, score.log_errors, strict=True)
    return float(np.mean([calibration.is_inside(run, error) for run, error in pairs]))


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_that_was_left_out_is_predicted(shared_data: Path, group: str):
    runs = foundry(shared_data)

    ours = calibration.leave_one_group_out(runs, GROUPS[group])
    constant = calibration.constant_mfu_errors(runs, GROUPS[group])

    assert len(runs) == 72
    assert ours.median <= 0.07
    assert ours.p90 <= 0.18
    assert coverage(ours, runs) >= 0.8
    assert ours.median < constant.median / 2
    assert ours.p90 < constant.p90 / 2


@pytest.mark.slow
def test_the_constants_of_the_package_are_those_of_the_fit(shared_data: Path):
    fitted = calibration.fit([*foundry(shared_data), *others()])

    for name in PRIORS:
        assert getattr(fitted, name) == pytest.approx(getattr(load_constants(), name), rel=0.01)


def test_sizes_contexts_and_precisions_that_were_never_fitted_are_predicted():
    runs = calibration.read_other_runs(HERE / "other_sizes.csv")

    score = calibration.score(calibration.log_errors(runs, load_constants()))

    assert len(runs) == 76
    assert score.median <= 0.07
    assert score.p90 <= 0.18
    assert coverage(score, runs) >= 0.8


def free(runs: list[Run], score: Score, **known: str) -> Score:
    """Of the figures that nothing held back; `known` narrows by fields of their setups."""
    picked = [
        i
        for i, run in enumerate(runs)
        if not run.limit and all(getattr(run.setup, k) == v for k, v in known.items())
    ]
    return calibration.score(np.array(score.log_errors)[picked])


def test_other_systems_are_predicted_from_shape_and_machine_alone():
    runs = others()
    score = calibration.score(calibration.log_errors(runs, load_constants()))

    assert len(runs) == 157
    assert free(runs, score).median <= 0.08
    assert coverage(score, runs) >= 0.8


@pytest.mark.slow
def test_a_system_that_was_left_out_is_predicted_too(shared_data: Path):
    """The bar, 7 and 18 %, holds in bf16; in fp8 programs differ too much, as the page says."""
    runs = others()

    score = calibration.leave_one_group_out(runs, lambda run: run.system, foundry(shared_data))
    constant = calibration.constant_mfu_errors(runs, lambda run: run.system)

    bf16, fp8 = free(runs, score, precision="bf16"), free(runs, score, precision="fp8")
    assert bf16.median <= 0.07
    assert bf16.p90 <= 0.18
    assert fp8.median <= 0.085
    assert fp8.p90 <= 0.25
    assert free(runs, score).median <= 0.07
    assert free(runs, score).p90 <= 0.2
    assert free(runs, score).median < free(runs, constant).median / 2
    assert coverage(score, runs) >= 0.8


@pytest.mark.slow
def test_what_is_told_of_the_layout_brings_the_far_ones_nearer(shared_data: Path):
    runs, asked = others(), told()
    seen = foundry(shared_data)

    shape = calibration.leave_one_group_out(runs, lambda run: run.system, seen)
    score = calibration.leave_one_group_out(runs, lambda run: run.system, seen, asked=asked)

    bf16, fp8 = free(asked, score, precision="bf16"), free(asked, score, precision="fp8")
    assert bf16.median <= 0.07
    assert bf16.p90 <= 0.18
    assert fp8.median <= 0.085
    assert fp8.p90 <= 0.22
    assert free(asked, score).median <= 0.07
    assert free(asked, score).p90 <= 0.18 < free(runs, shape).p90
    assert coverage(score, asked) >= 0.8


@pytest.mark.parametrize(("is_told", "refused"), [(False, 14), (True, 22)])
def test_the_interval_holds_publishers_that_were_never_fitted(is_told: bool, refused: int):
    """Collected by readers who knew neither model nor predictions; the bar is not reached here."""
    answers = calibration.read_answers(HERE / "unseen_systems.csv", is_told=is_told)
    runs = [run for run in answers if run]

    score = calibration.score(calibration.log_errors(runs, load_constants()))

    assert len(answers) == 208
    assert len(answers) - len(runs) == refused
    assert coverage(score, runs) >= 0.8
    assert free(runs, score).median <= 0.14
    assert free(runs, score).p90 <= 0.61


def test_no_run_that_is_fitted_is_among_those_that_never_were():
    answers = calibration.read_answers(HERE / "unseen_systems.csv", is_told=False)
    fitted = others()

    assert not {run.system for run in answers if run} & {run.system for run in fitted}
    for run in filter(None, answers):
        twins = [other for other in fitted if _is_same(run, other)]
        assert not twins, f"{run.system} is {[other.system for other in twins]}"


def _is_same(run: Run, other: Run) -> bool:
    """Whether two publishers seem to have written of one run."""
    same = replace(run.setup, config=other.setup.config) == other.setup
    alike = run.setup.config.d_model == other.setup.config.d_model
    return same and alike and abs(math.log(run.tokens_per_second / other.tokens_per_second)) < 0.02


def test_a_run_is_asked_for_with_what_its_publisher_states():
    stated = told()
    plain = [run for run in stated if run.system == "InternLM"]
    silent = [pair for pair in zip(others(), stated, strict=True) if pair[0].system == "open_lm"]

    assert {(run.setup.recompute, run.setup.micro_batch_size) for run in plain} == {("none", 2)}
    assert {run.setup.sharding for run in stated if run.system == "llm.c"} == {"zero1"}
    assert {run.setup.sharding for run in stated if run.system == "OLMo-core"} == {"fsdp"}
    assert silent[0][0] == silent[0][1]


def test_shape_alone_never_lays_an_optimizer_out_sharded():
    assert all(run.setup.sharding != "zero1" for run in others())


def test_a_fit_finds_the_constants_that_made_the_data():
    runs = [replace(run, limit="") for run in others()]
    truth = replace(calibration.start_constants(), matmul=0.97, attention_compiled=0.6)
    made = [
        replace(run, tokens_per_second=step_time(run.setup, truth).tokens_per_second)
        for run in runs
    ]

    found = calibration.fit(made)

    assert found.matmul == pytest.approx(0.97, rel=0.03)
    assert found.attention_compiled == pytest.approx(0.6, rel=0.05)


def test_what_is_known_to_have_been_held_back_is_not_fitted():
    runs = others()
    slower = [
        replace(run, tokens_per_second=run.tokens_per_second / (10 if run.limit else 1))
        for run in runs
    ]

    assert any(run.limit for run in runs)
    assert calibration.fit(slower) == calibration.fit(runs)


def test_the_spread_is_of_a_size_that_helps():
    spread = load_spread()

    slow, fast = (math.exp(side * spread.system) for side in (-Z90 * spread.skew, Z90))
    assert 0.6 < slow < 0.8
    assert 1.08 < fast < 1.3
    assert 0 < spread.measured < spread.system


def test_missing_or_odd_data_are_named(tmp_path: Path):
    with pytest.raises(DataError, match="no published runs at"):
        calibration.read_other_runs(tmp_path / "none.csv")
    odd = tmp_path / "odd.csv"
    odd.write_text((HERE / "other_systems.csv").read_text().replace(",compiled,", ",jitted,", 1))
    with pytest.raises(DataError, match="'jitted'"):
        calibration.read_other_runs(odd)
