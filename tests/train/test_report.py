import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from casallm.estimate.cost import Interval
from casallm.train.report import (
    group_samples,
    headline,
    render_html,
    render_markdown,
    status_sentence,
    write_report,
)
from casallm.train.report_data import Section
from casallm.train.report_loader import load_report_data
from tests.train.generated_run import PROMPTS, Stretch, make_run

HOSTILE = (
    "</blockquote><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "```\n# heading\n[link](javascript:alert(1)) {{ 7 * 7 }}",
)


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails where tags do not nest."""

    void = frozenset({"meta", "br", "img", "input", "link", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data


def html_of(data) -> str:
    return render_html(data, [])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The directory of a finished run whose report is written."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    write_report(make_run(directory))
    return directory


def test_a_report_is_three_kinds_of_files(written):
    assert {"report.html", "report.md"} <= {path.name for path in written.iterdir()}
    assert sorted(path.name for path in (written / "plots").iterdir()) == [
        "gradient-norm.png",
        "learning-rate.png",
        "loss.png",
        "throughput.png",
    ]


def test_the_page_needs_nothing_else_and_runs_nothing(written):
    html = (written / "report.html").read_text()
    page = Page(html)
    addresses = {
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "action", "srcset") and value[0] != "#"
    }
    assert addresses == set()
    assert not {"script", "link", "iframe", "object", "embed"} & {tag for tag, _ in page.tags}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert set(re.findall(r"https?://[^\"'\s<)]+", html)) == {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "default-src 'none'; style-src 'unsafe-inline'" in html


def test_the_same_run_at_the_same_time_gives_the_same_page(tmp_path):
    data = load_report_data(make_run(tmp_path / "run"))

    assert html_of(data) == html_of(data)


def test_hostile_text_stays_text(tmp_path):
    data = load_report_data(make_run(tmp_path / "<b>run", texts=HOSTILE))

    page = Page(html_of(data))

    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img"}
    assert all(text in page.text for text in HOSTILE)
    assert "<b>run" in page.text


def test_hostile_text_does_not_leave_its_block_of_markdown(tmp_path):
    data = load_report_data(make_run(tmp_path / "run", texts=HOSTILE))

    markdown = render_markdown(data, [])

    blocks = re.findall(r"^(`{3,})text\n(.*?)\n\1$", markdown, flags=re.DOTALL | re.MULTILINE)
    assert f"{PROMPTS[2]}{HOSTILE[2]}" in [text for _, text in blocks]
    outside = re.sub(r"^(`{3,})text\n.*?\n\1$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    assert "heading" not in outside
    assert "alert" not in outside


@pytest.mark.parametrize(
    "stretches",
    [
        [],
        [Stretch(0, None)],
        [Stretch(0, None), Stretch(0, None)],
        [Stretch(10, None)],
        [Stretch(10, "failed", "the loss is nan")],
    ],
    ids=["never started", "just started", "started twice", "one line", "failed early"],
)
def test_a_run_that_has_hardly_begun_has_a_report(tmp_path, stretches):
    run = make_run(tmp_path / "run", stretches=stretches, has_facts=False)

    write_report(run)

    Page((tmp_path / "run" / "report.html").read_text())


def test_numbers_that_were_not_finite_are_left_out(tmp_path):
    run = make_run(tmp_path / "run")
    path = tmp_path / "run/attempts/000001/metrics.jsonl"
    path.write_text(
        re.sub(r'"(loss|grad_norm|val_loss|mfu)": [\d.e-]+', r'"\1": null', path.read_text())
    )

    write_report(run)

    text = Page((tmp_path / "run" / "report.html").read_text()).text
    assert not re.search(r"\b(nan|none|null|inf)\b", text.lower())


def test_the_headline_says_every_number_with_its_unit(tmp_path):
    data = load_report_data(make_run(tmp_path / "run", usd_per_hour=36.0))

    tiles = {tile.label: (tile.value, tile.note) for tile in headline(data)}

    assert tiles == {
        "Parameters": ("4.46M", "4,459,264; 4 layers of width 256"),
        "Tokens seen": ("3.28M", "400 steps of 8,192"),
        "Validation loss": ("3.025", "nats per token; perplexity 20.6"),
        "Bits per byte": ("1.283", "of held-out text"),
        "Bigram baseline": ("4.102", "nats per token; the model is 1.077 better"),
        "Time": ("7m36s", "of training"),
        "Speed": ("7.19K", "tokens per second on 2 CPU cores"),
        "MFU": ("31.0%", "of the peak; standard convention (causal: 29.3%)"),
        "Cost": ("$4.56", "from the machines' boot on"),
    }


def test_a_model_worse_than_the_bigram_is_called_worse(tmp_path):
    data = load_report_data(make_run(tmp_path / "run"))
    weak = replace(data, baseline=replace(data.baseline, nats_per_token=2.0))

    notes = {tile.label: tile.note for tile in headline(weak)}

    assert notes["Bigram baseline"] == "nats per token; the model is 1.025 worse"


def test_paid_stands_beside_predicted(tmp_path):
    data = load_report_data(make_run(tmp_path / "run", usd_per_hour=36.0))

    tiles = headline(replace(data, predicted_usd=Interval(4.0, 4.2, 4.4)))

    assert (tiles[-1].label, tiles[-1].value, tiles[-1].note) == (
        "Cost",
        "$4.56",
        "paid $4.56, predicted $4.20 ($4.00 to $4.40): +9%, outside the 80 % interval",
    )


@pytest.mark.parametrize(
    ("stretches", "sentence"),
    [
        ([Stretch(400, "finished", "all 400 steps are done")], "All 400 steps are done."),
        ([Stretch(130, "stopped", "SIGTERM")], "At step 130 of 400 (32%): SIGTERM."),
        ([Stretch(130, None)], "At step 130 of 400 (32%)."),
        ([Stretch(0, None)], "Just begun: 400 steps to go."),
    ],
)
def test_the_state_is_told_in_a_sentence(tmp_path, stretches, sentence):
    data = load_report_data(make_run(tmp_path / "run", stretches=stretches))

    assert status_sentence(data) == sentence


def test_samples_stand_by_prompt_the_last_first():
    samples = [
        {"step": step, "tokens": step * 1000, "prompt": prompt, "text": f" at {step}"}
        for step in (10, 20)
        for prompt in ("A", "B")
    ]

    groups = group_samples(samples)

    assert [group.prompt for group in groups] == ["A", "B"]
    assert groups[0].texts == (
        ("step 20, 20K tokens", " at 20"),
        ("step 10, 10K tokens", " at 10"),
    )


def test_of_many_samples_the_first_the_last_and_some_between_are_shown():
    samples = [
        {"step": step, "tokens": step, "prompt": "A", "text": str(step)} for step in range(1, 101)
    ]

    (group,) = group_samples(samples)

    assert [text for _, text in group.texts] == ["100", "80", "60", "41", "21", "1"]


def test_a_stage_may_add_sections(tmp_path):
    data = load_report_data(make_run(tmp_path / "run"))
    more = replace(data, sections=(*data.sections, Section("Mixture", (("alpaca", "40 %"),))))

    page, markdown = Page(html_of(more)), render_markdown(more, [])

    assert "Mixture" in page.text
    assert "## Mixture" in markdown
    assert "| alpaca | 40 % |" in markdown


def test_secrets_of_the_settings_are_not_shown(tmp_path):
    data = load_report_data(
        make_run(tmp_path / "run", overrides=["data.source=https://me:s3cret@host.test/a.parquet"])
    )

    assert "s3cret" not in html_of(data)
    assert "s3cret" not in render_markdown(data, [])


def test_the_markdown_shows_the_pictures_beside_it(written):
    text = (written / "report.md").read_text()

    names = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert len(names) == 4
    assert all((written / name).is_file() for name in names)


def test_every_picture_is_described_for_those_who_do_not_see_it(written):
    page = Page((written / "report.html").read_text())

    labels = [attributes["aria-label"] for _, attributes in page.tags if "aria-label" in attributes]
    assert len(labels) == 8
    assert labels[0].startswith("Training loss over the tokens: from ")
