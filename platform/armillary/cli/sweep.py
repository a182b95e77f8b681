"""``armillary sweep``: search a job's hyperparameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from armillary.cli.console import number, print_json, print_note, print_table, table
from armillary.spec.errors import UserError

if TYPE_CHECKING:
    from armillary.spec.jobs import SweepJob
    from armillary.sweeps.tuning import SweepResult

app = typer.Typer(help="Search a job's hyperparameters.", add_completion=False)


@app.command()
def sweep(
    job: Annotated[str | None, typer.Argument(help="A job file of kind sweep.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, e.g. trials=32 base.seed=1", show_default=False)
    ] = None,
    resume: Annotated[
        str | None, typer.Option(help="Go on with this sweep; 'last' takes the newest unfinished one.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Searches a space with Optuna under Ray Tune; every trial is a run in MLflow."""
    from armillary.spec.jobs import SweepJob
    from armillary.spec.loading import load_job
    from armillary.sweeps.tuning import find_sweep

    if resume is not None:
        if job is not None:
            raise UserError("--resume uses the sweep's own job; leave the file out")
        sweep_id, own = find_sweep(None if resume == "last" else resume)
        run_and_print(own, sweep_id, as_json)
        return
    if job is None:
        raise UserError("name a sweep job", hint="armillary sweep sweep_arcface, or armillary sweep --resume last")
    loaded = load_job(job, overrides or [])
    if not isinstance(loaded, SweepJob):
        raise UserError(f"{job} is a job of kind {loaded.kind!r}, not a sweep", hint=f"armillary run {job}")
    run_and_print(loaded, None, as_json)


def run_and_print(job: SweepJob, resume: str | None, as_json: bool) -> None:
    """Runs a sweep with a progress bar and prints its trials, best first."""
    from armillary.cli.progress import progress
    from armillary.sweeps.tuning import run_sweep
    from armillary.tracking.run import track_finished

    known: list[str] = []

    def started(sweep_id: str) -> None:
        known.append(sweep_id)
        print_note(f"sweep {sweep_id}: {job.trials} trials of {job.base.objective.name}, {job.concurrent} at a time")

    try:
        with progress(job.name, [job.base] * job.trials) as bar:
            result = run_sweep(job, resume=resume, on_start=started, on_report=bar.report, on_finish=track_finished)
    except KeyboardInterrupt:
        hint = f"Go on with: armillary sweep --resume {known[-1]}" if known else "Nothing was started."
        raise KeyboardInterrupt(hint) from None
    if as_json:
        print_json(result.model_dump())
        return
    print_trials(result)


def print_trials(result: SweepResult) -> None:
    """The trials of a sweep as a table, best first."""
    sign = -1 if result.direction == "max" else 1
    ordered = sorted(result.trials, key=lambda trial: sign * (trial.value if trial.value is not None else -sign * 1e9))
    names = list(ordered[0].parameters) if ordered else []
    rows = [
        (
            "best" if result.best and trial.run_id == result.best.run_id else "",
            number(trial.value),
            trial.epochs,
            *(f"{value:.4g}" if isinstance(value, float) else value for value in trial.parameters.values()),
            trial.run_id,
        )
        for trial in ordered
    ]
    headings = ("", result.metric, "epochs", *names, "run")
    print_table(table(headings, rows, title=f"sweep {result.sweep_id}"))
    print_note(f"the study: {result.study} in {result.storage}")
