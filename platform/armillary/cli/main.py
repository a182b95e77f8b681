"""The entry point: a table of commands, each loaded when used, and the one place that turns errors into exit codes.

Exit codes: 0 ok, 1 the work failed, 2 the user's mistake, 130 interrupted.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from armillary import __version__


class Entry(NamedTuple):
    """A command of the table: where its ``typer.Typer`` lives (``module:attribute``) and its line in ``--help``."""

    target: str
    help: str


# To add a command group: write armillary/cli/<group>.py with `app = typer.Typer(help=...)` and add its line here.
# A Typer with exactly one command and no callback is that command itself (`armillary run JOB`).
COMMANDS: dict[str, Entry] = {
    "demo": Entry("armillary.cli.demo:app", "Sweep, compare and rank on real faces in a few minutes."),
    "run": Entry("armillary.cli.run:app", "Train a job."),
    "sweep": Entry("armillary.cli.sweep:app", "Search a job's hyperparameters."),
    "evaluate": Entry("armillary.cli.evaluate:app", "Judge a finished run, or a file of embeddings and labels."),
    "clean": Entry("armillary.cli.clean:app", "Drop wrongly labelled images by a trained run's sub-centers."),
    "invert": Entry("armillary.cli.invert:app", "Draw what a trained network remembers of an identity."),
    "attention": Entry("armillary.cli.attention:app", "Compare where a transformer looks with where the person is."),
    "leaderboard": Entry("armillary.cli.leaderboard:app", "Rank configurations: mean, interval, seeds."),
    "track": Entry("armillary.cli.track:app", "Send runs to MLflow, and open its pages."),
    "submit": Entry("armillary.cli.submit:app", "Run a job on a cluster."),
    "jobs": Entry("armillary.cli.jobs:app", "List, follow and stop what was submitted."),
    "regress": Entry("armillary.cli.regress:app", "Run regression jobs and compare them with their baseline."),
    "schedule": Entry("armillary.cli.schedule:app", "Run regression jobs on cron lines."),
    "objectives": Entry("armillary.cli.objectives:app", "List objectives and show what they need."),
    "data": Entry("armillary.cli.data:app", "List, import and inspect datasets."),
    "schema": Entry("armillary.cli.schema:app", "Print the JSON Schema of job files, for editors."),
    "doctor": Entry("armillary.cli.doctor:app", "Check versions, devices, memory, disk and the cluster."),
}


class LazyCommand(TyperCommand):
    """Stands in for a command in listings; its module is imported when the command is used."""

    def __init__(self, name: str, entry: Entry) -> None:
        super().__init__(name, help=entry.help)
        self.target = entry.target

    def load(self) -> Any:
        """The real command, with its own options and subcommands."""
        module, attribute = self.target.split(":")
        command = get_command(getattr(importlib.import_module(module), attribute))
        command.name = self.name
        # Completion is installed once, for the whole program.
        command.params = [p for p in command.params if p.name not in ("install_completion", "show_completion")]
        return command

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Parses with the real command, whose context carries on from there."""
        return self.load().make_context(info_name, args, parent=parent, **extra)


class LazyGroup(TyperGroup):
    """The root command: its subcommands come from :data:`COMMANDS`, its errors become messages and exit codes."""

    def __init__(self, *, commands: object = None, **attributes: Any) -> None:
        super().__init__(commands={name: LazyCommand(name, entry) for name, entry in COMMANDS.items()}, **attributes)

    def invoke(self, ctx: Any) -> Any:
        """Runs the chosen command.

        Raises:
            typer.Exit: with the exit code of a failure, after its message was printed.
        """
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, typer.TyperException, BrokenPipeError):
            raise
        except KeyboardInterrupt as interruption:
            from armillary.cli.console import err

            err.print(f"\ninterrupted. {interruption}".rstrip(), markup=False, soft_wrap=True)
            raise typer.Exit(130) from None
        except Exception as error:  # noqa: BLE001 - the last handler: every failure gets one line and an exit code
            raise typer.Exit(_report(error, debug=bool(ctx.params.get("debug")))) from None


def _report(error: Exception, *, debug: bool) -> int:
    """Prints a failure and returns the exit code it deserves."""
    from armillary.cli.console import err, print_error
    from armillary.spec.errors import UserError, WorkFailed

    # Ray wraps what a worker raises; the user's mistake is then the cause.
    cause: BaseException | None = error
    while cause is not None:
        inner = getattr(cause, "cause", None)
        if isinstance(cause, UserError) and not isinstance(inner, UserError):
            if debug:
                traceback.print_exception(error)
            print_error(cause)
            return 2
        cause = inner if isinstance(inner, BaseException) else cause.__cause__
    if isinstance(error, WorkFailed):
        err.print(str(error), style="red", markup=False, soft_wrap=True)
        return 1
    if debug:
        traceback.print_exception(error)
        place = ""
    else:
        place = f"\n  traceback: {_write_traceback(error)} (or repeat with --debug)"
    summary = str(error).strip().splitlines()
    line = f"internal error: {type(error).__name__}" + (f": {summary[0]}" if summary else "")
    err.print(line + place, style="red", markup=False, soft_wrap=True)
    return 1


def _write_traceback(error: Exception) -> Path:
    from armillary.spec.home import home

    text = f"command: {' '.join(sys.argv)}\n\n" + "".join(traceback.format_exception(error))
    name = f"{time.strftime('%Y%m%d-%H%M%S')}.log"
    folder = home() / "errors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / name
        path.write_text(text)
    except OSError:
        # The state folder may be what failed: a full or read-only disk.
        path = Path(tempfile.gettempdir()) / f"armillary-{name}"
        path.write_text(text)
    return path


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"armillary {__version__}")
        raise typer.Exit


app = typer.Typer(cls=LazyGroup, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Train, sweep, rank, schedule and submit any embedding objective."""


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line (``sys.argv`` unless told otherwise) and exits the process."""
    get_command(app).main(arguments, prog_name="armillary")


if __name__ == "__main__":
    main()
