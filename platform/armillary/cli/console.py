"""What every command prints through: results on standard output, everything about the run on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from armillary.spec.errors import UserError

# A pipe has no width of its own; rich would cut tables at 80 columns, and a program could not read what is left.
_PIPE_WIDTH = 1000

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

Justify = Literal["left", "right", "center"]
LEFT: Justify = "left"


def print_json(value: Any) -> None:
    """Prints a value as indented JSON for programs, without colour; what JSON lacks (paths, dates) becomes text."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def table(
    columns: Sequence[str | tuple[str, Justify]], rows: Iterable[Sequence[object]], *, title: str | None = None
) -> Table:
    """A table in the house style.

    Args:
        columns: headings, or pairs of heading and justification.
        rows: one sequence per row; ``None`` prints as an empty cell, ``Text`` keeps its style, the rest is plain text.
        title: printed above.
    """
    result = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    result.show_header = any(column if isinstance(column, str) else column[0] for column in columns)
    for column in columns:
        heading, justify = column if isinstance(column, tuple) else (column, LEFT)
        result.add_column(heading, justify=justify, overflow="fold")
    for row in rows:
        result.add_row(*("" if cell is None else cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return result


def number(value: float | None) -> str:
    """A measured value: four decimals, or three digits where those would print as nothing."""
    if value is None:
        return "-"
    return f"{value:.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.2e}"


def page() -> Console:
    """Where results go: standard output, as wide as the terminal; into a pipe or file, uncut."""
    return out if out.is_terminal else Console(highlight=False, width=_PIPE_WIDTH)


def print_table(value: Table) -> None:
    """Prints a table of results, its title on a line of its own."""
    console = page()
    if value.title:
        # Rich would fold it to the width of the table.
        console.print(value.title, style="italic", markup=False, soft_wrap=True)
        value.title = None
    console.print(value)


def print_error(error: UserError) -> None:
    """Prints a user's mistake on standard error; nothing in it is taken for markup."""
    message = Text("error: ", style="bold red")
    message.append(str(error), style="default not bold")
    err.print(message, soft_wrap=True)


def print_note(message: str) -> None:
    """Prints a line about the work itself on standard error, so that standard output stays the result."""
    err.print(Text(message, style="dim"), soft_wrap=True)
