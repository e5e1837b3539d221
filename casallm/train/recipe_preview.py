"""A recipe as some run would learn from it: every row judged, before anything is trained."""

import logging
import sys
from dataclasses import dataclass

from casallm.data.preview import preview
from casallm.data.recipe import Recipe, default_recipe, load_recipe
from casallm.data.selection import JudgedRow
from casallm.data.tokenizer import MIN_VOCAB_SIZE, Tokenizer, train_tokenizer
from casallm.errors import DataError
from casallm.storage.store import open_store
from casallm.train.run import load_config
from casallm.train.run_place import RUNS, run_url
from casallm.train.trained import run_tokenizer

log = logging.getLogger(__name__)

OWN_VOCAB_SIZES = (8192, 2048, 512)
"""Tried in turn for a vocabulary of the recipe's own texts; short texts hold only small ones."""

MAX_EXAMPLE_CHARS = 300


@dataclass(frozen=True)
class RecipePreview:
    """Every row that was looked at, and the vocabulary by which its length was judged."""

    name: str
    rows: list[JudgedRow]
    tokenizer: Tokenizer


def preview_recipe(text: str | None, run: str | None = None) -> RecipePreview:
    """What a run that starts from `run` would learn of a recipe.

    By default the newest run under runs/; where there is none, the vocabulary is trained on the
    recipe's own texts.
    """
    name = text or default_recipe()
    recipe = load_recipe(name)
    if run is None and not any(RUNS.glob("*/attempts/*/attempt.json")):
        log.info("no run is here: judged with a vocabulary of the recipe's own texts")
        tokenizer = _own_tokenizer(recipe)
        return RecipePreview(name, preview(recipe, tokenizer), tokenizer)
    store = open_store(run_url(run))
    config, _ = load_config(store)
    tokenizer, context_length = run_tokenizer(store), config.train.context_length
    log.info("judged as %s would learn it: at most %d tokens", store.url, context_length)
    rows = preview(recipe, tokenizer, context_length=context_length, seed=config.train.seed)
    return RecipePreview(name, rows, tokenizer)


def example_text(row: JudgedRow) -> str:
    """One row as lines of text: where it is from, why it is left out, and what is said."""
    why = f" [{row.reason}: {row.evidence}]" if row.evidence else f" [{row.reason}]"
    head = f"{row.source}, row {row.row}{why if row.reason else ''}"
    turns = [f"  {message.role}: {_short(message.content)}" for message in row.messages]
    return "\n".join([head, *turns])


def _own_tokenizer(recipe: Recipe) -> Tokenizer:
    bytes_alone = train_tokenizer([], MIN_VOCAB_SIZE)
    rows = preview(recipe, bytes_alone, context_length=sys.maxsize - 1)
    texts = [message.content for row in rows for message in row.messages]
    for size in OWN_VOCAB_SIZES:
        try:
            return train_tokenizer(texts, size)
        except DataError:  # too few words for so many tokens
            continue
    return bytes_alone


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_EXAMPLE_CHARS else f"{line[:MAX_EXAMPLE_CHARS]}…"
