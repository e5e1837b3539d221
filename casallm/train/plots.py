"""The pictures of a report: loss, speed, learning rate and gradient norm over the tokens seen."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from casallm.train.curves import Curve, curve_of, frame, is_smoothed, smoothed, spread, thinned
from casallm.train.metrics import Line, evaluation_lines, training_lines
from casallm.train.picture import ALERT, MUTED, PRIMARY, SECONDARY, Picture, draw_picture
from casallm.units import format_count

_LEGEND_ABOVE: dict[str, Any] = {
    "loc": "lower right",
    "bbox_to_anchor": (1.0, 1.0),
    "ncols": 2,
    "borderpad": 0.2,
    "borderaxespad": 0.0,
    "handlelength": 1.4,
    "columnspacing": 1.4,
}


@dataclass(frozen=True)
class Start:
    """Where an attempt after the first took over."""

    tokens: float
    is_after_loss: bool
    """Whether the attempt before it ended without a word: killed, or its machine gone."""


@dataclass(frozen=True)
class Drawable:
    """What the pictures are drawn from."""

    lines: Sequence[Line]
    starts: Sequence[Start] = ()
    baseline_loss: float | None = None
    """Of the bigram model, in nats per token."""


def draw_plots(drawable: Drawable) -> list[Picture]:
    """All pictures that the lines suffice for; none for a run that has just begun."""
    return [picture for draw in _PLOTS if (picture := draw(drawable)) is not None]


def _draw_loss(drawable: Drawable) -> Picture | None:
    loss = curve_of(training_lines(drawable.lines), "loss")
    val = curve_of(evaluation_lines(drawable.lines), "val_loss")
    if len(loss) < 2:
        return None
    baseline = drawable.baseline_loss
    others = [*val.y[len(val) // 20 :].tolist(), *([baseline] if baseline is not None else [])]
    low, high = frame(loss, others)

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        _paint_curve(axes, loss, "training")
        if len(val):
            axes.plot(val.x, val.y, "o", color=SECONDARY, markersize=4, label="validation")
        if baseline is not None:
            _paint_baseline(axes, baseline)
        axes.set_ylim(low, high)
        _finish_axes(axes, loss, "nats per token")
        axes.legend(**_LEGEND_ABOVE)

    caption = ""
    if is_smoothed(loss):
        caption = "Each point of the pale curve is one line of metrics; the dark one is their mean."
    above = loss.x[loss.y > high]
    if len(above):
        caption += (
            f" Losses up to {loss.y.max():.2f} within the first {format_count(above[-1])} tokens"
            " lie above the frame."
        )
    fall = f"from {loss.y[0]:.2f} to {smoothed(loss).y[-1]:.2f}"
    return draw_picture(
        "loss",
        paint,
        title="Loss",
        inches=(8.6, 3.9),
        description=f"Training loss over the tokens: {fall}.",
        caption=caption.strip(),
    )


def _draw_throughput(drawable: Drawable) -> Picture | None:
    lines = training_lines(drawable.lines)
    speed, mfu = curve_of(lines, "tokens_per_second"), curve_of(lines, "mfu")
    if len(speed) < 2:
        return None
    n_rows = 2 if len(mfu) >= 2 else 1

    def paint(figure: Figure) -> None:
        rows = figure.subplots(n_rows, 1, sharex=True, squeeze=False)[:, 0]
        _paint_curve(rows[0], speed)
        rows[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
        rows[0].set_ylim(0, _top(speed))
        _finish_axes(rows[0], speed, "tokens per second", has_x_label=n_rows == 1)
        if n_rows == 2:
            _paint_curve(rows[1], mfu)
            rows[1].yaxis.set_major_formatter(
                FuncFormatter(lambda value, _: f"{100 * value:.3g} %")
            )
            rows[1].set_ylim(0, _top(mfu))
            _finish_axes(rows[1], mfu, "MFU")
        for axes in rows:
            _paint_starts(axes, drawable.starts)

    caption = "Validation and checkpoints are left out of the speed."
    if drawable.starts:
        caption += (
            " A dotted line is a new start, red where the one before was lost without a word."
        )
    return draw_picture(
        "throughput",
        paint,
        title="Speed",
        inches=(8.6, 1.4 + 1.7 * n_rows),
        description=f"Speed: {format_count(speed.y.mean())} tokens per second on average.",
        caption=caption,
    )


def _draw_lr(drawable: Drawable) -> Picture | None:
    lr = curve_of(training_lines(drawable.lines), "lr")
    if len(lr) < 2:
        return None

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        thin = thinned(lr)
        axes.plot(thin.x, thin.y, color=PRIMARY)
        axes.set_ylim(0, _top(lr))
        axes.yaxis.set_major_formatter(FuncFormatter(_format_rate))
        _finish_axes(axes, lr)

    return draw_picture(
        "learning-rate",
        paint,
        title="Learning rate",
        inches=(4.6, 3.0),
        description=f"Learning rate: at most {lr.y.max():.2e}, in the end {lr.y[-1]:.2e}.",
    )


def _draw_gradient(drawable: Drawable) -> Picture | None:
    norm = curve_of(training_lines(drawable.lines), "grad_norm")
    if len(norm) < 2:
        return None
    high = frame(norm)[1]

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        _paint_curve(axes, norm)
        axes.set_ylim(0, high)
        _finish_axes(axes, norm)

    caption = "Before clipping."
    if norm.y.max() > high:
        caption += f" Its highest value, {norm.y.max():.2f}, lies above the frame."
    return draw_picture(
        "gradient-norm",
        paint,
        title="Gradient norm",
        inches=(4.6, 3.0),
        description=f"Gradient norm: {smoothed(norm).y[-1]:.2f} in the end.",
        caption=caption,
    )


_PLOTS: tuple[Callable[[Drawable], Picture | None], ...] = (
    _draw_loss,
    _draw_throughput,
    _draw_lr,
    _draw_gradient,
)


def _paint_curve(axes: Axes, curve: Curve, label: str | None = None) -> None:
    """The points, pale, and their running mean."""
    band = spread(curve)
    if len(band.x) < len(curve):
        axes.fill_between(band.x, band.low, band.high, color=PRIMARY, alpha=0.22, linewidth=0)
    else:
        axes.plot(curve.x, curve.y, color=PRIMARY, alpha=0.35, linewidth=1)
    mean = thinned(smoothed(curve))
    axes.plot(mean.x, mean.y, color=PRIMARY, label=label)


def _paint_baseline(axes: Axes, loss: float) -> None:
    axes.axhline(loss, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.2)
    axes.annotate(
        f"bigram model {loss:.2f}",
        (1.0, loss),
        xycoords=("axes fraction", "data"),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
        color=MUTED,
    )


def _paint_starts(axes: Axes, starts: Sequence[Start]) -> None:
    for start in starts:
        color = ALERT if start.is_after_loss else MUTED
        axes.axvline(start.tokens, color=color, linestyle=(0, (1, 2)), linewidth=1.2)


def _finish_axes(
    axes: Axes, curve: Curve, title: str | None = None, *, has_x_label: bool = True
) -> None:
    axes.set_xlim(0, 1.01 * curve.x.max())
    axes.xaxis.set_major_locator(MaxNLocator(5, min_n_ticks=3))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
    if title:
        axes.set_title(title, loc="left", fontsize=9, color=MUTED)
    if has_x_label:
        axes.set_xlabel("tokens")


def _top(curve: Curve) -> float:
    """The upper end of an axis that begins at zero."""
    return float(1.1 * curve.y.max()) or 1.0


def _format_rate(value: float, _: int) -> str:
    mantissa, exponent = f"{value:.1e}".split("e")
    return "0" if value == 0 else f"{mantissa.removesuffix('.0')}e{int(exponent)}"
