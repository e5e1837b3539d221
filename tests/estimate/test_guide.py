"""README and guide against the program: tables, dollars, JSON keys and variables as documented.

Everything is computed from the snapshot and on its day, so that neither the date nor a price list
of whoever runs the tests matters. Where a table differs, the failure shows what to paste.
"""

import re
from pathlib import Path

import pytest

from casallm.estimate.answer import format_table, to_json
from casallm.estimate.architecture import shape_for_params
from casallm.estimate.estimator import Estimate, EstimateRequest, estimate
from casallm.estimate.prices import load_snapshot

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
GUIDE = (ROOT / "docs/guides/estimate.md").read_text("utf-8")


@pytest.fixture(scope="module")
def answer() -> Estimate:
    """`make estimate-cost PARAMS=1.2B` with the price list in the package."""
    config = shape_for_params(1_200_000_000)
    return estimate(EstimateRequest(config=config, tokens=24 * 10**9, prices=load_snapshot()))


@pytest.fixture(scope="module")
def text(answer: Estimate) -> str:
    return format_table(answer, width=100, today=answer.prices.as_of)


def block_of(page: str) -> str:
    """The example's output: the block that begins with the model."""
    found = re.search(r"```\n(1\.2B parameters on .*?)\n```", page, re.DOTALL)
    assert found
    return found[1]


def table_under(heading: str) -> set[str]:
    """The names in the first column of the table after `heading`."""
    rows = GUIDE.split(heading, 1)[1].split("\n\n", 2)[1]
    return set(re.findall(r"^\| `([^`]+)` \|", rows, re.MULTILINE))


def test_the_readme_shows_what_the_program_prints(text: str):
    assert block_of(README) == text, f"paste this into README.md:\n{text}"


def test_the_guide_shows_lines_that_the_program_prints(text: str):
    lines, place = text.split("\n"), -1

    for line in block_of(GUIDE).split("\n"):
        if line.strip() in ("", "…"):
            continue
        assert line in lines, f"not printed: {line}\ntake lines from:\n{text}"
        assert lines.index(line) > place
        place = lines.index(line)


def test_the_guides_answer_to_old_articles_has_the_programs_figures(text: str):
    told = " ".join(GUIDE.split('## "A 1.2B model', 1)[1].split("\n## ", 1)[0].split())
    printed = " ".join(text.split())

    figures = re.findall(r"\$[\d,.]*\d(?!,\d)", told)
    assert len(figures) > 4
    for figure in figures:
        if figure != "$1,500":
            assert figure in printed or figure[1:] in printed, f"{figure} is not in\n{text}"
    (share,) = re.findall(r"(\d+) % that are prudent", told)
    assert f"{share}% MFU expected here" in printed


def test_every_json_key_is_documented_and_no_other(answer: Estimate):
    tree = to_json(answer)

    assert table_under("`--json` prints one object") == tree.keys()
    for offer in tree["offers"]:
        assert table_under("Each of `offers`") == offer.keys()


def test_every_item_of_a_bill_is_documented_and_no_other(answer: Estimate):
    items = {name for offer in to_json(answer)["offers"] for name in offer["items"]}

    assert table_under("The `items`") == items
