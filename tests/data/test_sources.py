import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from casallm.data import sources
from casallm.data.sources import DataConfig, open_source, plan_units
from casallm.errors import DataError
from tests.data.conftest import write_documents


def lay_out(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_documents(folder / name, [f"a document in {name}"])
    return folder


def names_of(source):
    return [file.name for file in source.files]


def test_a_directory_is_searched_to_the_bottom_in_order(tmp_path):
    folder = lay_out(tmp_path / "d", "b.jsonl", "a.jsonl", "deep/c.jsonl", ".hidden/x.jsonl")
    (folder / "README.md").write_text("not a document")

    assert names_of(open_source(str(folder))) == ["a.jsonl", "b.jsonl", "deep/c.jsonl"]


def test_a_file_and_a_glob_are_sources(tmp_path):
    folder = lay_out(tmp_path / "d", "a1.jsonl", "a2.jsonl", "b.jsonl")

    assert names_of(open_source(str(folder / "b.jsonl"))) == ["b.jsonl"]
    assert names_of(open_source(f"{folder}/a*.jsonl")) == ["a1.jsonl", "a2.jsonl"]


@pytest.mark.parametrize(
    "held_out", ["val-0.jsonl", "val.jsonl", "validation-00000-of-1.jsonl", "Valid_x.jsonl"]
)
def test_files_named_for_validation_are_the_held_out_part(tmp_path, held_out):
    folder = lay_out(tmp_path / "d", "train-0.jsonl", "values.jsonl", held_out)

    splits = {file.name: file.split for file in open_source(str(folder)).files}

    assert splits == {"train-0.jsonl": "train", "values.jsonl": "train", held_out: "val"}


def test_a_source_of_validation_files_alone_is_split_by_hash(tmp_path):
    folder = lay_out(tmp_path / "d", "val-0.jsonl", "val-1.jsonl")

    assert {file.split for file in open_source(str(folder)).files} == {None}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nothing", "there is no file or directory '{}/nothing', and as a glob it matches nothing"),
        ("x*.jsonl", "there is no file or directory '{}/x*.jsonl', and as a glob it matches"),
        ("empty", "{}/empty holds no documents: no file in it ends in .parquet, .jsonl"),
        ("a.doc", "{}/a.doc is no file of documents: its name must end in .parquet"),
        ("blank.txt", "{}/blank.txt is empty, and so is all of the source"),
    ],
)
def test_what_holds_no_documents_is_one_sentence(tmp_path, name, says):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.doc").write_text("x")
    (tmp_path / "blank.txt").touch()

    with pytest.raises(DataError) as caught:
        open_source(str(tmp_path / name))

    assert str(caught.value).startswith(says.format(tmp_path))


def test_other_files_in_a_directory_are_said_aloud(tmp_path, caplog):
    folder = lay_out(tmp_path / "d", "a.jsonl")
    (folder / "notes.md").write_text("x")

    open_source(str(folder))

    assert "1 files that end in none of" in caplog.text


def test_the_fingerprint_follows_the_content_and_not_the_place(tmp_path):
    folder = lay_out(tmp_path / "d", "a.jsonl", "b.jsonl")
    before = open_source(str(folder)).identity["fingerprint"]
    elsewhere = shutil.copytree(folder, tmp_path / "elsewhere")

    assert open_source(str(elsewhere)).identity["fingerprint"] == before
    assert open_source(str(folder), text_column="x").identity["fingerprint"] != before
    (folder / "a.jsonl").rename(folder / "c.jsonl")
    assert open_source(str(folder)).identity["fingerprint"] != before
    raw = bytearray((elsewhere / "a.jsonl").read_bytes())
    raw[-5] ^= 1
    (elsewhere / "a.jsonl").write_bytes(raw)
    assert open_source(str(elsewhere)).identity["fingerprint"] != before


def test_the_fingerprint_of_a_large_file_is_sampled(tmp_path):
    path = tmp_path / "a.txt"
    with path.open("wb") as file:
        file.truncate(400_000_000)
    before = open_source(str(path)).identity["fingerprint"]

    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")

    assert open_source(str(path)).identity["fingerprint"] != before


def test_the_identity_names_no_place(tmp_path):
    identity = open_source(str(lay_out(tmp_path / "books", "a.jsonl"))).identity

    assert identity["name"] == "books"
    assert str(tmp_path) not in str(identity)


def test_large_files_are_cut_and_small_ones_gathered(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "UNIT_BYTES", 100)
    sizes = {"a.txt": 250, "b.txt": 30, "c.txt": 30, "d.jsonl": 30, "e.txt": 90}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(b"x" * size)

    units = open_source(str(tmp_path)).units(tmp_path)

    found = {
        unit.name: [(piece.path.name, piece.start, piece.stop) for piece in unit.pieces]
        for unit in units
    }
    assert found == {
        "f00000p0000": [("a.txt", 0, 100)],
        "f00000p0001": [("a.txt", 100, 200)],
        "f00000p0002": [("a.txt", 200, 250), ("b.txt", 0, 30)],
        "f00002p0000": [("c.txt", 0, 30), ("d.jsonl", 0, 30)],
        "f00004p0000": [("e.txt", 0, 90)],
    }


def test_a_unit_never_mixes_splits(tmp_path):
    folder = lay_out(tmp_path / "d", "a.jsonl", "b.jsonl", "val-a.jsonl", "z.jsonl")

    units = open_source(str(folder)).units(tmp_path)

    assert [(unit.split, len(unit.pieces)) for unit in units] == [
        ("train", 2),
        ("val", 1),
        ("train", 1),
    ]


def test_parquet_is_cut_between_row_groups(tmp_path, monkeypatch, texts):
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"text": texts, "n": list(range(len(texts)))}),
        path,
        row_group_size=50,
        use_dictionary=False,
    )
    one = sum(len(text.encode()) + 4 for text in texts[:50])
    monkeypatch.setattr(sources, "UNIT_BYTES", 3 * one)

    units = plan_units(open_source(str(path)).files, "text")

    pieces = [piece for unit in units for piece in unit.pieces]
    assert pieces[0].start == 0
    assert pieces[-1].stop == 8
    assert [a.stop for a in pieces[:-1]] == [b.start for b in pieces[1:]]
    assert 2 <= len(pieces) <= 4
    text_bytes = sum(len(text.encode()) for text in texts)
    assert sum(piece.text_bytes for piece in pieces) == pytest.approx(text_bytes, rel=0.1)


def test_a_compressed_file_is_never_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "UNIT_BYTES", 100)
    (tmp_path / "a.jsonl.gz").write_bytes(b"x" * 1000)

    (unit,) = open_source(str(tmp_path)).units(tmp_path)

    assert (unit.pieces[0].start, unit.pieces[0].stop) == (0, 1000)


def test_the_built_in_corpus_is_the_default():
    assert DataConfig().source == "builtin"
    assert open_source("builtin").identity["name"] == "builtin"
