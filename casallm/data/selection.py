"""Which rows of a recipe's sources are learned: each is read, judged, and drawn or not.

A row is judged on its own (`cleaning`), by the source's filters, against the rows before it
(`duplicates`), and for its length in tokens (cut at a turn where it is too long). Conversations
that we generate are not judged, only cut. What is taken depends on the recipe, the seed, the
tokenizer and the context length alone.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from casallm.data.cleaning import DropReason, find_defect
from casallm.data.conversation import (
    Conversation,
    Rendered,
    cut_at_turn,
    has_conversation_columns,
    parse_row,
    render,
)
from casallm.data.corpus_questions import corpus_is_installed
from casallm.data.duplicates import DuplicateFilter
from casallm.data.exercises import GENERATORS, everyday
from casallm.data.identity import distinct, generate_greetings, generate_identity
from casallm.data.recipe import IdentityConfig, Recipe, SourceConfig
from casallm.data.rows import Row, hub_is_reachable, read_rows, stream_hub
from casallm.data.tokenizer import Tokenizer
from casallm.errors import DataError, MissingExtraError

logger = logging.getLogger(__name__)

REPORT_EVERY = 10_000
"""Rows of a source after which a notice says how far it is."""

Reason = DropReason | Literal["shortened", "not_drawn"]


@dataclass(slots=True)
class JudgedRow:
    """A row of a source and whether it is learned."""

    source: str
    row: int
    messages: Conversation
    reason: Reason | None = None
    """Why it is not learned, or `shortened`; None: learned as it is."""
    evidence: str = ""
    rendered: Rendered | None = None
    """Its tokens, where it is learned."""

    @property
    def kept(self) -> bool:
        """Whether it is learned, in whole or shortened."""
        return self.rendered is not None


def select(
    recipe: Recipe, tokenizer: Tokenizer, *, context_length: int, seed: int
) -> list[list[JudgedRow]]:
    """Every row that was looked at, by source in the recipe's order."""
    judge = _Judge(recipe.identity, tokenizer, context_length)
    selected = []
    for source in recipe.sources:
        rows = judge.judge(source, _read(source, recipe.identity, seed))
        selected.append(list(_take(rows, source)))
    _draw_by_weight(recipe.sources, selected, seed)
    return selected


def random_for(seed: int, purpose: str, place: int) -> np.random.Generator:
    """Random numbers of their own for one purpose and source."""
    return np.random.Generator(np.random.PCG64([seed, place, *purpose.encode()]))


@dataclass
class _Judge:
    """Judges rows one after the other, and remembers those that it has seen."""

    identity: IdentityConfig
    tokenizer: Tokenizer
    context_length: int

    def __post_init__(self) -> None:
        self._seen = DuplicateFilter()
        self._own_names = (self.identity.name, self.identity.maker)

    def judge(
        self, source: SourceConfig, rows: Iterator[tuple[int, Row | Conversation]]
    ) -> Iterator[JudgedRow]:
        """Each row with its verdict."""
        for number, row in rows:
            messages = parse_row(row) if isinstance(row, dict) else row
            judged = JudgedRow(source.name, number, messages or ())
            if messages is None:
                judged.reason, judged.evidence = "malformed", f"columns {', '.join(map(str, row))}"
            elif isinstance(row, dict):
                self._find_fault(judged, source, row)
            if judged.reason is None:
                self._fit(judged)
            yield judged

    def _find_fault(self, judged: JudgedRow, source: SourceConfig, row: Row) -> None:
        if any(str(row.get(column)) != value for column, value in source.where.items()):
            judged.reason, judged.evidence = "excluded", "where"
        elif defect := find_defect(judged.messages, self._own_names):
            judged.reason, judged.evidence = defect.reason, defect.evidence
        elif pattern := _first_found(source.exclude, judged.messages):
            judged.reason, judged.evidence = "excluded", pattern
        else:
            judged.reason = self._seen.check(judged.messages)

    def _fit(self, judged: JudgedRow) -> None:
        """Render what fits into a row of training: its last token is a target and no input."""
        whole = render(judged.messages, self.tokenizer)
        judged.rendered = cut_at_turn(whole, self.context_length + 1, self.tokenizer)
        if judged.rendered is None:
            judged.reason, judged.evidence = "too_long", f"{len(whole.ids):,} tokens"
        elif len(judged.rendered.ids) < len(whole.ids):
            judged.reason = "shortened"
            judged.evidence = f"{len(whole.ids):,} tokens cut to {len(judged.rendered.ids):,}"


def _read(
    source: SourceConfig, identity: IdentityConfig, seed: int
) -> Iterator[tuple[int, Row | Conversation]]:
    if source.generated:
        yield from enumerate(_generate(source, identity, seed))
        return
    for place, (number, row) in enumerate(_read_rows(source, seed)):
        if place == 0:
            _check_columns(row, source)
        yield number, row


def _read_rows(source: SourceConfig, seed: int) -> Iterator[tuple[int, Row]]:
    if source.hub is not None:
        _check_reachable(source.hub)
        stream = stream_hub(source.hub, subset=source.subset, split=source.split, seed=seed)
        return enumerate(stream)
    rows = read_rows(Path(str(source.path)))
    if source.count is None:
        return rows
    everything = list(rows)
    order = random_for(seed, "order", 0).permutation(len(everything)).tolist()
    return (everything[place] for place in order)


def _generate(source: SourceConfig, identity: IdentityConfig, seed: int) -> list[Conversation]:
    count = source.count or 0
    if source.generated == "identity":
        return generate_identity(identity, count, seed, ordinary=everyday)
    if source.generated == "greetings":
        return generate_greetings(identity, count, seed)
    if source.generated == "corpus" and not corpus_is_installed():
        raise MissingExtraError("botocore (questions about the built-in corpus need it)", "train")
    return distinct(GENERATORS[str(source.generated)], count, seed, str(source.generated))


def _check_reachable(hub: str) -> None:
    if not Path(hub).is_dir() and not hub_is_reachable():
        raise DataError(
            f"the recipe takes {hub} from the Hugging Face hub, which cannot be reached: give it a"
            " `path` to a downloaded file, or use the recipe `offline`"
        )


def _check_columns(row: Row, source: SourceConfig) -> None:
    missing = [column for column in source.where if column not in row]
    if missing:
        raise DataError(
            f"{source.name} has no column {missing[0]!r} to filter by: it has {', '.join(row)}"
        )
    if not has_conversation_columns(row):
        raise DataError(
            f"{source.name} holds no conversations that can be read: it has columns"
            f" {', '.join(row)}, and needs messages, conversations, or instruction and output"
        )


def _take(rows: Iterator[JudgedRow], source: SourceConfig) -> Iterator[JudgedRow]:
    """`rows` until as many as the source's count are kept; says now and then how far it is."""
    n_kept = 0
    for n_rows, row in enumerate(rows, 1):
        yield row
        n_kept += row.kept
        if n_rows % REPORT_EVERY == 0:
            logger.info("%s: %s conversations kept of %s", source.name, n_kept, n_rows)
        if n_kept == source.count:
            return


def _draw_by_weight(
    sources: Sequence[SourceConfig], selected: Sequence[list[JudgedRow]], seed: int
) -> None:
    """Of the sources with a weight, keep as many as fit the proportion, drawn by `seed`."""
    weighted = [place for place, source in enumerate(sources) if source.weight is not None]
    kept = {place: [row for row in selected[place] if row.kept] for place in weighted}
    shares = [len(kept[place]) / (sources[place].weight or 1.0) for place in weighted]
    for place in weighted:
        n_drawn = int(min(shares) * (sources[place].weight or 1.0) + 1e-9)
        order = random_for(seed, "weight", place).permutation(len(kept[place]))
        for each in order[n_drawn:].tolist():
            kept[place][each].rendered, kept[place][each].reason = None, "not_drawn"


def _first_found(patterns: Sequence[str], messages: Conversation) -> str | None:
    for pattern in patterns:
        if any(re.search(pattern, message.content, re.IGNORECASE) for message in messages):
            return pattern
    return None
