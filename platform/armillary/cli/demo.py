"""``armillary demo``: from photographs to a ranked, uncertain, honest table in a few minutes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from armillary.cli.console import page, print_json, print_note

if TYPE_CHECKING:
    from armillary.spec.jobs import StudyJob, SweepJob
    from armillary.sweeps.tuning import SweepResult

app = typer.Typer(help="Sweep, compare and rank on real faces in a few minutes.", add_completion=False)


@app.command()
def demo(
    trials: Annotated[int | None, typer.Option(help="Trials of the sweep.", min=1, show_default="8")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Trains on 28 people of the ORL faces and verifies 12 that no training ever saw, over three splits.

    A sweep tunes ArcFace on people held out of the training part; the winner then meets NormFace (the same loss without
    a margin), SupCon, SimCLR, raw pixels and an untrained network.
    """
    from armillary.cli.sweep import print_trials
    from armillary.sweeps.report import answers, study_board, write_report
    from armillary.tracking import format as shown
    from armillary.training.crew import crew_pool

    started = time.monotonic()
    sweep_job, study_job = _jobs(trials)
    _say_data()
    try:
        with crew_pool(sweep_job.base, sweep_job.concurrent) as pool:
            swept = _sweep(sweep_job, pool)
            print_trials(swept)
            study_job = _with_winner(study_job, swept)
            result = _compare(study_job, pool)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("Finished runs are kept: armillary leaderboard --trials") from None
    board = study_board(study_job, result)
    report = write_report(study_job, result, extra=_winner_section(swept))
    if as_json:
        rows = shown.as_json([board])
        print_json({"sweep": swept.model_dump(), "study": result.study_id, "board": rows, "report": str(report)})
        return
    console = page()
    console.print()
    console.print(shown.as_table([board], console.width))
    for sentence in answers(study_job, board):
        console.print(sentence, markup=False)
    print_note(f"\n{time.monotonic() - started:.0f} s. Report with ROC curves: {report}")
    print_note("Every run, parameter and curve: armillary track ui")


def _jobs(trials: int | None) -> tuple[SweepJob, StudyJob]:
    from armillary.spec.jobs import StudyJob, SweepJob
    from armillary.spec.loading import load_job

    sweep = load_job("jobs/sweep_arcface.yaml", [] if trials is None else [f"trials={trials}"])
    study = load_job("jobs/studies/first_light.yaml")
    assert isinstance(sweep, SweepJob)
    assert isinstance(study, StudyJob)
    return sweep, study


def _say_data() -> None:
    from armillary.data.importers import ensure_dataset

    manifest = ensure_dataset("orl").manifest
    print_note(
        f"{manifest.name}: {manifest.images} photographs of {len(manifest.class_names)} people. {manifest.credits}"
    )


def _sweep(job: SweepJob, pool: Any) -> SweepResult:
    from armillary.cli.progress import progress
    from armillary.sweeps.tuning import run_sweep
    from armillary.tracking.run import track_finished

    print_note(f"tuning {job.base.objective.name} on people held out of the training part: {job.trials} trials")
    with progress("sweep", [job.base] * job.trials) as bar:
        return run_sweep(job, pool=pool, on_report=bar.report, on_finish=track_finished)


def _with_winner(job: StudyJob, swept: SweepResult) -> StudyJob:
    """The study with the sweep's winner as its base, and its scale given to the loss without a margin too."""
    from armillary.spec.errors import WorkFailed
    from armillary.spec.loading import apply_overrides

    if swept.best is None:
        raise WorkFailed("no trial of the sweep was trained to its end; armillary leaderboard --trials shows why")
    base = apply_overrides(job.base, swept.best.parameters)
    variants = tuple(
        variant.model_copy(update={"set": {**variant.set, "objective.scale": swept.best.parameters["objective.scale"]}})
        if variant.set.get("objective.name") == "normface"
        else variant
        for variant in job.variants
    )
    return job.model_copy(update={"base": base, "variants": variants})


def _compare(job: StudyJob, pool: Any) -> Any:
    from armillary.cli.progress import progress
    from armillary.sweeps.studies import expand, run_study

    runs = expand(job)
    print_note(f"training {len(runs)} runs: {len(job.variants)} variants, {len(job.folds)} splits of the people")
    with progress("study", [run for _, run in runs]) as bar:
        return run_study(job, pool=pool, on_report=bar.report)


def _winner_section(swept: SweepResult) -> list[Any]:
    from armillary.evaluation.report import Heading, Table

    names = list(swept.trials[0].parameters)
    rows: list[list[Any]] = [
        [trial.run_id, *(trial.parameters[name] for name in names), trial.epochs, trial.value] for trial in swept.trials
    ]
    best = next((at for at, trial in enumerate(swept.trials) if swept.best and trial.run_id == swept.best.run_id), None)
    caption = "Trials of the sweep, judged on people held out of the training part; the winner went into the study"
    return [Heading("Sweep"), Table(["trial", *names, "epochs", swept.metric], rows, caption=caption, highlight=best)]
