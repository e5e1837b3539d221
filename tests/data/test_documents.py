import gzip
import itertools
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from casallm.data import documents
from casallm.data.documents import Oddities, Piece, format_of, read_documents
from casallm.errors import DataError


def whole(path):
    size = path.stat().st_size
    stop = pq.ParquetFile(path).num_row_groups if path.suffix == ".parquet" else size
    return Piece(path, format_of(path.name), 0, stop, size)


def read(path, text_column="text", oddities=None):
    return list(
        read_documents(whole(path), text_column=text_column, oddities=oddities or Oddities())
    )


def write(path, content):
    """Writes JSON lines as the path's name says."""
    raw = content if isinstance(content, bytes) else content.encode()
    if path.suffix == ".gz":
        raw = gzip.compress(raw)
    elif path.suffix == ".zst":
        raw = zstandard.compress(raw)
    path.write_bytes(raw)
    return path


def json_lines(texts):
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_every_format_gives_the_same_documents(tmp_path, texts, name):
    path = tmp_path / name
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"id": [1] * len(texts), "text": texts}), path, row_group_size=37)
    else:
        write(path, json_lines(texts))

    assert read(path) == texts


@pytest.mark.parametrize(
    "kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_every_kind_of_text_column_is_read(tmp_path, texts, kind):
    column = pa.array(texts).cast(kind)
    pq.write_table(pa.table({"content": column}), tmp_path / "a.parquet")

    assert read(tmp_path / "a.parquet", "content") == texts


@given(lengths=st.lists(st.integers(0, 30), max_size=30), cuts=st.lists(st.integers(0, 400)))
def test_pieces_that_tile_a_file_give_each_line_once(tmp_path_factory, lengths, cuts):
    texts = [f"{i}{'x' * n}" for i, n in enumerate(lengths)]
    path = write(tmp_path_factory.mktemp("tile") / "a.jsonl", json_lines(texts))
    size = path.stat().st_size
    bounds = sorted({0, size, *(cut % (size + 1) for cut in cuts)})

    pieces = [
        Piece(path, "jsonl", start, stop, stop - start)
        for start, stop in itertools.pairwise(bounds)
    ]

    found = [read_documents(piece, text_column="text", oddities=Oddities()) for piece in pieces]
    assert [text for documents in found for text in documents] == texts


def test_a_last_line_without_an_end_and_blank_lines_are_read(tmp_path):
    path = write(tmp_path / "a.jsonl", '\ufeff{"text": "a"}\r\n\n  \n{"text": "b"}')

    assert read(path) == ["a", "b"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_rows_without_text_are_counted_and_the_first_named(tmp_path, name):
    rows = [{"text": "a"}, {"text": None}, {"text": ""}, {"text": " \n"}, {"text": 3}, {"x": 1}]
    path = write(tmp_path / name, "".join(json.dumps(row) + "\n" for row in rows))
    oddities = Oddities()

    assert read(path, oddities=oddities) == ["a"]
    assert oddities.counts == {"left out, null": 2, "left out, empty": 2, "left out, not text": 1}
    assert oddities.examples == {
        "left out, null": f"{path}:2",
        "left out, empty": f"{path}:3",
        "left out, not text": f"{path}:5",
    }


@given(
    st.lists(st.text(st.characters(codec="utf-8")).filter(lambda text: text.strip())),
    st.booleans(),
)
def test_a_large_line_is_read_as_a_small_one(tmp_path_factory, texts, is_ascii):
    path = tmp_path_factory.getbasetemp() / "large.jsonl"
    rows = ({"é": 1, "text": text} for text in texts)
    path.write_text("".join(json.dumps(row, ensure_ascii=is_ascii) + "\n" for row in rows))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "LARGE_LINE_BYTES", 0)
        assert read(path) == texts


def test_a_large_line_that_is_not_utf8_or_not_json_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "LARGE_LINE_BYTES", 0)
    path = tmp_path / "a.jsonl"

    path.write_bytes(b'{"text": "a\xff"}\n')
    with pytest.raises(DataError, match=r"a.jsonl:1 is not UTF-8 \(byte 0xff at offset 1\)"):
        read(path)
    path.write_bytes(b'{"text": "a"}\n{"text\n')
    with pytest.raises(DataError, match=r"a.jsonl:2 is not JSON"):
        read(path)


def test_null_rows_of_a_parquet_file_are_counted(tmp_path):
    pq.write_table(pa.table({"text": ["a", None, "b"]}), tmp_path / "a.parquet")
    oddities = Oddities()

    assert read(tmp_path / "a.parquet", oddities=oddities) == ["a", "b"]
    assert oddities.counts == {"left out, null": 1}
    assert oddities.examples["left out, null"].endswith("a.parquet, row 1 of row group 0")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"text": "a"}\n{"text": ', ":2 is not JSON (Expecting value"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', ":2 is not UTF-8 (byte 0xff at offset 10): convert"),
        (b'{"text": "a"}\n["b"]\n', ":2 is not a JSON object"),
        (b"[" * 100_000, ":1 is not JSON"),
        (b'{"txt": "a", "url": "b"}\n', ":1 has no field 'text', did you mean txt? (fields: txt,"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(tmp_path, content, says):
    path = write(tmp_path / "a.jsonl", content)

    with pytest.raises(DataError) as caught:
        read(path)

    assert str(caught.value).startswith(f"{path}{says}")


def test_a_bad_line_of_a_later_piece_is_named_by_its_piece(tmp_path):
    path = write(tmp_path / "a.jsonl", json_lines(["a"] * 10) + "broken\n")
    piece = Piece(path, "jsonl", 100, path.stat().st_size, 100)

    with pytest.raises(DataError, match=r"a\.jsonl, line 6 after byte 100 is not JSON"):
        list(read_documents(piece, text_column="text", oddities=Oddities()))


@pytest.mark.parametrize(("name", "kind"), [("a.jsonl.gz", "gzip"), ("a.jsonl.zst", "zstd")])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_cut_compressed_file_is_an_error_and_not_an_end(tmp_path, texts, name, kind, share):
    path = write(tmp_path / name, json_lines(texts))
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * share)])

    with pytest.raises(DataError, match=f"{name} is cut or is not {kind}"):
        read(path)


@pytest.mark.parametrize(("name", "kind"), [("a.jsonl.gz", "gzip"), ("a.jsonl.zst", "zstd")])
def test_a_file_that_is_not_compressed_is_named(tmp_path, name, kind):
    (tmp_path / name).write_bytes(json_lines(["a"]).encode())

    with pytest.raises(DataError, match=f"{name} is cut or is not {kind}"):
        read(tmp_path / name)


def test_frames_written_one_after_the_other_are_all_read(tmp_path):
    parts = [json_lines(["a"] * 10_000).encode(), json_lines(["b"]).encode()]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(map(zstandard.compress, parts)))
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(map(gzip.compress, parts)))

    assert read(tmp_path / "a.jsonl.zst") == ["a"] * 10_000 + ["b"]
    assert read(tmp_path / "a.jsonl.gz") == ["a"] * 10_000 + ["b"]


def test_a_parquet_file_without_the_column_says_which_it_has(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"content": ["a"], "url": ["b"]}), path)

    with pytest.raises(DataError) as caught:
        read(path)

    assert str(caught.value) == (
        f"{path} has no column 'text', did you mean content? (columns: content, url): set"
        " data.text_column"
    )


def test_a_column_that_is_not_text_is_refused(tmp_path):
    pq.write_table(pa.table({"text": [b"a"]}), tmp_path / "a.parquet")

    with pytest.raises(DataError, match="has binary in column 'text', not text"):
        read(tmp_path / "a.parquet")


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    path = write(tmp_path / "a.parquet", b"PAR1" + b"x" * 100)

    with pytest.raises(DataError, match=r"a\.parquet is not a parquet file that can be read"):
        list(
            read_documents(Piece(path, "parquet", 0, 1, 9), text_column="text", oddities=Oddities())
        )


def test_a_corrupt_row_group_is_named(tmp_path, texts):
    path = tmp_path / "a.parquet"
    table = pa.table({"text": texts})
    pq.write_table(table, path, row_group_size=100, compression="zstd", use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(2).column(0)
    raw = bytearray(path.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    raw[middle : middle + 200] = bytes(200)
    path.write_bytes(raw)

    with pytest.raises(DataError, match=r"row group 2 of .*a\.parquet cannot be read after row"):
        read(path)


def test_text_in_parquet_that_is_no_utf8_is_named(tmp_path):
    broken = pa.array([b"fine", b"\xff\xfe"]).cast(pa.binary())
    column = pa.StringArray.from_buffers(2, *broken.buffers()[1:])
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")

    with pytest.raises(DataError, match=r"row group 0 of .* cannot be read"):
        read(tmp_path / "a.parquet")


def test_a_short_text_file_is_one_document(tmp_path):
    path = write(tmp_path / "a.txt", "\ufeffOne.\r\n\r\nTwo.\n")

    assert read(path) == ["One.\r\n\r\nTwo."]


def test_a_long_text_file_is_cut_at_blank_lines(tmp_path):
    paragraphs = [f"{i} " + "word " * 200 for i in range(50)]
    path = write(tmp_path / "a.txt", "\n\n".join(paragraphs))

    found = read(path)

    assert len(found) == 6
    assert "\n\n".join(found) == "\n\n".join(paragraphs)
    assert all(8 << 10 <= len(text) < 10 << 10 for text in found[:-1])


def test_a_long_text_file_without_blank_lines_is_cut_at_line_ends(tmp_path):
    lines = [f"{i} " + "word " * 20 for i in range(2000)]
    path = write(tmp_path / "a.txt", "\n".join(lines))

    found = read(path)

    assert len(found) == 4
    assert "\n".join(found) == "\n".join(lines)


def test_text_that_is_not_utf8_is_named_with_its_place(tmp_path):
    path = write(tmp_path / "a.txt", b"word\n" * 40_000 + b"caf\xe9\n")

    with pytest.raises(DataError) as caught:
        read(path)

    assert str(caught.value) == (
        f"{path} is not UTF-8 text (byte 0xe9 at offset 200003): convert it, or leave it out"
    )


def test_a_file_that_vanished_is_named(tmp_path):
    piece = Piece(tmp_path / "gone.txt", "txt", 0, 9, 9)

    with pytest.raises(DataError, match=r"gone\.txt cannot be read \(No such file"):
        list(read_documents(piece, text_column="text", oddities=Oddities()))
