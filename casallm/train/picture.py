"""One picture in all its forms: SVG for a page, wide and narrow, and PNG for everything else.

Drawn with matplotlib's Figure objects alone: no window, no global state of pyplot. In the SVG
every colour is a CSS variable and text stays text, so that one picture suits light and dark.
"""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

INK, MUTED, GRID = "#1d2126", "#68717d", "#e3e6ea"
PRIMARY, SECONDARY, ALERT = "#2a62d9", "#c96a06", "#d02f2f"

CSS_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--line)",
    PRIMARY: "var(--primary)",
    SECONDARY: "var(--secondary)",
    ALERT: "var(--alert)",
}
"""What each colour of a picture is called in the page's style sheet."""

PNG_DPI = 160
NARROW_INCHES = 3.6
"""With text of 9 points, as wide as a phone."""

_STYLE: dict[Any, Any] = {
    "axes.edgecolor": GRID,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": MUTED,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "lines.solid_capstyle": "round",
    "path.simplify": True,
    "svg.fonttype": "none",
    "text.color": INK,
    "xtick.bottom": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "ytick.left": False,
}


@dataclass(frozen=True)
class Picture:
    """One picture, its words included."""

    name: str
    """File name without its ending."""
    title: str
    caption: str
    description: str
    """For those who do not see it."""
    svg_wide: str
    svg_narrow: str
    png: bytes


def draw_picture(
    name: str,
    paint: Callable[[Figure], None],
    *,
    title: str,
    inches: tuple[float, float],
    description: str,
    caption: str = "",
) -> Picture:
    """What `paint` puts on a figure of that many inches, and on a narrow one for phones."""
    with mpl.rc_context(_STYLE):
        wide = _figure(paint, inches)
        narrow = _figure(paint, (NARROW_INCHES, max(2.6, 0.75 * inches[1])))
        return Picture(
            name,
            title,
            caption,
            description,
            svg_wide=_svg(wide, f"{name}-wide"),
            svg_narrow=_svg(narrow, f"{name}-narrow"),
            png=_png(wide),
        )


def _figure(paint: Callable[[Figure], None], inches: tuple[float, float]) -> Figure:
    figure = Figure(figsize=inches, layout="constrained")
    paint(figure)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once, saved in several forms
    return figure


def _png(figure: Figure) -> bytes:
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(
        buffer, format="png", dpi=PNG_DPI, facecolor="white", metadata={"Software": None}
    )
    return buffer.getvalue()


def _svg(figure: Figure, salt: str) -> str:
    """The figure as an `<svg>` element whose colours and fonts are the page's."""
    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with mpl.rc_context({"svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r" font-family: [^;\"]*;", "", text)
    text = re.sub(r'<g id="[\w.]+"', "<g", text)
    for color, variable in CSS_VARIABLES.items():
        text = text.replace(color, variable)
    return text
