"""`casallm prepare`, `data` and `tokenizer`: make data sets, look into them, split text."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from casallm.cli_output import AsJson, new_table, print_json, print_table
from casallm.errors import ConfigError

if TYPE_CHECKING:
    from casallm.data.summary import Compression

data_app = typer.Typer(no_args_is_help=True, help="Look into a data set.", rich_markup_mode=None)
tokenizer_app = typer.Typer(
    no_args_is_help=True, help="Train or try a tokenizer.", rich_markup_mode=None
)

TOKENIZER_HELP = "gpt2, cl100k, or a directory that holds a vocabulary."
COMPARED_BYTES = 10_000_000
"""Held-out text on which vocabularies are compared, at most."""

KEPT_EXAMPLES, DROPPED_EXAMPLES = 5, 20
"""How many conversations a preview shows."""


Place = Annotated[str, typer.Argument(help="A directory of shards, or its URL in a bucket.")]
Source = Annotated[
    str,
    typer.Option(
        help="builtin, fineweb-edu, climbmix, owner/name[:configuration][:split][:column] of the"
        " Hugging Face hub, or a file, directory, glob or URL."
    ),
]
TextColumn = Annotated[str, typer.Option(help="Column or field with the text.")]


def prepare_command(
    *,
    out: Annotated[str, typer.Option(help="Directory for the shards, or s3://BUCKET/NAME.")],
    data: Source = "builtin",
    text_column: TextColumn = "text",
    tokenizer: Annotated[
        str, typer.Option(help="trained, gpt2, cl100k or a directory that holds one.")
    ] = "trained",
    vocab_size: Annotated[
        str, typer.Option(help="Size of a trained vocabulary, special tokens included.")
    ] = "40960",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes. Default: one a core.")
    ] = None,
    node: Annotated[
        str | None,
        typer.Option(
            metavar="K/N",
            help="Do the K-th of N shares; N machines make one data set. Default: as SkyPilot"
            " numbers them, or alone.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done, and do nothing.")
    ] = False,
) -> None:
    """Turn documents into shards; the same command continues what was stopped."""
    from casallm.data.destination import destination_at
    from casallm.data.prepare import parse_node, prepare_share
    from casallm.data.progress import say_progress
    from casallm.data.sources import open_source
    from casallm.data.tokenizer import TokenizerConfig, build_tokenizer
    from casallm.units import parse_count

    place = parse_node(node, os.environ)
    source = open_source(data, text_column=text_column)
    n_ids = parse_count(vocab_size, what="vocab-size")
    chosen = build_tokenizer(TokenizerConfig(name=tokenizer))
    if dry_run:
        print(f"would prepare {data} into {out}: {json.dumps(source.identity)}")
        return
    manifest = prepare_share(
        source,
        destination_at(out),
        tokenizer=chosen,
        vocab_size=n_ids,
        workers=workers,
        node=place,
        on_progress=say_progress(),
    )
    if manifest is None:
        print(f"{out}: the share of node {place} is done; the last of the others completes it")
        return
    counts = ", ".join(f"{split}: {r.tokens:,} tokens" for split, r in manifest.splits.items())
    print(f"{out} holds {counts}")


@data_app.command("show")
def data_show(place: Place, *, as_json: AsJson = False) -> None:
    """Splits, tokens, documents, lengths, bytes a token, and the beginnings of documents."""
    from casallm.data.summary import describe_dataset

    summary = describe_dataset(_directory_of(place))
    if as_json:
        print_json(summary)
        return
    tokenizer = summary["tokenizer"]
    print(f"{summary['directory']}  (sha256 {summary['sha256'][:12]}, {summary['dtype']})")
    print(f"source     {json.dumps(summary['source'])}")
    print(f"tokenizer  {tokenizer['name']}, {tokenizer['vocab_size']:,} ids")
    table = new_table("split", "tokens", "documents", "shards", "bytes/token", "median", "longest")
    for split, each in summary["splits"].items():
        lengths = each["document_tokens"]
        table.add_row(
            split,
            f"{each['tokens']:,}",
            f"{each['documents']:,}",
            f"{each['shards']:,}",
            f"{each['bytes_per_token']:.2f}",
            f"{lengths['median']:,.0f}",
            f"{lengths['longest']:,}",
        )
    print_table(table)
    for split, each in summary["splits"].items():
        for text in each["samples"]:
            print(f"{split}: {' '.join(text.split())[:200]}")


@data_app.command("verify")
def data_verify(place: Place) -> None:
    """Hash every shard and count its documents; ends with 1 if one is not what it was."""
    from casallm.data.shards import verify_dataset

    problems = verify_dataset(_directory_of(place))
    print("\n".join(problems) or f"{place}: every shard is whole")
    raise typer.Exit(1 if problems else 0)


@data_app.command("preview")
def data_preview(
    recipe: Annotated[
        str | None,
        typer.Argument(help="A YAML file, reference or offline. Default: as `casallm sft`."),
    ] = None,
    *,
    run: Annotated[
        str | None,
        typer.Option(help="Judge lengths as this run would. Default: the newest under runs/."),
    ] = None,
    dropped: Annotated[
        bool, typer.Option("--dropped", help="Show what is left out instead of what is learned.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option(help="Write a page that shows tokens and loss masks.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON a row.")] = False,
) -> None:
    """What would be learned of a recipe's conversations, what is left out, and why."""
    from casallm.data.preview import count, preview_html, preview_json, spread
    from casallm.train.recipe_preview import example_text, preview_recipe

    found = preview_recipe(recipe, run)
    rows = [row for row in found.rows if not (dropped and row.kept)]
    if html is not None:
        page = preview_html(found.rows, found.tokenizer, title=found.name)
        try:
            html.write_text(page, "utf-8")
        except OSError as error:
            raise ConfigError(
                f"{html} cannot be written ({error.strerror}): name another"
            ) from None
        print(html)
        return
    if as_json:
        for row in rows:
            print(json.dumps(preview_json(row), ensure_ascii=False))
        return
    counts = count(found.rows)
    reasons = sorted({reason for each in counts.values() for reason in each} - {"kept"})
    table = new_table("source", "kept", *reasons)
    for source, each in counts.items():
        table.add_row(source, *(f"{each[reason]:,}" for reason in ("kept", *reasons)))
    print_table(table)
    shown = [row for row in rows if row.kept != dropped]
    for row in spread(shown, DROPPED_EXAMPLES if dropped else KEPT_EXAMPLES):
        print(f"\n{example_text(row)}")


@tokenizer_app.command("train")
def tokenizer_train(
    *,
    out: Annotated[Path, typer.Option(help="Directory for the vocabulary.")],
    data: Source = "builtin",
    text_column: TextColumn = "text",
    vocab_size: Annotated[str, typer.Option(help="Ids, special tokens included.")] = "40960",
) -> None:
    """Train a byte-level BPE vocabulary on documents."""
    from casallm.data.sources import open_source
    from casallm.data.vocabulary import train_on_source
    from casallm.units import parse_count

    source = open_source(data, text_column=text_column)
    tokenizer = train_on_source(source, parse_count(vocab_size, what="vocab-size"))
    tokenizer.save(out)
    print(f"{out} holds {tokenizer.vocab_size:,} ids, fingerprint {tokenizer.fingerprint[:12]}")


@tokenizer_app.command("show")
def tokenizer_show(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help=TOKENIZER_HELP)],
    *,
    text: Annotated[str, typer.Option(help="What to split.")] = "Hello, world!",
    data: Annotated[
        str | None,
        typer.Option(
            help="Instead: compare bytes a token on what is held out of this source. Default for"
            " several vocabularies: builtin."
        ),
    ] = None,
    text_column: TextColumn = "text",
    as_json: AsJson = False,
) -> None:
    """Show how vocabularies split a text, or compare them on held-out documents."""
    from casallm.data.summary import compare_tokenizers, split_into_tokens
    from casallm.data.tokenizer import require_tokenizer

    tokenizers = [require_tokenizer(name) for name in names]
    if data or len(names) > 1:
        compared = compare_tokenizers(_held_out(data or "builtin", text_column), tokenizers)
        _print_comparison(compared, as_json=as_json)
        return
    (tokenizer,) = tokenizers
    pieces = split_into_tokens(tokenizer, text)
    if as_json:
        print_json([{"id": token, "text": piece} for token, piece in pieces])
        return
    print(f"{tokenizer.name}, {tokenizer.vocab_size:,} ids: {len(pieces)} tokens")
    for token, piece in pieces:
        print(f"{token:>8}  {piece!r}")


def _print_comparison(compared: "list[Compression]", *, as_json: bool) -> None:
    if as_json:
        print_json([asdict(each) | {"bytes_per_token": each.bytes_per_token} for each in compared])
        return
    table = new_table("vocabulary", "ids", "tokens", "bytes of text", "bytes/token")
    for each in compared:
        counts = (f"{n:,}" for n in (each.vocab_size, each.tokens, each.bytes_of_text))
        table.add_row(each.name, *counts, f"{each.bytes_per_token:.3f}")
    print_table(table)


def _held_out(data: str, text_column: str) -> list[str]:
    """Documents that a preparation of `data` would hold out."""
    from casallm.data.sources import open_source
    from casallm.data.vocabulary import held_out_texts

    return held_out_texts(open_source(data, text_column=text_column), most_bytes=COMPARED_BYTES)


def _directory_of(place: str) -> Path:
    """The directory of shards that `place` is, or that stands for it on this machine."""
    from casallm.data.listing import is_bucket
    from casallm.data.mirror import mirror_dataset
    from casallm.data.sources import DataConfig

    limit_bytes = round(DataConfig().cache_gb * 1e9)
    return mirror_dataset(place, limit_bytes=limit_bytes) if is_bucket(place) else Path(place)
