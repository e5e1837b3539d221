"""Metric lines as arrays fit for drawing: smoothed, thinned, and framed honestly."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from casallm.train.metrics import Line

Floats = NDArray[np.float64]

SMOOTHING_SHARE = 0.02
"""The running mean is taken over this share of the points."""

MAX_POINTS = 600
"""More points than a picture has columns only make it heavy."""


@dataclass(frozen=True)
class Curve:
    """One number over the tokens seen."""

    x: Floats
    y: Floats

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True)
class Band:
    """How far the points of a curve spread, column by column."""

    x: Floats
    low: Floats
    high: Floats


def curve_of(lines: Sequence[Line], name: str) -> Curve:
    """The values of `name` over the tokens, lines that lack either left out."""
    points = [
        (line["tokens"], line[name])
        for line in lines
        if line.get(name) is not None and line.get("tokens") is not None
    ]
    pairs = np.array(points, np.float64).reshape(-1, 2)
    return Curve(pairs[:, 0], pairs[:, 1])


def smoothed(curve: Curve) -> Curve:
    """The running mean, centred; at the ends over what there is."""
    half = _half_width(curve)
    places = np.arange(len(curve))
    first, last = np.maximum(places - half, 0), np.minimum(places + half + 1, len(curve))
    total = np.concatenate([[0.0], np.cumsum(curve.y)])
    return Curve(curve.x, (total[last] - total[first]) / (last - first))


def is_smoothed(curve: Curve) -> bool:
    """Whether the curve is long enough for its running mean to differ from it."""
    return _half_width(curve) > 0


def thinned(curve: Curve) -> Curve:
    """At most MAX_POINTS points: means over equal shares of the curve."""
    if len(curve) <= MAX_POINTS:
        return curve
    starts = _shares(len(curve))
    sizes = np.diff(np.append(starts, len(curve)))
    return Curve(np.add.reduceat(curve.x, starts) / sizes, np.add.reduceat(curve.y, starts) / sizes)


def spread(curve: Curve) -> Band:
    """The lowest and the highest value of each of MAX_POINTS shares of the curve."""
    starts = _shares(len(curve))
    return Band(
        curve.x[starts],
        np.minimum.reduceat(curve.y, starts),
        np.maximum.reduceat(curve.y, starts),
    )


def frame(curve: Curve, others: Sequence[float] = ()) -> tuple[float, float]:
    """The lowest and highest value to show, so that the steep beginning does not flatten the rest.

    The top is where the running mean stands after a twentieth of the curve, raised to hold
    `others`; callers say what lies above it.
    """
    mean = smoothed(curve).y
    settled = mean[len(mean) // 20 :]
    low = min([float(curve.y[len(mean) // 20 :].min()), *others])
    high = max([float(settled.max()), *others])
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 0.5
    return low - margin, high + margin


def _half_width(curve: Curve) -> int:
    return int(SMOOTHING_SHARE * len(curve) / 2)


def _shares(n_points: int) -> NDArray[np.int64]:
    """Where each of at most MAX_POINTS equal shares begins."""
    return np.unique(np.linspace(0, n_points, MAX_POINTS, endpoint=False).astype(np.int64))
