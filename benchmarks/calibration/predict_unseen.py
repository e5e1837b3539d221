"""Predict programs that the model was never fitted to, and ask how far programs differ at all.

    python benchmarks/calibration/predict_unseen.py RUNS.csv

RUNS.csv is llm-foundry's benchmark, as for `fit_throughput.py`. The figures of `unseen_systems.csv`
were collected by a rule, by readers who knew neither model nor predictions, after its form and
constants were fixed; nothing is fitted to them. Then: where several programs have published the
same question (GPU, precision, layers, width, context, class of size, compiled or eager), how far
is one from what the others reached, from the model that was fitted without it, and from the middle
of all of them, itself included?
"""

import argparse
import itertools
import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path

import numpy as np

from casallm.estimate import calibration
from casallm.estimate.architecture import flops_per_token
from casallm.estimate.calibration import Run
from casallm.estimate.throughput import load_constants, predict

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    foundry = calibration.read_foundry_runs(parser.parse_args().runs)
    others = calibration.read_other_runs(HERE / "other_systems.csv")
    unseen = calibration.read_other_runs(HERE / "unseen_systems.csv")
    told = calibration.read_told_runs(HERE / "unseen_systems.csv")

    print(f"{'programs never fitted':44} median / 90th  middle  inside")
    for name, runs in (("shape only", unseen), ("as told", told)):
        free = [run for run in runs if not run.limit]
        known = [run for run in free if run.setup.hardware.is_calibrated]
        for what, part in (("all", runs), ("free", free), ("free, A100, H100, H200", known)):
            _print_unseen(f"{name}, {what}: {len({run.system for run in part})} systems", part)
    _print_runs(unseen, told)

    left_out = calibration.leave_one_group_out(others, lambda run: run.system, foundry).log_errors
    without_foundry = calibration.log_errors(foundry, calibration.fit(others))
    errors = [*left_out, *without_foundry, *calibration.log_errors(unseen, load_constants())]
    _print_same_questions([*others, *foundry, *unseen], errors)


def _print_unseen(name: str, runs: Sequence[Run]) -> None:
    errors = calibration.log_errors(runs, load_constants())
    inside = np.mean([_is_inside(run) for run in runs])
    middle = math.expm1(float(np.median(errors)))
    print(f"{name:44} {_percent(errors)} {middle:+7.0%} {inside:7.0%} of {len(runs)}")


def _is_inside(run: Run) -> bool:
    rate = predict(run.setup)
    return rate.p10 <= run.tokens_per_second <= rate.p90


def _print_runs(unseen: Sequence[Run], told: Sequence[Run]) -> None:
    errors = (calibration.log_errors(runs, load_constants()) for runs in (unseen, told))
    print(f"\n{'system':34} {'machine':17} stack     shape  as told")
    for run, by_shape, as_told in zip(unseen, *errors, strict=True):
        setup = run.setup
        machine = f"{setup.n_gpus} x {setup.hardware.name}"
        stack = setup.stack if setup.precision == "bf16" else f"{setup.stack[:4]} {setup.precision}"
        shifts = f"{math.expm1(by_shape):+6.0%} {math.expm1(as_told):+8.0%}"
        print(f"{run.system:34} {machine:17} {stack:9} {shifts}  {run.limit}".rstrip())


def _print_same_questions(runs: Sequence[Run], errors: Sequence[float]) -> None:
    """Programs count once a question, by the mean logarithm of their figures."""
    answers: dict[Hashable, dict[str, list[tuple[float, float]]]] = defaultdict(dict)
    for run, error in zip(runs, errors, strict=True):
        if not run.limit:
            figures = answers[_question(run)].setdefault(run.system, [])
            figures.append((_log_flops(run), error))
    looked_up, modelled, middle, apart = [], [], [], []
    shared = [programs for programs in answers.values() if len(programs) > 1]
    for programs in shared:
        means = np.array([np.mean(figures, axis=0) for figures in programs.values()])
        rates = means[:, 0]
        modelled += list(means[:, 1])
        looked_up += [np.median(np.delete(rates, i)) - rate for i, rate in enumerate(rates)]
        middle += list(np.median(rates) - rates)
        apart += [abs(one - other) for one, other in itertools.combinations(rates, 2)]
    print(f"\n{len(shared)} questions, {len(middle)} answers of a program{'':9} median / 90th")
    print(f"{f'{len(apart)} pairs of programs apart':44} {_percent(apart)}")
    print(f"{'what the other programs reached':44} {_percent(looked_up)}")
    print(f"{'the model, without that program':44} {_percent(modelled)}")
    print(f"{'the middle of all, itself included':44} {_percent(middle)}")


def _question(run: Run) -> Hashable:
    setup = run.setup
    n_gpus = setup.n_gpus
    size = "one" if n_gpus == 1 else "node" if n_gpus <= 8 else "few" if n_gpus <= 128 else "many"
    shape = setup.config.n_layers, setup.config.d_model, setup.context_length
    return setup.hardware.name, setup.precision, setup.stack, size, *shape


def _log_flops(run: Run) -> float:
    """Of the model's FLOP/s a GPU: vocabularies and MLP widths differ a little."""
    flops = flops_per_token(run.setup.config, run.setup.context_length)
    return math.log(run.tokens_per_second / run.setup.n_gpus * flops)


def _percent(errors: Iterable[float]) -> str:
    relative = np.abs(np.expm1(np.array(list(errors))))
    return f"{np.median(relative):6.1%} / {np.quantile(relative, 0.9):5.1%}"


if __name__ == "__main__":
    main()
