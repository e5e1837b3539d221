"""How the command line prints its answers: JSON, or tables that fit the terminal."""

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def print_json(value: Any) -> None:
    """Print one JSON value over several lines."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def new_table(*headings: str) -> "Table":
    """An empty table without lines."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading)
    return table


def print_table(table: "Table") -> None:
    """Print a table as wide as the terminal, or 160 columns into a file."""
    from rich.console import Console

    is_terminal = sys.stdout.isatty()
    Console(width=None if is_terminal else 160).print(table)
