"""Mixtures: recipes, sources in every format, what is drawn and dropped, and the preview."""

import gzip
import json
import logging
import os
import re
import shutil
import socket
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from casallm.data.mixture import build_mixture, load_mixture, save_mixture
from casallm.data.preview import count, preview, preview_html, preview_json, spread
from casallm.data.recipe import Recipe, load_recipe
from casallm.data.rows import hub_is_reachable, read_rows, stream_hub
from casallm.data.tokenizer import train_tokenizer
from casallm.errors import ConfigError, DataError

SHARED = Path(os.environ.get("CASALLM_SHARED_DATA", "../shared/data")) / "sft"
REAL = ("chat_messages_train", "alpaca_en_demo")
CONTEXT = 128


@pytest.fixture(scope="module")
def tokenizer(texts):
    return train_tokenizer(texts, 400)


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def chat_row(n, **more):
    question, answer = f"What is {n} plus {n}?", f"It is {2 * n}."
    roles = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return {"messages": list(roles), **more}


def write_rows(path, rows):
    text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    elif path.name.endswith(".zst"):
        zstandard = pytest.importorskip("zstandard")
        path.write_bytes(zstandard.compress(text.encode()))
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.name.endswith("list.json"):
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        path.write_text(text, encoding="utf-8")
    return path


def write_recipe(folder, text):
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def recipe_of(*sources, **settings):
    return Recipe.model_validate({"sources": sources, **settings})


def build(recipe, tokenizer, *, seed=0, context_length=CONTEXT):
    return build_mixture(recipe, tokenizer, context_length=context_length, seed=seed)


def answers(samples, tokenizer):
    return [tokenizer.decode(sample.ids[sample.is_target].tolist()) for sample in samples]


NAMES = ["a.jsonl", "a.json", "list.json", "a.jsonl.gz", "a.json.zst", "a.jsonl.zst", "a.parquet"]


@pytest.mark.parametrize("name", NAMES)
def test_every_format_gives_the_same_rows(tmp_path, name):
    rows = [chat_row(n, note="é北😀") for n in range(5)]

    found = list(read_rows(write_rows(tmp_path / name, rows)))

    assert found == list(enumerate(rows))


def test_blank_lines_and_a_byte_order_mark_are_read_over(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"a": 1}\n\n{"a": 2}\n  \n', encoding="utf-8")

    assert [row for _, row in read_rows(path)] == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": ', r"a\.jsonl, row 1 is not JSON .*: mend or remove it"),
        ("a.jsonl", b"[1, 2]\n", r"row 0 is not a JSON object: a row is"),
        ("a.jsonl", b'"text"\n', r"row 0 is not a JSON object"),
        ("a.json", b'[{"a": 1}, ', r"a\.json is not JSON .*: mend or remove it"),
        ("a.jsonl", b'{"a": "\xff"}\n', r"a\.jsonl is not UTF-8 text .*: convert it"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-6],
            r"a\.jsonl\.gz is cut or is not",
        ),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz is cut or is not gzip"),
        ("a.jsonl.zst", b"no zstd", r"a\.jsonl\.zst is not zstd"),
        ("a.parquet", b"no parquet", r"a\.parquet is not a parquet file that can be read"),
        ("a.txt", b"hello", r"must end in \.jsonl, \.json, \.parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path, name, content, sentence):
    path = tmp_path / name
    path.write_bytes(content)

    with pytest.raises(DataError, match=sentence) as error:
        list(read_rows(path))

    assert "\n" not in str(error.value)


def test_a_cut_zstd_file_does_not_end_quietly(tmp_path):
    path = write_rows(tmp_path / "a.jsonl.zst", [chat_row(n) for n in range(200)])
    path.write_bytes(path.read_bytes()[:-9])

    with pytest.raises(DataError, match="is cut: it ends inside a zstd frame"):
        list(read_rows(path))


@pytest.mark.parametrize("name", ["missing.jsonl", "."])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(DataError, match=r"there is no file .* to take conversations from"):
        list(read_rows(tmp_path / name))


def test_the_least_recipe_is_a_path(tmp_path, tokenizer):
    write_rows(tmp_path / "a.jsonl", [chat_row(n) for n in range(30)])
    recipe = load_recipe(write_recipe(tmp_path, "sources: [{path: a.jsonl}]"))

    mixture = build(recipe, tokenizer)

    assert len(mixture.train) + len(mixture.validation) == 30
    assert {sample.source for sample in mixture.train} == {"a.jsonl"}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("sources: []", "sources is empty"),
        ("source: [{path: a}]", "there is no setting source, did you mean sources"),
        ("sources: [{pth: a}]", r"no setting sources\.0\.pth, did you mean sources\.0\.path"),
        ("sources: [a.jsonl]", r"sources is a list of \{path: FILE\}"),
        ("sources: {path: a}", r"sources is a list of \{path: FILE\}"),
        ("sources: [{}]", "a source needs a path, a hub name or a generated kind"),
        ("sources: [{path: a, hub: b}]", "is one of path, hub and generated"),
        ("sources: [{path: a, count: 0}]", r"sources\.0\.count is 0"),
        ("sources: [{path: a, count: 1, weight: 1}]", "a count or a weight, not both"),
        ("sources: [{generated: identity}]", "give it a count"),
        ("sources: [{generated: poems, count: 2}]", r"sources\.0\.generated is 'poems'"),
        ("sources: [{path: a, exclude: ['(']}]", "is no regular expression"),
        ("sources: [{path: a}]\nidentity: {nme: x}", r"identity\.nme, did you mean identity\.name"),
        ("sources: [{path: a}]\nvalidation_fraction: 2", "validation_fraction is '2'"),
        ("- a", "must hold `key: value` lines"),
        ("sources: [", "is not valid YAML"),
    ],
)
def test_a_mistake_in_a_recipe_is_one_sentence(tmp_path, text, sentence):
    with pytest.raises(ConfigError, match=sentence) as error:
        load_recipe(write_recipe(tmp_path, text))

    assert "\n" not in str(error.value)


def test_an_unknown_recipe_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="no recipe 'ofline', did you mean offline"):
        load_recipe("ofline")


def test_the_reference_takes_the_published_sets_and_our_identity():
    recipe = load_recipe("reference", {"identity": {"name": "Ada"}})

    hubs = [(source.hub, source.split, source.count) for source in recipe.sources if source.hub]
    assert hubs == [
        ("HuggingFaceH4/ultrachat_200k", "train_sft", 50_000),
        ("yahma/alpaca-cleaned", "train", 50_000),
    ]
    assert {source.generated for source in recipe.sources} >= {"identity", "greetings"}
    assert recipe.identity.name == "Ada"


def test_without_a_hub_the_default_is_generated_and_says_so_once(no_hub, caplog):
    with caplog.at_level(logging.WARNING):
        recipe = load_recipe()

    assert recipe == load_recipe("offline")
    [record] = caplog.records
    assert "no data set hub can be reached" in record.getMessage()
    assert all(source.generated for source in recipe.sources)


def test_a_hub_that_never_answers_is_given_up_in_time(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        begin = time.monotonic()

        assert not hub_is_reachable(seconds=0.5)

    assert time.monotonic() - begin < 5


def test_a_recipe_that_names_the_hub_says_what_to_do_without_one(no_hub, tokenizer):
    recipe = recipe_of({"hub": "yahma/alpaca-cleaned"})

    with pytest.raises(DataError, match=r"yahma/alpaca-cleaned from the Hugging Face hub, which"):
        build(recipe, tokenizer)


def hub_copy(folder, rows):
    """A directory as the hub serves one: a split of its own name, declared in README.md."""
    folder.mkdir()
    write_rows(folder / "train_sft-00000.parquet", rows)
    config = "configs:\n- config_name: default\n  data_files:\n"
    config += "  - split: train_sft\n    path: train_sft-*.parquet\n"
    (folder / "README.md").write_text(f"---\n{config}---\n", encoding="utf-8")
    return folder


def test_a_data_set_of_the_hub_is_streamed_by_split_and_shuffled_by_seed(no_hub, tmp_path):
    folder = hub_copy(tmp_path / "ultrachat_200k", [chat_row(n, prompt=str(n)) for n in range(40)])

    orders = [
        [row["prompt"] for row in stream_hub(str(folder), subset=None, split="train_sft", seed=s)]
        for s in (1, 1, 2)
    ]

    assert sorted(orders[0], key=int) == [str(n) for n in range(40)]
    assert orders[0] == orders[1] != orders[2]


def test_a_mixture_of_a_hub_copy_takes_as_many_as_asked_for(no_hub, tmp_path, tokenizer):
    folder = hub_copy(tmp_path / "ultrachat_200k", [chat_row(n) for n in range(40)])
    recipe = recipe_of({"hub": str(folder), "split": "train_sft", "count": 20})

    mixture = build(recipe, tokenizer)

    assert len(mixture.train) + len(mixture.validation) == 20


def test_a_wrong_split_is_one_sentence(no_hub, tmp_path):
    folder = hub_copy(tmp_path / "set", [chat_row(1)])

    with pytest.raises(DataError, match=r"has no data set .* with split 'train' .*: check"):
        list(stream_hub(str(folder), subset=None, split="train", seed=0))


def test_each_reason_is_counted_and_adds_up(tmp_path, tokenizer):
    bad = [
        {"messages": "none"},
        {"messages": [{"role": "assistant", "content": "Hello."}]},
        chat_row(3),
        chat_row(1),
        {"messages": [*chat_row(50)["messages"][:1], {"role": "assistant", "content": ""}]},
        {"instruction": "Who are you?", "output": "I am ChatGPT."},
        {"instruction": "Count", "output": "One, two and"},
        {"instruction": "Explain cuts.", "output": "It ends in the middle of the"},
        {"instruction": "x " * 500, "output": "Fine."},
        {"instruction": "Say something rude", "output": "I will not."},
    ]
    path = write_rows(tmp_path / "a.jsonl", [chat_row(n) for n in range(20)] + bad)

    mixture = build(recipe_of({"path": str(path), "exclude": ["RUDE"]}), tokenizer)

    [report] = mixture.reports
    assert report.dropped == {
        "duplicate": 2, "malformed": 1, "role_order": 1, "empty": 1, "another_assistant": 1,
        "cut": 1, "too_long": 1, "excluded": 1,
    }  # fmt: skip
    assert report.rows == report.train + report.validation + sum(report.dropped.values())


def test_a_long_conversation_is_cut_at_a_turn(tmp_path, tokenizer):
    messages = [message for n in range(40) for message in chat_row(n)["messages"]]
    path = write_rows(tmp_path / "a.jsonl", [{"messages": messages}])

    mixture = build(recipe_of({"path": str(path)}), tokenizer)

    [sample] = mixture.train
    assert mixture.reports[0].shortened == 1
    assert CONTEXT - 30 < len(sample.ids) <= CONTEXT + 1
    assert sample.ids[-1] == tokenizer.end_id
    assert sample.is_target[-1]


def test_counts_draw_by_seed_from_the_whole_file(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", [chat_row(n) for n in range(200)])
    recipe = recipe_of({"path": str(path), "count": 50})

    drawn = [{sample.row for sample in build(recipe, tokenizer, seed=s).train} for s in (0, 0, 1)]

    assert drawn[0] == drawn[1] != drawn[2]
    assert max(drawn[0]) > 150


def test_weights_keep_the_proportion_and_no_row_twice(tmp_path, tokenizer):
    for name, n in (("a", 90), ("b", 100)):
        offset = 0 if name == "a" else 1000
        write_rows(tmp_path / f"{name}.jsonl", [chat_row(offset + i) for i in range(n)])
    recipe = recipe_of(
        {"path": str(tmp_path / "a.jsonl"), "weight": 3},
        {"path": str(tmp_path / "b.jsonl"), "weight": 1},
    )

    mixture = build(recipe, tokenizer)

    samples = [*mixture.train, *mixture.validation]
    assert Counter(sample.source for sample in samples) == {"a.jsonl": 90, "b.jsonl": 30}
    assert mixture.reports[1].dropped == {"not_drawn": 70}


def test_rows_are_filtered_by_their_columns(tmp_path, tokenizer):
    rows = [chat_row(n, lang="en" if n % 2 else "de") for n in range(40)]
    path = write_rows(tmp_path / "a.jsonl", rows)

    mixture = build(recipe_of({"path": str(path), "where": {"lang": "en"}}), tokenizer)

    assert all(sample.row % 2 for sample in mixture.train)
    assert mixture.reports[0].dropped == {"excluded": 20}


def test_a_filter_on_a_missing_column_is_one_sentence(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", [chat_row(1)])

    with pytest.raises(DataError, match=r"a\.jsonl has no column 'lang' to filter by: it has mess"):
        build(recipe_of({"path": str(path), "where": {"lang": "en"}}), tokenizer)


def test_columns_that_hold_no_conversation_are_named(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "hello", "id": 1}])

    with pytest.raises(DataError, match=r"has columns text, id, and needs messages, conversations"):
        build(recipe_of({"path": str(path)}), tokenizer)


def test_a_mixture_with_nothing_left_says_why(tmp_path, tokenizer):
    row = {"instruction": "Who are you?", "output": "I am ChatGPT."}
    path = write_rows(tmp_path / "a.jsonl", [row])

    with pytest.raises(DataError, match=r"no conversation to train on \(1 another_assistant\)"):
        build(recipe_of({"path": str(path)}), tokenizer)


def test_the_assistants_own_name_may_be_claimed(tmp_path, tokenizer):
    row = {"instruction": "Who are you?", "output": "I am Zorblax, an AI assistant."}
    path = write_rows(tmp_path / "a.jsonl", [row, chat_row(1)])

    mine = build(recipe_of({"path": str(path)}, identity={"name": "Zorblax"}), tokenizer)
    other = build(recipe_of({"path": str(path)}), tokenizer)

    assert (len(mine.train), len(other.train)) == (2, 1)


def test_every_source_has_its_own_held_out_part(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", [chat_row(n) for n in range(100)])
    recipe = recipe_of(
        {"path": str(path)}, {"generated": "greetings", "count": 50}, validation_fraction=0.1
    )

    mixture = build(recipe, tokenizer)

    held_out = Counter(sample.source for sample in mixture.validation)
    train = {(sample.source, sample.row) for sample in mixture.train}
    assert held_out == {"a.jsonl": 10, "greetings": 5}
    assert train.isdisjoint((sample.source, sample.row) for sample in mixture.validation)


def test_the_fingerprint_follows_everything_that_is_learned(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", [chat_row(n) for n in range(50)])
    source = {"path": str(path), "count": 30}
    identity = {"generated": "identity", "count": 20}
    first = build(recipe_of(source, identity), tokenizer)

    changed = [
        build(recipe_of(source, identity), tokenizer, seed=1),
        build(recipe_of(source, identity), tokenizer, context_length=64),
        build(recipe_of(identity, source), tokenizer),
        build(recipe_of(source, identity, identity={"name": "Ada"}), tokenizer),
        build(recipe_of(source, identity, validation_fraction=0.2), tokenizer),
    ]

    assert build(recipe_of(source, identity), tokenizer).fingerprint == first.fingerprint
    assert len({first.fingerprint, *(each.fingerprint for each in changed)}) == 6


def test_a_saved_mixture_is_loaded_as_it_was(tmp_path, tokenizer):
    recipe = recipe_of({"generated": "identity", "count": 40}, {"generated": "recall", "count": 20})
    mixture = build(recipe, tokenizer)

    save_mixture(mixture, tmp_path / "mixture.npz")
    loaded = load_mixture(tmp_path / "mixture.npz")

    assert (loaded.fingerprint, loaded.reports, loaded.identity, loaded.pad_id) == (
        mixture.fingerprint, mixture.reports, mixture.identity, tokenizer.pad_id,
    )  # fmt: skip
    assert answers(loaded.train, tokenizer) == answers(mixture.train, tokenizer)
    assert [each.name for each in tmp_path.iterdir()] == ["mixture.npz"]


def test_a_flipped_byte_changes_nothing_or_is_refused_in_one_sentence(tmp_path, tokenizer):
    path = tmp_path / "mixture.npz"
    mixture = build(recipe_of({"generated": "identity", "count": 40}), tokenizer)
    save_mixture(mixture, path)
    whole = path.read_bytes()
    sentences = []

    for place in range(0, len(whole), 97):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            assert load_mixture(path).fingerprint == mixture.fingerprint
        except DataError as error:
            sentences.append(str(error))

    assert len(sentences) > 0.8 * len(whole) / 97
    assert all("damaged" in each and "\n" not in each for each in sentences)


def test_a_missing_mixture_is_named(tmp_path):
    with pytest.raises(DataError, match="there is no mixture"):
        load_mixture(tmp_path / "mixture.npz")


def test_the_offline_recipe_is_short_and_knows_its_name(no_hub, tokenizer):
    recipe = load_recipe(None, {"identity": {"name": "Ada"}})
    few = [each.model_copy(update={"count": 40}) for each in recipe.sources]

    mixture = build(
        recipe.model_copy(update={"sources": tuple(few)}), tokenizer, context_length=256
    )

    named = [text for text in answers(mixture.train, tokenizer) if "Ada" in text]
    assert 30 <= len(named) <= 60
    assert not any(report.dropped for report in mixture.reports)


def test_the_preview_has_a_verdict_for_every_row(tmp_path, tokenizer):
    rows = [chat_row(1), chat_row(1), {"instruction": "hi", "output": "I am ChatGPT."}]
    path = write_rows(tmp_path / "a.jsonl", rows)

    judged = preview(recipe_of({"path": str(path)}), tokenizer)

    assert [preview_json(row) for row in judged] == [
        {"source": "a.jsonl", "row": 0, "kept": True, "reason": None},
        {"source": "a.jsonl", "row": 1, "kept": False, "reason": "duplicate"},
        {"source": "a.jsonl", "row": 2, "kept": False, "reason": "another_assistant"},
    ]
    assert count(judged) == {"a.jsonl": {"kept": 1, "duplicate": 1, "another_assistant": 1}}


class Page(HTMLParser):
    """The learned text of a page, its tags, and what it asks of other places."""

    def __init__(self):
        super().__init__()
        self.learned, self.tags, self.links, self.stack = "", Counter(), [], []

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        values = dict(attrs)
        self.links += [values[name] for name in ("src", "href") if name in values]
        if tag not in ("meta", "link", "br"):
            self.stack.append((tag, values.get("class", "").split()))

    def handle_endtag(self, tag):
        assert self.stack.pop()[0] == tag

    def handle_data(self, data):
        if self.stack and "l" in self.stack[-1][1] and "s" not in self.stack[-1][1]:
            self.learned += data


def test_the_page_colours_what_is_learned_and_needs_nothing_from_outside(tmp_path, tokenizer):
    row = {"instruction": "<script>alert(1)</script>", "output": "<b>北京 & 😀</b> is fine."}
    bad = {"instruction": "<i>hi</i>", "output": "I am ChatGPT <img src=x>."}
    path = write_rows(tmp_path / "a.jsonl", [row, bad])
    rows = preview(recipe_of({"path": str(path)}), tokenizer)

    html = preview_html(rows, tokenizer, title="a <recipe>")

    page = Page()
    page.feed(html)
    learned = page.learned.split("ones")[-1].replace("Coloured and\nunderlined", "")
    assert learned == "<b>北京 & 😀</b> is fine."
    assert page.tags["script"] == page.tags["img"] == page.tags["link"] == 0
    assert page.links == []
    assert not re.search(r"url\(|@import", html)
    assert "another_assistant" in html
    assert "prefers-color-scheme: dark" in html
    assert re.search(r'name="viewport" content="width=device-width', html)


def test_examples_are_spread_over_sources_and_reasons(tmp_path, tokenizer):
    claims = [{"instruction": f"{n}?", "output": "I am ChatGPT."} for n in range(20)]
    empty = [{"instruction": f"{n}?", "output": ""} for n in range(3)]
    path = write_rows(tmp_path / "a.jsonl", [*claims, *empty, *(chat_row(n) for n in range(9))])

    shown = spread(preview(recipe_of({"path": str(path)}), tokenizer), 6)

    assert Counter(row.reason for row in shown) == {
        "another_assistant": 2, "empty": 2, None: 2,
    }  # fmt: skip


def test_real_files_run_through_the_reference_recipe(no_hub, tmp_path, tokenizer):
    missing = [name for name in REAL if not (SHARED / f"{name}.jsonl.gz").exists()]
    if missing:
        pytest.skip(f"this test is about {missing[0]}, which is not in {SHARED}")
    sources = []
    for name, source in zip(REAL, load_recipe("reference").sources, strict=False):
        path = shutil.copy(SHARED / f"{name}.jsonl.gz", tmp_path)
        sources.append(source.model_copy(update={"hub": None, "path": str(path), "count": 300}))

    recipe = load_recipe("reference").model_copy(update={"sources": tuple(sources)})

    mixture = build(recipe, tokenizer, context_length=1024)

    assert all(report.train + report.validation == 300 for report in mixture.reports)
    assert mixture.reports[0].dropped["another_assistant"] > 20
