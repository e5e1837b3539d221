"""The few constants of the throughput model, fitted to published training runs.

A fit is a least-squares problem in the logarithms of rate and constants, with a soft loss (a few
published figures are runs with their stalls) and weak priors at physically sensible values. The
test of a fit is a group that it never saw: `leave_one_group_out`.
"""

import csv
import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast, get_args

import numpy as np

from casallm.errors import ConfigError, DataError
from casallm.estimate.architecture import ModelConfig, flops_per_token
from casallm.estimate.hardware import gpu_named
from casallm.estimate.layout import Wishes, plan_layout
from casallm.estimate.memory import DataParallel, Precision, Recompute, Stack
from casallm.estimate.throughput import Constants, Setup, Throughput, predict, step_time

PRIORS: Mapping[str, tuple[float, float]] = {
    "matmul": (0.92, 0.05),
    "tail_eager": (1.5, 0.5),
    "tail_compiled": (0.6, 0.15),
    "attention_eager": (0.4, 0.3),
    "attention_compiled": (0.7, 0.2),
    "exposed": (0.5, 1.0),
    "hop_seconds": (50e-6, 1.0),
    "recompute_share": (1.0, 0.1),
    "straggling": (0.01, 0.5),
}
"""Median and standard deviation of the logarithm of each constant before any run is seen.

FlashAttention-2 trains at about 190 of an A100's sustained 268 TFLOP/s (Dao 2023), the first one
at half of that. Compiling leaves the kernel as it is, but compiled programs are younger: they call
the second, older ones mostly the first. A norm fused with the addition before it saves four of ten
bytes.
"""

_NOISE = 0.06
"""Standard deviation of the logarithm of a published rate around its system's others."""

_BETWEEN_SYSTEMS = 0.12
"""The same of a whole system around a perfect model: kernels, versions, care, cooling."""

Family = Literal["classic", "modern"]

_FOUNDRY_HEADS = {768: 12, 1024: 16, 1536: 12, 2048: 16, 2560: 20, 4096: 32, 5120: 40}
"""llm-foundry's head counts by width: its table of results leaves them out."""


@dataclass(frozen=True)
class Run:
    """One published rate and the setup that gave it."""

    system: str
    setup: Setup
    tokens_per_second: float
    """Of the whole job."""
    limit: str = ""
    """What its publishers say held it back, or that it is a whole run with its failures, of which a
    setup knows nothing; it is never fitted."""


@dataclass(frozen=True)
class Score:
    """How far predictions were from runs that the fit had not seen."""

    median: float
    """Median of the relative error's magnitude."""
    p90: float
    """Its 90th percentile."""
    log_errors: tuple[float, ...]
    """Logarithm of predicted over published, a run each."""


def read_foundry_runs(path: Path) -> list[Run]:
    """The rows of llm-foundry's benchmark as `published-runs/calibration.csv` holds them."""
    return [_foundry_run(row) for row in _read_rows(path)]


def read_other_runs(path: Path, *, is_told: bool = False) -> list[Run]:
    """The rows of `benchmarks/calibration/other_*.csv`, laid out as an estimate would: by shape, or
    told all that their publishers state of recomputation, micro-batch and sharding, as with
    `--recompute`, `--micro-batch`, `--sharding`.
    """
    return [_other_run(row, is_told=is_told) for row in _read_rows(path)]


def read_answers(path: Path, *, is_told: bool) -> list[Run | None]:
    """The rows of a file of the same form; None where the estimator says that a model does not
    fit: some programs keep less than 16 bytes a parameter.
    """
    return [_answer(row, is_told=is_told) for row in _read_rows(path)]


def start_constants() -> Constants:
    """Every constant where it is before any run is seen."""
    return Constants(**{name: median for name, (median, _) in PRIORS.items()})


def fit(runs: Sequence[Run]) -> Constants:
    """The constants for which `runs` are most likely (Levenberg-Marquardt).

    A system counts once by its mean error, however many figures it published, and by the spread
    of its figures around that mean. Means far off pull ever less, and limited runs not at all.
    """
    seen = [run for run in runs if not run.limit]
    sigmas = np.array([sigma for _, sigma in PRIORS.values()])
    systems = [run.system for run in seen]
    members = [np.array([s == name for s in systems]) for name in dict.fromkeys(systems)]

    def residuals(x: np.ndarray) -> np.ndarray:
        errors = log_errors(seen, _constants(x))
        return np.concatenate([*(_misfit(errors[of_one]) for of_one in members), x / sigmas])

    x = np.zeros(len(sigmas))
    current, damping = residuals(x), 1e-2
    for _ in range(40):
        slopes = [(residuals(x + step) - current) / 1e-4 for step in 1e-4 * np.eye(len(x))]
        jacobian = np.array(slopes).T
        normal = jacobian.T @ jacobian + damping * np.eye(len(x))
        moved = x - np.linalg.solve(normal, jacobian.T @ current)
        candidate = residuals(moved)
        gain = 1 - candidate @ candidate / (current @ current)
        if gain > 0:
            x, current, damping = moved, candidate, damping / 3
        else:
            damping *= 5
        if 0 <= gain < 1e-6:
            break
    return _constants(x)


def log_errors(runs: Sequence[Run], constants: Constants) -> np.ndarray:
    """Logarithm of predicted over published rate, a run each."""
    rates = [step_time(run.setup, constants).tokens_per_second for run in runs]
    return np.log(np.array(rates) / np.array([run.tokens_per_second for run in runs]))


def is_inside(run: Run, error: float) -> bool:
    """Whether the package's interval, laid around a prediction with this error, holds the run."""
    own = predict(run.setup)
    around = Throughput(run.tokens_per_second * math.exp(error), own.sigma, own.skew)
    return around.p10 <= run.tokens_per_second <= around.p90


def leave_one_group_out(
    runs: Sequence[Run],
    group: Callable[[Run], Hashable],
    others: Sequence[Run] = (),
    *,
    asked: Sequence[Run] | None = None,
) -> Score:
    """Errors on each group when the constants are fitted to all other groups and `others`.

    `asked` are the same runs as they are predicted, where more is told of them than is fitted.
    """
    questions = runs if asked is None else asked
    errors = np.zeros(len(runs))
    groups = [group(run) for run in runs]
    for held_out in dict.fromkeys(groups):
        seen = [run for run, g in zip(runs, groups, strict=True) if g != held_out]
        mask = np.array([g == held_out for g in groups])
        unseen = [run for run, g in zip(questions, groups, strict=True) if g == held_out]
        errors[mask] = log_errors(unseen, fit([*seen, *others]))
    return score(errors)


def constant_mfu_errors(
    runs: Sequence[Run], group: Callable[[Run], Hashable], others: Sequence[Run] = ()
) -> Score:
    """The same with the simplest model: the median MFU of the GPU's other runs, or of all."""
    errors = []
    for run in runs:
        seen = [*others, *(other for other in runs if group(other) != group(run))]
        same = [r for r in seen if r.setup.hardware.name == run.setup.hardware.name]
        utilisation = float(np.median([_utilisation(other) for other in same or seen]))
        errors.append(math.log(utilisation / _utilisation(run)))
    return score(np.array(errors))


def score(errors: np.ndarray) -> Score:
    """The summary of logarithmic errors."""
    relative = np.abs(np.exp(errors) - 1)
    return Score(
        median=float(np.median(relative)),
        p90=float(np.quantile(relative, 0.9)),
        log_errors=tuple(float(e) for e in errors),
    )


def _utilisation(run: Run) -> float:
    flops = flops_per_token(run.setup.config, run.setup.context_length)
    peak = run.setup.hardware.peak_flops * run.setup.n_gpus
    return run.tokens_per_second * flops / peak


def _constants(x: np.ndarray) -> Constants:
    """The constants at `x` standard steps of the logarithm from their medians."""
    start = start_constants()
    moved = {n: getattr(start, n) * math.exp(v) for n, v in zip(PRIORS, x, strict=True)}
    return replace(start, **moved)


def _misfit(errors: np.ndarray) -> np.ndarray:
    """Residuals of one system: its mean, whose pull fades far out, and each run around it."""
    mean = errors.mean()
    between = mean / math.sqrt(_BETWEEN_SYSTEMS**2 + _NOISE**2 / len(errors))
    within = (errors - mean) / _NOISE
    faded = math.copysign(math.sqrt(math.log1p(between**2)), between)
    return np.append(_soft(within), faded)


def _soft(errors: np.ndarray) -> np.ndarray:
    """Residuals whose squares grow like the error itself once it is large."""
    return np.sign(errors) * np.sqrt(2 * (np.sqrt(1 + errors**2) - 1))


def _read_rows(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        raise DataError(f"there are no published runs at {path}: check the path") from None


def _foundry_run(row: Mapping[str, str]) -> Run:
    width = int(row["d_model"])
    config = ModelConfig(
        family="classic",
        n_layers=int(row["n_layer"]),
        d_model=width,
        n_heads=_FOUNDRY_HEADS[width],
        vocab_size=50_432,
    )
    micro = re.search(r"-mb(\d+)-", row["id"])
    batch = re.search(r"global batch (\d+)", row["notes"])
    n_gpus = int(row["n_gpu"])
    micro_batch_size = int(micro[1]) if micro else 8
    setup = Setup(
        config=config,
        context_length=int(row["ctx"]),
        hardware=gpu_named(row["gpu"]),
        micro_batch_size=micro_batch_size,
        global_batch_size=int(batch[1]) if batch else 2 * micro_batch_size * n_gpus,
        n_nodes=n_gpus // 8,
        stack="eager",
        precision="fp8" if "fp8" in row["precision"] else "bf16",
        recompute="full" if row["recompute"] == "1" else "none",
        sharding="fsdp",
    )
    rate = float(row["tok_s_per_gpu"]) * n_gpus
    return Run("llm-foundry", setup, rate)


def _stated(row: Mapping[str, str]) -> Wishes:
    """What a row's publisher states of the layout."""
    recompute, micro_batch, sharding = row["recompute"], row["micro_batch"], row["sharding"]
    return Wishes(
        sharding=cast(DataParallel, _one_of(sharding, DataParallel)) if sharding else None,
        recompute=cast(Recompute, _one_of(recompute, Recompute)) if recompute else None,
        micro_batch_size=int(micro_batch) if micro_batch else None,
    )


def _other_run(row: Mapping[str, str], *, is_told: bool) -> Run:
    grouped = ModelConfig(
        n_layers=int(row["n_layers"]),
        d_model=int(row["d_model"]),
        n_heads=int(row["n_heads"]),
        n_kv_heads=int(row["n_kv_heads"]),
        d_ff=int(row["d_ff"]),
        vocab_size=int(row["vocab_size"]),
    )
    config = grouped.model_copy(update={"family": _one_of(row["family"], Family)})
    wishes = replace(
        _stated(row) if is_told else Wishes(),
        stack=cast(Stack, _one_of(row["stack"], Stack)),
        precision=cast(Precision, _one_of(row["precision"], Precision)),
    )
    setup = plan_layout(
        config,
        int(row["context"]),
        gpu_named(row["gpu"]),
        gpus_per_node=int(row["gpus_per_node"]),
        n_nodes=int(row["n_nodes"]),
        wishes=wishes,
    )
    rate = float(row["tokens_per_second_per_gpu"]) * setup.n_gpus
    return Run(row["system"], setup, rate, row["limit"])


def _answer(row: Mapping[str, str], *, is_told: bool) -> Run | None:
    try:
        return _other_run(row, is_told=is_told)
    except ConfigError:
        return None


def _one_of(value: str, choices: object) -> str:
    if value not in get_args(choices):
        raise DataError(f"{value!r} in the published runs is none of {get_args(choices)}")
    return value
