"""Fit the throughput model to published runs and say how well it predicts those it never saw.

    python benchmarks/calibration/fit_throughput.py RUNS.csv [--write]

RUNS.csv is llm-foundry's benchmark (`../shared/data/published-runs/calibration.csv`). Beside this
script lie other systems' figures, and llm-foundry's at other sizes, contexts and in fp8. Other
systems are fitted by shape, machine, precision and stack; they are predicted from these, and once
more as told: with the recomputation, the micro-batch and the sharding that their publishers state.
`--write` stores constants and spread in the package. Other systems are laid out as an estimate
would with the constants of the package: write until nothing moves.
"""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from casallm.estimate import calibration
from casallm.estimate.calibration import Run, Score
from casallm.estimate.throughput import Z90, Constants

HERE = Path(__file__).parent
ASSUMED_SPREAD = {"layout": 0.07, "chip": 0.2, "doubling": 0.02, "measured": 0.02}
TAIL = 0.08
"""Share of the systems' figures beyond either end of the 80 % interval: 2 % less than it says, as
published figures are rather the good ones."""

NVIDIAS = ("NeMo", "Paxml", "MaxText")
"""Systems of NVIDIA's own recipes: half of all free figures."""

TARGET = HERE.parents[1] / "casallm" / "estimate" / "throughput.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    foundry = calibration.read_foundry_runs(arguments.runs)
    sizes = calibration.read_other_runs(HERE / "other_sizes.csv")
    others = calibration.read_other_runs(HERE / "other_systems.csv")
    told = calibration.read_other_runs(HERE / "other_systems.csv", is_told=True)

    constants = calibration.fit([*foundry, *others])
    print("constants:", json.dumps(_rounded(asdict(constants)), indent=2))
    left_out = calibration.leave_one_group_out(others, _by_system, foundry)
    as_told = calibration.leave_one_group_out(others, _by_system, foundry, asked=told)
    spread = _spread(left_out, as_told, others)
    print("spread:", json.dumps(spread, indent=2))

    print(
        f"\n{'median / 90th percentile of the error':44} {'model':>15} {'constant MFU':>15} inside"
    )
    for name, group in (("GPU", _by_gpu), ("size", _by_size)):
        ours = calibration.leave_one_group_out(foundry, group)
        naive = calibration.constant_mfu_errors(foundry, group)
        _print_score(f"llm-foundry, one {name} held out", foundry, ours, naive)
    unseen = calibration.score(calibration.log_errors(sizes, calibration.fit(foundry)))
    naive = calibration.constant_mfu_errors(sizes, lambda run: run.system, foundry)
    _print_score("llm-foundry, other sizes and contexts", sizes, unseen, naive)
    naive = calibration.constant_mfu_errors(others, _by_system)
    for name, chosen in _CHOICES:
        picked = [i for i, run in enumerate(others) if chosen(run)]
        for how, runs, ours in (("", others, left_out), (" as told", told, as_told)):
            _print_score(
                f"other systems{how}{name}",
                [runs[i] for i in picked],
                _part(ours, picked),
                _part(naive, picked),
            )
    _print_runs(told, left_out, as_told)
    if arguments.write:
        _write(constants, spread)


def _is_free(run: Run) -> bool:
    """Whether its publishers name nothing that held it back."""
    return not run.limit


_CHOICES: tuple[tuple[str, Callable[[Run], bool]], ...] = (
    ("", lambda run: True),
    (", free", _is_free),
    (", free, bf16", lambda run: _is_free(run) and run.setup.precision == "bf16"),
    (", free, fp8", lambda run: _is_free(run) and run.setup.precision == "fp8"),
    (", free, eager", lambda run: _is_free(run) and run.setup.stack == "eager"),
    (", free, not NVIDIA's", lambda run: _is_free(run) and run.system not in NVIDIAS),
)


def _by_gpu(run: Run) -> str:
    return run.setup.hardware.name


def _by_size(run: Run) -> tuple[int, int]:
    return run.setup.config.n_layers, run.setup.config.d_model


def _by_system(run: Run) -> str:
    return run.system


def _part(score: Score, picked: list[int]) -> Score:
    return calibration.score(np.array(score.log_errors)[picked])


def _spread(left_out: Score, as_told: Score, runs: list[Run]) -> dict[str, float]:
    """The deviations up and down that leave `TAIL` outside: of the free figures at the fast end, of
    all at the slow one, where the held back are. Both ways to ask count alike.
    """
    errors = np.array([left_out.log_errors, as_told.log_errors])
    free = errors[:, [_is_free(run) for run in runs]]
    faster, slower = -np.quantile(free, TAIL) / Z90, np.quantile(errors, 1 - TAIL) / Z90
    system = math.sqrt(max(0.0, faster**2 - ASSUMED_SPREAD["layout"] ** 2))
    return {"system": round(system, 3), "skew": round(slower / faster, 2), **ASSUMED_SPREAD}


def _print_score(name: str, runs: list[Run], ours: Score, naive: Score) -> None:
    inside = np.mean(
        [calibration.is_inside(*each) for each in zip(runs, ours.log_errors, strict=True)]
    )
    print(f"{name:44} {_percent(ours):>15} {_percent(naive):>15} {inside:6.0%} of {len(runs)}")


def _print_runs(runs: list[Run], score: Score, as_told: Score) -> None:
    heads = f"{'system':14} {'machine':16} {'stack':9} {'tokens/s/GPU':>12}"
    print(f"\n{heads} {'predicted':>10} {'as told':>8}")
    for run, error, told in zip(runs, score.log_errors, as_told.log_errors, strict=True):
        setup = run.setup
        rate = run.tokens_per_second / setup.n_gpus
        machine = f"{setup.n_gpus} x {setup.hardware.name}"
        stack = setup.stack if setup.precision == "bf16" else f"{setup.stack[:4]} fp8"
        print(
            f"{run.system:14} {machine:16} {stack:9} {rate:12,.0f} {math.expm1(error):+10.0%}"
            f" {math.expm1(told):+8.0%}  {run.limit}".rstrip()
        )


def _percent(score: Score) -> str:
    return f"{score.median:.1%} / {score.p90:.1%}"


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.4g}") for name, value in values.items()}


def _write(constants: Constants, spread: dict[str, float]) -> None:
    stored = json.loads(TARGET.read_text(encoding="utf-8"))
    stored["constants"] = _rounded(asdict(constants))
    stored["spread"] = spread
    TARGET.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
    print(f"\nwritten to {TARGET.name}")


if __name__ == "__main__":
    main()
