import re
import struct
import time
from xml.etree import ElementTree

import matplotlib as mpl
import pytest

from casallm.train.picture import CSS_VARIABLES
from casallm.train.plots import Drawable, Start, draw_plots
from tests.train.generated_run import training_numbers

NUMBERS = training_numbers(400, 10, None)
STARTS = [Start(1_000_000, True), Start(2_000_000, False)]


@pytest.fixture(scope="module")
def plots():
    return {plot.name: plot for plot in draw_plots(Drawable(NUMBERS, STARTS, 4.1))}


def test_a_run_has_its_four_pictures(plots):
    assert list(plots) == ["loss", "throughput", "learning-rate", "gradient-norm"]


def test_a_picture_is_well_formed_and_scales_with_the_page(plots):
    for plot in plots.values():
        for svg in (plot.svg_wide, plot.svg_narrow):
            root = ElementTree.fromstring(svg)
            assert root.tag == "{http://www.w3.org/2000/svg}svg"
            assert "viewBox" in root.attrib
            assert "width" not in root.attrib


def test_a_picture_takes_its_colours_and_its_font_from_the_page(plots):
    for plot in plots.values():
        colours = set(re.findall(r"#[0-9a-fA-F]{6}\b", plot.svg_wide))
        assert colours == set()
        assert "font-family" not in plot.svg_wide
        assert "<style" not in plot.svg_wide
    assert all(
        variable in plots["throughput"].svg_wide for variable in list(CSS_VARIABLES.values())[1:4]
    )


def test_text_stays_text(plots):
    texts = [
        node.text for node in ElementTree.fromstring(plots["loss"].svg_wide).iter() if node.text
    ]

    assert {"tokens", "nats per token", "training", "validation", "bigram model 4.10"} <= set(texts)


def test_pictures_on_one_page_do_not_share_names(plots):
    names = [
        name
        for plot in plots.values()
        for svg in (plot.svg_wide, plot.svg_narrow)
        for name in re.findall(r'\bid="([^"]+)"', svg)
    ]

    assert len(names) == len(set(names))


def test_a_new_start_is_marked_red_only_after_a_loss(plots):
    svg = plots["throughput"].svg_wide

    assert len(re.findall(r"stroke: var\(--alert\)", svg)) == 2  # once in each of the two panels
    assert "red where the one before was lost" in plots["throughput"].caption


def test_what_lies_above_the_frame_is_said(plots):
    assert "Losses up to 6.4" in plots["loss"].caption
    assert "lies above the frame" in plots["gradient-norm"].caption


def test_a_png_is_a_picture_of_some_size(plots):
    for plot in plots.values():
        width, height = struct.unpack(">II", plot.png[16:24])
        assert plot.png.startswith(b"\x89PNG")
        assert width > 700 > 300 < height


def test_the_same_numbers_give_the_same_picture_and_leave_matplotlib_as_it_was(plots):
    before = mpl.rcParams.copy()

    again = draw_plots(Drawable(NUMBERS, STARTS, 4.1))

    assert [plot.svg_wide for plot in again] == [plot.svg_wide for plot in plots.values()]
    assert mpl.rcParams.copy() == before


@pytest.mark.parametrize("n_lines", [0, 1])
def test_too_few_lines_make_no_picture(n_lines):
    assert draw_plots(Drawable(NUMBERS[:n_lines])) == []


def test_numbers_that_are_missing_leave_their_picture_out():
    lines = [{**line, "mfu": None, "grad_norm": None} for line in NUMBERS]

    drawn = {plot.name: plot for plot in draw_plots(Drawable(lines))}

    assert list(drawn) == ["loss", "throughput", "learning-rate"]
    assert ">MFU<" not in drawn["throughput"].svg_wide


def test_two_lines_of_zeros_are_drawn():
    zeros = dict.fromkeys(("loss", "lr", "grad_norm", "tokens_per_second", "mfu"), 0.0)

    assert len(draw_plots(Drawable([{**line, **zeros} for line in NUMBERS[:2]]))) == 4


@pytest.mark.slow
def test_200000_lines_are_drawn_in_seconds_and_stay_light():
    line = NUMBERS[-2]
    lines = [{**line, "tokens": k * 8_192, "loss": 3.0 + (k % 7) / 10} for k in range(1, 200_001)]
    started = time.monotonic()

    drawn = draw_plots(Drawable(lines))

    assert time.monotonic() - started < 60  # 3 s on an idle core
    assert sum(len(plot.svg_wide) + len(plot.svg_narrow) for plot in drawn) < 600_000
