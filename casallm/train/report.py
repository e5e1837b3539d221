"""The report of a run: one page that needs nothing else, the same in Markdown, and pictures.

`report.html` loads nothing from anywhere and runs no script (its content security policy says
so), reads well on a phone and in the dark. It can be written at any moment of a run, and again.
"""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from casallm import __version__
from casallm.estimate.architecture import count_params, flops_per_token
from casallm.estimate.cost import compare_with_paid
from casallm.storage.store import Store
from casallm.train.metrics import Line, evaluation_lines, training_lines
from casallm.train.picture import Picture
from casallm.train.plots import Drawable, Start, draw_plots
from casallm.train.report_data import ReportData
from casallm.train.report_loader import load_report_data
from casallm.units import format_count, format_duration, format_usd

SHOWN_SAMPLE_STEPS = 6
"""Samples of at most this many steps are shown, the last first."""


@dataclass(frozen=True)
class Tile:
    """One headline number with its unit and what to know of it."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class SampleGroup:
    """What one prompt became at several steps, the last first."""

    prompt: str
    texts: tuple[tuple[str, str], ...]
    """When (in words), and the continuation."""


def write_report(run: Store, data: ReportData | None = None) -> None:
    """Write report.html, report.md and plots/*.png into the run's directory.

    Each file is replaced whole; the page comes last. `data` is what the run's directory tells
    unless a stage has more to say.
    """
    data = data or load_report_data(run)
    plots = draw_plots(_drawable(data))
    for plot in plots:
        run.write(f"plots/{plot.name}.png", plot.png)
    run.write("report.md", render_markdown(data, plots).encode())
    run.write("report.html", render_html(data, plots).encode())


def render_html(data: ReportData, plots: Sequence[Picture]) -> str:
    """The page; everything that comes from the run is escaped."""
    environment = _environment(is_html=True)
    style = Markup(_read("report_page.css"))
    return environment.from_string(_read("report_page.html")).render(
        **_content(data, plots), style=style
    )


def render_markdown(data: ReportData, plots: Sequence[Picture]) -> str:
    """The same as Markdown, with the pictures beside it."""
    return (
        _environment(is_html=False)
        .from_string(_read("report_page.md"))
        .render(**_content(data, plots))
    )


def headline(data: ReportData) -> list[Tile]:
    """The numbers that people ask for first, those that are known."""
    lines, evaluations = training_lines(data.lines), evaluation_lines(data.lines)
    return [
        *_size_tiles(data, lines),
        *_quality_tiles(data, evaluations),
        *_speed_tiles(data, lines),
        *_cost_tiles(data, lines),
    ]


def group_samples(samples: Sequence[Mapping[str, Any]]) -> list[SampleGroup]:
    """The samples by prompt; of many steps the first, the last and some between, evenly."""
    steps = sorted({int(sample["step"]) for sample in samples})
    if len(steps) > SHOWN_SAMPLE_STEPS:
        last = len(steps) - 1
        chosen = {round(k * last / (SHOWN_SAMPLE_STEPS - 1)) for k in range(SHOWN_SAMPLE_STEPS)}
        steps = [steps[index] for index in sorted(chosen)]
    groups: dict[str, list[tuple[str, str]]] = {}
    for sample in sorted(samples, key=lambda sample: -int(sample["step"])):
        if sample["step"] in steps:
            when = f"step {sample['step']:,}, {format_count(sample['tokens'])} tokens"
            groups.setdefault(str(sample["prompt"]), []).append((when, str(sample["text"])))
    return [SampleGroup(prompt, tuple(texts)) for prompt, texts in groups.items()]


def status_sentence(data: ReportData) -> str:
    """How far the run is, and why it is not further."""
    step = _reached(data)
    if data.state == "finished":
        return f"{data.reason[:1].upper()}{data.reason[1:]}."
    share = f"step {step:,} of {data.total_steps:,} ({step / max(data.total_steps, 1):.0%})"
    if data.state == "stopped":
        return f"At {share}: {data.reason}."
    return f"At {share}." if step else f"Just begun: {data.total_steps:,} steps to go."


def _content(data: ReportData, plots: Sequence[Picture]) -> dict[str, Any]:
    return {
        "data": data,
        "tiles": headline(data),
        "plots": plots,
        "samples": group_samples(data.samples),
        "settings": list(_flat(data.settings)),
        "status": status_sentence(data),
        "version": __version__,
    }


def _size_tiles(data: ReportData, lines: Sequence[Line]) -> list[Tile]:
    tiles = []
    if data.model is not None:
        n_params = count_params(data.model)
        shape = f"{data.model.n_layers} layers of width {data.model.d_model:,}"
        tiles.append(Tile("Parameters", format_count(n_params), f"{n_params:,}; {shape}"))
    tokens = _last(lines, "tokens") or 0
    total = data.total_steps * data.tokens_per_step
    note = f"{_reached(data):,} steps of {data.tokens_per_step:,}"
    if tokens < total:
        note += f"; {format_count(total)} planned"
    return [*tiles, Tile("Tokens seen", format_count(tokens), note)]


def _quality_tiles(data: ReportData, evaluations: Sequence[Line]) -> list[Tile]:
    tiles = []
    loss, bits = _last(evaluations, "val_loss"), _last(evaluations, "val_bpb")
    if loss is not None:
        note = f"nats per token; perplexity {math.exp(min(loss, 50)):.3g}"
        tiles.append(Tile("Validation loss", f"{loss:.3f}", note))
    if bits is not None:
        tiles.append(Tile("Bits per byte", f"{bits:.3f}", "of held-out text"))
    baseline = data.baseline
    if baseline is not None:
        note = "nats per token"
        if loss is not None:
            gap = baseline.nats_per_token - loss
            note += f"; the model is {abs(gap):.3f} {'better' if gap > 0 else 'worse'}"
        tiles.append(Tile("Bigram baseline", f"{baseline.nats_per_token:.3f}", note))
    return tiles


def _speed_tiles(data: ReportData, lines: Sequence[Line]) -> list[Tile]:
    tiles = []
    seconds = _last(lines, "elapsed_seconds")
    if seconds is not None:
        n_starts = len(data.attempts)
        note = "of training" + (f", in {n_starts} starts" if n_starts > 1 else "")
        tiles.append(Tile("Time", format_duration(seconds), note))
    speed, mfu = _median(lines, "tokens_per_second"), _median(lines, "mfu")
    if speed is not None:
        tiles.append(Tile("Speed", format_count(speed), f"tokens per second on {data.hardware}"))
    if mfu is not None:
        tiles.append(Tile("MFU", f"{mfu:.1%}", _mfu_note(data, mfu)))
    return tiles


def _mfu_note(data: ReportData, mfu: float) -> str:
    """The convention, and what the other one would say."""
    note = "of the peak; standard convention"
    if data.model is None:
        return note
    standard = flops_per_token(data.model, data.context_length)
    causal = flops_per_token(data.model, data.context_length, "causal")
    return f"{note} (causal: {mfu * causal / standard:.1%})"


def _cost_tiles(data: ReportData, lines: Sequence[Line]) -> list[Tile]:
    paid = _last(lines, "usd")
    if paid is None:
        return []
    note = "from the machines' boot on"
    if data.predicted_usd is not None:
        note = compare_with_paid(data.predicted_usd, paid)
    return [Tile("Cost", format_usd(paid), note)]


def _drawable(data: ReportData) -> Drawable:
    pairs = zip(data.attempts, data.attempts[1:], strict=False)
    starts = [
        Start(attempt.first_tokens, before.is_lost)
        for before, attempt in pairs
        if attempt.first_tokens is not None
    ]
    baseline = data.baseline.nats_per_token if data.baseline else None
    return Drawable(data.lines, starts, baseline)


def _reached(data: ReportData) -> int:
    return max((int(line["step"] or 0) for line in data.lines), default=0)


def _last(lines: Sequence[Line], name: str) -> float | None:
    return next((v for line in reversed(lines) if (v := line.get(name)) is not None), None)


def _median(lines: Sequence[Line], name: str) -> float | None:
    values = [value for line in lines if (value := line.get(name)) is not None]
    return statistics.median(values) if values else None


def _flat(settings: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The settings by section, each a list of names and values."""
    sections: list[tuple[str, list[tuple[str, str]]]] = []
    for section, values in settings.items():
        if isinstance(values, Mapping):
            rows = [(str(name), _value_text(value)) for name, value in values.items()]
            sections.append((section, rows))
    return sections


def _value_text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "-"
    return "-" if value in (None, "", "null") else str(value)


def _fence(text: str) -> str:
    """`text` as a fenced block of Markdown that nothing in it can end."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _cell(text: str) -> str:
    """`text` fit for a cell of a Markdown table."""
    return " ".join(re.sub(r"([\\`*_\[\]<>|])", r"\\\1", text).split())


def _environment(*, is_html: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        autoescape=is_html, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(
        fence=_fence, cell=_cell, count=format_count, usd=format_usd, svg=Markup
    )
    return environment


def _read(name: str) -> str:
    return resources.files("casallm.train").joinpath(name).read_text(encoding="utf-8")
