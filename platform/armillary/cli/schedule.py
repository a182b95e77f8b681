"""``armillary schedule``: regression jobs on cron lines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from armillary.regression.schedule import Scheduled

app = typer.Typer(help="Run regression jobs on cron lines.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="print JSON")]


@app.command()
def add(files: Annotated[list[Path], typer.Argument(help="regression job files with a schedule")]) -> None:
    """Put regression jobs on the schedule, or move them to a changed cron line."""
    from armillary.cli.console import out
    from armillary.cli.regress import clock

    for row in _add(files):
        out.print(f"{row.name}: {row.cron}, next {clock(row.next_run)}", markup=False)


@app.command("list")
def list_(json: Json = False) -> None:
    """Show what is scheduled: cron line, next run, last verdict."""
    from armillary.cli.console import out, print_json, print_table, table
    from armillary.cli.regress import clock
    from armillary.regression.schedule import rows

    scheduled = rows()
    if json:
        print_json([row.model_dump(mode="json") for row in scheduled])
        return
    if not scheduled:
        out.print("nothing is scheduled; add a job with: armillary schedule add FILE", markup=False)
        return
    cells = [
        (
            row.name,
            row.cron,
            clock(row.next_run),
            clock(row.last.time if row.last else None),
            f"{row.last.verdict} ({row.last.event})" if row.last else "-",
            row.file,
        )
        for row in scheduled
    ]
    print_table(table(["name", "cron", "next run", "last run", "last verdict", "file"], cells))


@app.command()
def remove(name: Annotated[str, typer.Argument(help="the regression's name")]) -> None:
    """Take a regression off the schedule; its results and history stay."""
    from armillary.cli.console import out
    from armillary.regression import schedule

    schedule.remove(name)
    out.print(f"{name} is off the schedule", markup=False)


@app.command()
def up(files: Annotated[list[Path] | None, typer.Argument(help="job files to add first")] = None) -> None:
    """Run the scheduler in the foreground until Ctrl-C or SIGTERM."""
    from armillary.cli.console import print_note
    from armillary.cli.regress import clock
    from armillary.regression import schedule

    # The cron line lives in the job file: files edited since they were added are read again.
    _add([*(files or []), *(Path(row.file) for row in schedule.rows() if Path(row.file).is_file())])
    scheduled = schedule.rows()

    def announce() -> None:
        for row in scheduled:
            print_note(f"{row.name}: next {clock(row.next_run)}")
        print_note(f"scheduler up with {len(scheduled)} jobs, log files in {schedule.schedule_dir() / 'logs'}")

    schedule.up(announce)
    print_note("scheduler stopped")


def _add(files: list[Path]) -> list[Scheduled]:
    from armillary.cli.regress import load_regression
    from armillary.regression import schedule
    from armillary.spec.files import find

    # All files are read and checked before the first is stored: one wrong file changes nothing.
    jobs = [(find("jobs", file), load_regression(file)) for file in files]
    for path, job in jobs:
        schedule.check_line(path, job)
    return [schedule.add(path, job) for path, job in jobs]
