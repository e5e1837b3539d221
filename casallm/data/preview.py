"""A look at a recipe before it is trained on: what is learned, what is left out, and why.

`preview` judges every row; `count` and `preview_json` say what came of it; `preview_html` is one
page without anything from outside, in which a person sees the tokens and the loss mask.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from casallm.data.conversation import Rendered
from casallm.data.recipe import Recipe
from casallm.data.selection import JudgedRow, select
from casallm.data.tokenizer import Tokenizer

CONTEXT_LENGTH = 2048
"""The row length that a preview without a run judges by."""

MAX_CHARS = 1500
"""Of each message of a conversation that is left out, the page shows this much."""


def preview(
    recipe: Recipe, tokenizer: Tokenizer, *, context_length: int = CONTEXT_LENGTH, seed: int = 0
) -> list[JudgedRow]:
    """Every row that was looked at, in the order of the recipe's sources, with its verdict."""
    selected = select(recipe, tokenizer, context_length=context_length, seed=seed)
    return [row for rows in selected for row in rows]


def preview_json(row: JudgedRow) -> dict[str, Any]:
    """What `--json` prints of a row: `reason` is null for one that is learned as it is."""
    return {"source": row.source, "row": row.row, "kept": row.kept, "reason": row.reason}


def count(rows: Sequence[JudgedRow]) -> dict[str, Counter[str]]:
    """By source, how many rows were kept (as they are, or shortened) or left out, by reason."""
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        counts.setdefault(row.source, Counter())[row.reason or "kept"] += 1
    return counts


def preview_html(
    rows: Sequence[JudgedRow], tokenizer: Tokenizer, *, title: str, limit: int = 100
) -> str:
    """A page with up to `limit` conversations that are learned and as many that are left out."""
    kept = [row for row in rows if row.kept]
    dropped = [row for row in rows if not row.kept]
    shown_kept, shown_dropped = spread(kept, limit), spread(dropped, limit)
    page = (files("casallm.data") / "preview_page.html").read_text(encoding="utf-8")
    return Template(page).substitute(
        title=escape(title),
        table=_table(count(rows)),
        n_kept=f"{len(kept):,}",
        n_dropped=f"{len(dropped):,}",
        shown_kept=f"{len(shown_kept):,}",
        shown_dropped=f"{len(shown_dropped):,}",
        kept="\n".join(_kept_article(row, tokenizer) for row in shown_kept),
        dropped="\n".join(_dropped_article(row) for row in shown_dropped),
    )


def spread(rows: Sequence[JudgedRow], limit: int) -> list[JudgedRow]:
    """Up to `limit` rows, taken in turn from every source and reason, in their order."""
    turns: Counter[tuple[str, str | None]] = Counter()
    ranked = []
    for place, row in enumerate(rows):
        key = (row.source, row.reason)
        ranked.append((turns[key], place))
        turns[key] += 1
    return [rows[place] for _, place in sorted(sorted(ranked)[:limit], key=lambda each: each[1])]


def _table(counts: dict[str, Counter[str]]) -> str:
    reasons = sorted({reason for each in counts.values() for reason in each} - {"kept"})
    columns = ["kept", *reasons]
    head = "".join(f"<th>{escape(column)}</th>" for column in ("source", *columns))
    body = "".join(
        f"<tr><td>{escape(source)}</td>"
        + "".join(f'<td class="n">{each[column]:,}</td>' for column in columns)
        + "</tr>"
        for source, each in counts.items()
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _kept_article(row: JudgedRow, tokenizer: Tokenizer) -> str:
    note = f" · {escape(str(row.reason))}: {escape(row.evidence)}" if row.reason else ""
    assert row.rendered is not None
    tokens = "".join(_token_spans(row.rendered, tokenizer))
    return (
        f"<article><header>{escape(row.source)}, row {row.row}{note}</header>"
        f'<div class="text">{tokens}</div></article>'
    )


def _dropped_article(row: JudgedRow) -> str:
    messages = "".join(
        f'<div class="role">{escape(message.role)}</div>'
        f'<div class="words">{escape(message.content[:MAX_CHARS])}</div>'
        for message in row.messages
    )
    evidence = f": {escape(row.evidence)}" if row.evidence else ""
    return (
        f"<article><header>{escape(row.source)}, row {row.row} ·"
        f' <span class="why">{escape(str(row.reason))}{evidence}</span></header>'
        f"{messages}</article>"
    )


def _token_spans(rendered: Rendered, tokenizer: Tokenizer) -> Iterator[str]:
    """A box for each token; tokens that share a character share one."""
    names = {id_: name for name, id_ in tokenizer.special_ids.items()}
    waiting = b""
    for id_, is_target in zip(rendered.ids.tolist(), rendered.is_target.tolist(), strict=True):
        learned = "l" if is_target else ""
        if id_ in names:
            yield f'<span class="s {learned}">{escape(names[id_])}</span>'
            if id_ == tokenizer.end_id:
                yield "\n"
            continue
        waiting += tokenizer.decode_bytes([id_])
        try:
            text = waiting.decode("utf-8")
        except UnicodeDecodeError:
            continue
        waiting = b""
        yield f'<span class="{learned}">{escape(text)}</span>'
