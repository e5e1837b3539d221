import gzip
import json
from importlib.metadata import version

import pytest

from casallm.data import builtin
from casallm.data.builtin import builtin_identity, split_of, strip_markup, write_builtin
from casallm.errors import DataError

LONG = "This sentence about {} is long enough to be kept as a line of prose in the corpus."


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The corpus of the botocore that is installed, by split."""
    directory = tmp_path_factory.mktemp("builtin")
    write_builtin(directory)
    return {
        split: [json.loads(line)["text"] for line in (directory / f"{split}.jsonl").open("rb")]
        for split in ("train", "val")
    }


def a_model(name):
    """A service of one operation whose input holds a list of structures."""
    return {
        "documentation": f"<p>{LONG.format(name)}</p>",
        "operations": {
            "Run": {
                "documentation": f"<p>{LONG.format('run')}</p>",
                "input": {"shape": "RunRequest"},
            }
        },
        "shapes": {
            "RunRequest": {"members": {"Tags": {"shape": "Tags", "documentation": LONG}}},
            "Tags": {"member": {"shape": "Tag"}},
            "Tag": {"documentation": LONG.format("tag"), "members": {"Again": {"shape": "Tag"}}},
            "Lone": {"documentation": f"<p>{LONG.format('lone')}</p><p>Short.</p>"},
        },
    }


@pytest.fixture
def fake_models(tmp_path, monkeypatch):
    """Models of sixty services, two of them with an older version."""
    for i in range(60):
        versions = ("2019-01-01", "2024-01-01") if i < 2 else ("2024-01-01",)
        for each in versions:
            path = tmp_path / f"service{i}" / each / "service-2.json.gz"
            path.parent.mkdir(parents=True)
            text = json.dumps(a_model(f"service{i}" if each == versions[-1] else "the old version"))
            path.write_bytes(gzip.compress(text.encode()))
    monkeypatch.setattr(builtin, "_botocore", lambda: (tmp_path, "1.0"))
    return tmp_path


def test_the_corpus_has_the_size_and_parts_that_it_is_said_to_have(corpus):
    n_bytes = {split: sum(len(t.encode()) for t in texts) for split, texts in corpus.items()}

    assert 15e6 < sum(n_bytes.values()) < 40e6
    assert 0.03 < n_bytes["val"] / sum(n_bytes.values()) < 0.10
    assert len(corpus["train"]) > 10_000
    assert len(corpus["val"]) > 500


def test_no_line_of_the_corpus_occurs_twice_in_either_part(corpus):
    lines = [line for texts in corpus.values() for text in texts for line in text.split("\n")]

    assert len(lines) == len(set(lines))
    assert min(map(len, lines)) >= 60


def test_the_corpus_is_free_of_markup(corpus):
    texts = [*corpus["train"], *corpus["val"]]

    marked = [text for text in texts if any(tag in text for tag in ("<p>", "</", "<li>", "&lt;p"))]

    assert len(marked) < len(texts) / 500  # examples of markup in the documentation itself


def test_an_operation_brings_all_that_it_takes_and_nothing_comes_twice(fake_models, tmp_path):
    write_builtin(tmp_path / "out")

    lines = [
        json.loads(line)["text"]
        for split in ("train", "val")
        for line in (tmp_path / "out" / f"{split}.jsonl").read_text().splitlines()
    ]
    run = "\n".join((LONG.format("run"), LONG, LONG.format("tag")))
    assert sorted(lines) == sorted(
        [run, LONG.format("lone"), *(LONG.format(f"service{i}") for i in range(60))]
    )


def test_services_are_held_out_whole(fake_models, tmp_path):
    write_builtin(tmp_path / "out")

    held_out = (tmp_path / "out" / "val.jsonl").read_text()

    for i in range(60):
        assert (f"about service{i} is" in held_out) == (split_of(f"service{i}") == "val")


def test_the_identity_names_the_version_and_follows_the_models(fake_models):
    before = builtin_identity()
    path = next(fake_models.glob("service7/*/service-2.json.gz"))

    path.write_bytes(path.read_bytes() + b" ")

    assert before["botocore"] == "1.0"
    assert builtin_identity()["sha256"] != before["sha256"]


def test_the_identity_of_the_installed_models_names_their_version():
    assert builtin_identity()["botocore"] == version("botocore")


def test_a_botocore_without_models_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(builtin, "_botocore", lambda: (tmp_path, "9.9"))

    with pytest.raises(DataError, match=r"botocore 9\.9 in .* holds no documentation"):
        write_builtin(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("markup", "lines"),
    [
        (f"<p>{LONG}</p><p>Too short.</p>", [LONG]),
        (f"<ul><li> <p>{LONG}</p> </li><li>{LONG} 2</li></ul>", [LONG, f"{LONG} 2"]),
        (f"{LONG[:19]}<b>\n  {LONG[20:40]}</b>{LONG[40:]}", [LONG]),
        (f"a &lt; b &amp; <code>c</code> &gt; d {LONG}", [f"a < b & c > d {LONG}"]),
        (f"{LONG} if x < 3 or <i>y</i> >= 4", [f"{LONG} if x < 3 or y >= 4"]),
        (f"<!-- {LONG} -->{LONG}<br/>", [LONG]),
        ("", []),
    ],
)
def test_markup_is_stripped_to_lines_of_prose(markup, lines):
    assert strip_markup(markup) == lines
