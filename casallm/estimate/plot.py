"""Dollars against parameters, a line an offer: what every size costs, and where."""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from casallm.errors import ConfigError, MissingExtraError
from casallm.estimate.architecture import (
    MOST_PARAMS,
    ModelConfig,
    count_params,
    shape_for_params,
)
from casallm.estimate.estimator import Estimate, EstimateRequest, OfferEstimate, estimate
from casallm.estimate.scaling import tokens_for_params
from casallm.units import format_count

N_SIZES = 9
MAX_LINES = 7
_FORMATS = (".png", ".svg", ".pdf")
_HALF_RANGE = 8.0
"""Sizes from an eighth of the model's to eight times it."""


def plot(answer: Estimate, path: Path) -> None:
    """Write a PNG, SVG or PDF of the offers' dollars over model sizes, 20 tokens a parameter."""
    if path.suffix not in _FORMATS:
        raise ConfigError(f"--plot {path} ends in none of {', '.join(_FORMATS)}: try cost.png")
    if answer.request.measured_tokens_per_second is not None:
        raise ConfigError("a measured rate is of one model: leave it out to draw other sizes")
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise MissingExtraError("matplotlib", "train") from None
    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    for name, points in _curves(answer).items():
        sizes = [x for x, _ in points]
        middle = [each.bill.usd.p50 for _, each in points]
        (line,) = axes.plot(sizes, middle, marker="o", markersize=3, label=name)
        if name == answer.offers[0].name:
            low = [each.bill.usd.p10 for _, each in points]
            high = [each.bill.usd.p90 for _, each in points]
            axes.fill_between(sizes, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.axvline(answer.n_params, color="0.6", linewidth=1, linestyle=":")
    axes.set(xscale="log", yscale="log", ylabel="dollars, all in")
    axes.set_xlabel("parameters; a line ends where the model no longer fits")
    axes.set_title(
        f"20 tokens a parameter, prices of {answer.prices.as_of}; the band holds 8 of 10 runs"
    )
    ticks = [count_params(config) for config in _sizes(answer)][::2]
    axes.set_xticks(ticks, [format_count(tick) for tick in ticks], minor=False)
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter(lambda value, _: f"${value:,.0f}")
    axes.grid(which="major", color="0.9")
    axes.legend(frameon=False, fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:], dpi=120)
    pyplot.close(figure)
    _write(path, picture.getvalue())


def _write(path: Path, picture: bytes) -> None:
    """The whole file, or none and a sentence."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_bytes(picture)
        unfinished.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise ConfigError(
            f"the plot cannot be written to {path}: {error.strerror}; name a file in a folder of"
            " yours"
        ) from None


def _curves(answer: Estimate) -> dict[str, list[tuple[int, OfferEstimate]]]:
    """For each line: its points as (parameters, priced offer), where the model fits."""
    names = [each.name for each in _distinct(answer.offers)[:MAX_LINES]]
    curves: dict[str, list[tuple[int, OfferEstimate]]] = {name: [] for name in names}
    for config in _sizes(answer):
        n_params = count_params(config)
        request: EstimateRequest = replace(
            answer.request,
            config=config,
            tokens=tokens_for_params(n_params),
            budget_usd=None,
            prices=answer.prices,
        )
        try:
            priced = estimate(request).offers
        except ConfigError:
            continue
        for each in priced:
            if each.name in curves:
                curves[each.name].append((n_params, each))
    return {name: points for name, points in curves.items() if points}


def _sizes(answer: Estimate) -> list[ModelConfig]:
    scales = [_HALF_RANGE ** (2 * step / (N_SIZES - 1) - 1) for step in range(N_SIZES)]
    wanted = (round(answer.n_params * scale) for scale in scales)
    return [shape_for_params(min(max(10**6, size), MOST_PARAMS)) for size in wanted]


def _distinct(offers: Sequence[OfferEstimate]) -> list[OfferEstimate]:
    """The cheapest offer of each kind of GPU, on demand and as spot."""
    best: dict[tuple[str, bool], OfferEstimate] = {}
    for each in offers:
        best.setdefault((each.job.offer.hardware.name, each.job.is_spot), each)
    return list(best.values())
