"""The model against runs that it never saw: the promise of the estimator."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from casallm.errors import DataError
from casallm.estimate import calibration
from casallm.estimate.calibration import COMPILED, EAGER, PRIORS, Run, Score
from casallm.estimate.layout import Wishes, plan_layout
from casallm.estimate.throughput import Z90, load_constants, load_spread, predict, step_time

OTHERS = Path(__file__).parents[2] / "benchmarks" / "calibration" / "other_systems.csv"
GROUPS = {
    "gpu": lambda run: run.setup.hardware.name,
    "size": lambda run: (run.setup.config.n_layers, run.setup.config.d_model),
}


def priors():
    return replace(load_constants(), **{name: prior[0] for name, prior in PRIORS.items()})


def foundry(shared_data: Path) -> list[Run]:
    return calibration.read_foundry_runs(shared_data / "published-runs" / "calibration.csv")


def coverage(score: Score, runs: list[Run]) -> float:
    sigmas = np.array([predict(run.setup).sigma for run in runs])
    return float(np.mean(np.abs(score.log_errors) <= Z90 * sigmas))


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_that_was_left_out_is_predicted(shared_data: Path, group: str):
    runs = foundry(shared_data)

    ours = calibration.leave_one_group_out(runs, GROUPS[group], EAGER, priors())
    constant = calibration.constant_mfu_errors(runs, GROUPS[group])

    assert len(runs) == 72
    assert ours.median <= 0.07
    assert ours.p90 <= 0.18
    assert coverage(ours, runs) >= 0.8
    assert ours.median < constant.median / 2
    assert ours.p90 < constant.p90 / 2


def test_the_constants_of_the_package_are_those_of_the_fit(shared_data: Path):
    eager = calibration.fit(foundry(shared_data), EAGER, priors())

    for name in EAGER:
        assert getattr(eager, name) == pytest.approx(getattr(load_constants(), name), rel=0.01)


def test_other_systems_are_predicted_from_shape_and_machine_alone():
    runs = calibration.read_other_runs(OTHERS)
    errors = []
    for run in runs:
        planned = plan_layout(
            run.setup.config,
            run.setup.context_length,
            run.setup.hardware,
            gpus_per_node=run.setup.gpus_per_node,
            n_nodes=run.setup.n_nodes,
            wishes=Wishes(stack=run.setup.stack, precision=run.setup.precision),
        )
        errors.append(np.log(step_time(planned).tokens_per_second / run.tokens_per_second))
    score = calibration.score(np.array(errors))

    assert score.median <= 0.12
    assert coverage(score, runs) >= 0.8


def test_a_system_that_was_left_out_is_predicted_too():
    runs = calibration.read_other_runs(OTHERS)

    score = calibration.leave_one_group_out(
        runs, lambda run: run.system, COMPILED, load_constants()
    )

    assert score.median <= 0.15
    assert coverage(score, runs) >= 0.8


def test_a_fit_finds_the_constants_that_made_the_data():
    runs = calibration.read_other_runs(OTHERS)
    truth = replace(load_constants(), matmul_compiled=0.98, tail_compiled=0.65)
    made = [
        replace(run, tokens_per_second=step_time(run.setup, truth).tokens_per_second)
        for run in runs
    ]

    found = calibration.fit(made, ("matmul_compiled", "tail_compiled"), load_constants())

    assert found.matmul_compiled == pytest.approx(0.98, rel=0.01)
    assert found.tail_compiled == pytest.approx(0.65, rel=0.05)


def test_the_spread_is_of_a_size_that_helps():
    spread = load_spread()

    assert 0.05 < spread.system < 0.2
    assert 0 < spread.measured < spread.system


def test_missing_or_odd_data_are_named(tmp_path: Path):
    with pytest.raises(DataError, match="no published runs at"):
        calibration.read_other_runs(tmp_path / "none.csv")
    odd = tmp_path / "odd.csv"
    odd.write_text(OTHERS.read_text().replace(",compiled,", ",jitted,", 1))
    with pytest.raises(DataError, match="'jitted'"):
        calibration.read_other_runs(odd)
