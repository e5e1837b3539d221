"""Predict programs that the model was never fitted to, and ask how far programs differ at all.

    python benchmarks/calibration/predict_unseen.py RUNS.csv

RUNS.csv is llm-foundry's benchmark, as for `fit_throughput.py`. The figures of `unseen_systems.csv`
were collected by a rule, by readers who knew neither model nor predictions; nothing is fitted to
them. Then: where several programs have published the same question (GPU, how many, precision,
compiled or eager, context, layers, widths, key-value heads), how far apart are they, and how far
is one from what the others reached, and from a model that was fitted without it?
"""

import argparse
import csv
import itertools
import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from casallm.estimate import calibration
from casallm.estimate.architecture import flops_per_token
from casallm.estimate.calibration import Run
from casallm.estimate.hardware import gpu_named
from casallm.estimate.throughput import load_constants

HERE = Path(__file__).parent
UNSEEN = HERE / "unseen_systems.csv"


@dataclass(frozen=True)
class Predicted:
    """A run and the logarithm of predicted over published."""

    run: Run
    error: float
    is_unseen: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    foundry = calibration.read_foundry_runs(parser.parse_args().runs)
    others = calibration.read_other_runs(HERE / "other_systems.csv")
    by_shape = calibration.read_answers(UNSEEN, is_told=False)
    as_told = calibration.read_answers(UNSEEN, is_told=True)

    with UNSEEN.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    free = [not row["limit"] for row in rows]
    known = [gpu_named(row["gpu"]).is_calibrated for row in rows]
    both = [one and other for one, other in zip(free, known, strict=True)]
    heads = f"{'median / 90th':>16} {'middle':>7} {'inside':>7} {'refused':>8} {'of all':>7}"
    print(f"{'never fitted':38} {heads}")
    for how, answers in (("shape", by_shape), ("as told", as_told)):
        _print_score(f"{how}, all", answers)
        _print_score(f"{how}, free", itertools.compress(answers, free))
        _print_score(f"{how}, free, A100 H100 H200", itertools.compress(answers, both))
    _print_runs(by_shape, as_told)

    unseen = [run for run in by_shape if run]
    left_out = calibration.leave_one_group_out(others, lambda run: run.system, foundry).log_errors
    unfitted = calibration.log_errors(foundry, calibration.fit(others))
    errors = [*left_out, *unfitted, *calibration.log_errors(unseen, load_constants())]
    fitted = [*others, *foundry]
    runs = zip([*fitted, *unseen], errors, strict=True)
    predicted = [Predicted(run, e, i >= len(fitted)) for i, (run, e) in enumerate(runs)]
    _print_same_questions([each for each in predicted if not each.run.limit])


def _print_score(name: str, answers: Iterable[Run | None]) -> None:
    """Of all, where a refusal counts as outside, as well."""
    asked = list(answers)
    runs = [run for run in asked if run]
    errors = calibration.log_errors(runs, load_constants())
    inside = sum(itertools.starmap(calibration.is_inside, zip(runs, errors, strict=True)))
    systems = len({run.system for run in runs})
    print(
        f"{f'{name}: {len(runs)} of {systems}':38} {_percent(errors):>16}"
        f" {math.expm1(float(np.median(errors))):+7.0%} {inside / len(runs):7.0%}"
        f" {len(asked) - len(runs):8} {inside / len(asked):7.0%}"
    )


def _print_runs(by_shape: Sequence[Run | None], as_told: Sequence[Run | None]) -> None:
    print(f"\n{'system':34} {'machine':18} stack       shape  as told")
    for one, other in zip(by_shape, as_told, strict=True):
        run = one or other
        if run is None:
            continue
        setup = run.setup
        machine = f"{setup.n_gpus} x {setup.hardware.name}"
        stack = setup.stack if setup.precision == "bf16" else f"{setup.stack[:4]} {setup.precision}"
        shifts = f"{_shift(one)} {_shift(other):>8}"
        print(f"{run.system:34} {machine:18} {stack:9} {shifts}  {run.limit}".rstrip())


def _shift(run: Run | None) -> str:
    if run is None:
        return "no fit"
    return f"{math.expm1(calibration.log_errors([run], load_constants())[0]):+7.0%}"


def _print_same_questions(predicted: Sequence[Predicted]) -> None:
    """Programs count once a question, by the means of their figures' logarithms."""
    answers: dict[Hashable, dict[str, list[Predicted]]] = defaultdict(dict)
    for each in predicted:
        answers[_question(each.run)].setdefault(each.run.system, []).append(each)
    shared = [list(programs.values()) for programs in answers.values() if len(programs) > 1]
    apart: list[float] = []
    looked_up: dict[bool, list[float]] = {True: [], False: []}
    modelled: dict[bool, list[float]] = {True: [], False: []}
    for programs in shared:
        rates = np.array(
            [np.mean([_log_flops(each.run) for each in of_one]) for of_one in programs]
        )
        apart += [abs(one - other) for one, other in itertools.combinations(rates, 2)]
        for i, of_one in enumerate(programs):
            is_unseen = of_one[0].is_unseen
            looked_up[is_unseen].append(float(np.median(np.delete(rates, i)) - rates[i]))
            modelled[is_unseen].append(float(np.mean([each.error for each in of_one])))
    print(f"\n{len(shared)} questions with several answers{'':19} {'median / 90th':>16}")
    print(f"{f'faster over slower, {len(apart)} pairs':49} {_percent(apart):>16}")
    for is_unseen, what in ((False, "fitted, left out"), (True, "never fitted")):
        name = f"{what}: {len(modelled[is_unseen])} answers"
        print(f"{f'{name}, from the others':49} {_percent(looked_up[is_unseen]):>16}")
        print(f"{f'{name}, from the model':49} {_percent(modelled[is_unseen]):>16}")


def _question(run: Run) -> Hashable:
    setup, config = run.setup, run.setup.config
    shape = config.n_layers, config.d_model, config.ff_width, config.kv_heads, setup.context_length
    return setup.hardware.name, setup.n_gpus, setup.precision, setup.stack, *shape


def _log_flops(run: Run) -> float:
    """Of the model's FLOP/s a GPU: vocabularies differ."""
    flops = flops_per_token(run.setup.config, run.setup.context_length)
    return math.log(run.tokens_per_second / run.setup.n_gpus * flops)


def _percent(errors: Iterable[float]) -> str:
    relative = np.abs(np.expm1(np.array(list(errors))))
    return f"{np.median(relative):.1%} / {np.quantile(relative, 0.9):.1%}"


if __name__ == "__main__":
    main()
