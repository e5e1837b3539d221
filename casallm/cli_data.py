"""`casallm data` and `casallm tokenizer`: what is in a data set, and how text is split."""

import json
from pathlib import Path
from typing import Annotated

import typer

from casallm.cli_output import AsJson, new_table, print_json, print_table
from casallm.errors import ConfigError

data_app = typer.Typer(no_args_is_help=True, help="Look into a data set.", rich_markup_mode=None)
tokenizer_app = typer.Typer(
    no_args_is_help=True, help="Train or try a tokenizer.", rich_markup_mode=None
)

KEPT_EXAMPLES, DROPPED_EXAMPLES = 5, 20
"""How many conversations a preview shows."""


@data_app.command("show")
def data_show(
    directory: Annotated[Path, typer.Argument(help="A directory of shards.")],
    *,
    as_json: AsJson = False,
) -> None:
    """Splits, tokens, documents, lengths, bytes a token, and the beginnings of documents."""
    from casallm.data.summary import describe_dataset

    summary = describe_dataset(directory)
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
def data_verify(
    directory: Annotated[Path, typer.Argument(help="A directory of shards.")],
) -> None:
    """Hash every shard and count its documents; ends with 1 if one is not what it was."""
    from casallm.data.shards import verify_dataset

    problems = verify_dataset(directory)
    print("\n".join(problems) or f"{directory}: every shard is whole")
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
        html.write_text(preview_html(found.rows, found.tokenizer, title=found.name), "utf-8")
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
    data: Annotated[str, typer.Option(help="builtin, a file, a directory or a glob.")] = "builtin",
    text_column: Annotated[str, typer.Option(help="Column or field with the text.")] = "text",
    vocab_size: Annotated[str, typer.Option(help="Ids, special tokens included.")] = "40960",
) -> None:
    """Train a byte-level BPE vocabulary on documents."""
    from casallm.data.prepare import train_on_source
    from casallm.data.sources import open_source
    from casallm.units import parse_count

    source = open_source(data, text_column=text_column)
    tokenizer = train_on_source(source, parse_count(vocab_size, what="vocab-size"))
    tokenizer.save(out)
    print(f"{out} holds {tokenizer.vocab_size:,} ids, fingerprint {tokenizer.fingerprint[:12]}")


@tokenizer_app.command("show")
def tokenizer_show(
    name: Annotated[str, typer.Argument(help="A directory, gpt2 or cl100k.")],
    *,
    text: Annotated[str, typer.Option(help="What to split.")] = "Hello, world!",
    as_json: AsJson = False,
) -> None:
    """Show how a vocabulary splits a text."""
    from casallm.data.summary import split_into_tokens
    from casallm.data.tokenizer import TokenizerConfig, build_tokenizer

    tokenizer = build_tokenizer(TokenizerConfig(name=name))
    if tokenizer is None:
        raise ConfigError("a vocabulary is needed: name its directory, gpt2 or cl100k")
    pieces = split_into_tokens(tokenizer, text)
    if as_json:
        print_json([{"id": token, "text": piece} for token, piece in pieces])
        return
    print(f"{tokenizer.name}, {tokenizer.vocab_size:,} ids: {len(pieces)} tokens")
    for token, piece in pieces:
        print(f"{token:>8}  {piece!r}")
