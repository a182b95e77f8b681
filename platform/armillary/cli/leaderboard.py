"""``armillary leaderboard``: rank configurations by a metric, with uncertainty."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import Annotated

import typer

app = typer.Typer(add_completion=False)


class Format(StrEnum):
    """How to print."""

    table = "table"
    md = "md"
    csv = "csv"
    json = "json"
    latex = "latex"


@app.command()
def leaderboard(
    metric: Annotated[str, typer.Option(help="What ranks, e.g. verification/tar_at_far_1e-2.")] = "verification/auc",
    format: Annotated[Format, typer.Option(help="How to print.")] = Format.table,
    dataset: Annotated[str | None, typer.Option(help="Only runs on this dataset.")] = None,
    group: Annotated[str | None, typer.Option(help="Only runs of this sweep, study or regression (kind/name).")] = None,
    trials: Annotated[bool, typer.Option("--trials", help="Show the trials of sweeps too.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows a dataset.")] = None,
    uri: Annotated[str | None, typer.Option(help="MLflow store; the default is the one in the Armillary home.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
) -> None:
    """Rank configurations: mean over seeds and folds, 95% interval, and what cannot be told apart from the best."""
    from armillary.cli.console import page, print_note
    from armillary.tracking import format as formats
    from armillary.tracking.query import leaderboard as query

    boards, report = query(metric, uri=uri, dataset=dataset, group=group, trials=trials, limit=limit)
    for run_id, reason in list(report.failed.items())[:3]:
        print_note(f"{run_id} is not in MLflow yet: {reason}")
    if len(report.failed) > 3:
        print_note(f"and {len(report.failed) - 3} more; 'armillary track sync' tries again")
    chosen = Format.json if json_ else format
    if chosen is Format.table:
        console = page()
        console.print(formats.as_table(boards, console.width))
        return
    write = {
        Format.md: formats.as_markdown,
        Format.csv: formats.as_csv,
        Format.json: formats.as_json,
        Format.latex: formats.as_latex,
    }[chosen]
    sys.stdout.write(write(boards))
