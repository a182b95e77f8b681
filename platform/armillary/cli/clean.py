"""``armillary clean``: drop wrongly labelled images by a trained run's sub-centers."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from armillary.cli.console import number, print_json, print_note, print_table, table

if TYPE_CHECKING:
    from armillary.procedures.cleaning import CleaningReport
    from armillary.spec.jobs import TrainJob

app = typer.Typer(help="Drop wrongly labelled images by a trained run's sub-centers.", add_completion=False)


@app.command()
def clean(
    run: Annotated[
        str, typer.Argument(help="A finished run of subcenter_arcface: its id, or an unambiguous beginning of it.")
    ],
    name: Annotated[str | None, typer.Option(help="Of the new dataset. Default: the old name and the run's.")] = None,
    angle: Annotated[
        float, typer.Option(help="Degrees from the dominant sub-center within which images are kept.", min=1, max=180)
    ] = 75.0,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="Train the run's job again on the new dataset, with one center a class.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Writes a version of the run's dataset without the training images that look wrongly labelled.

    Held-out people stay as they are, and so do the folds: a run on the new dataset is judged by the same people.
    """
    from armillary.procedures.cleaning import clean_run, retrain_job
    from armillary.spec.jobs import TrainJob
    from armillary.spec.loading import load_job
    from armillary.training.rundir import RunDirectory

    directory = RunDirectory.find(run)
    print_note(f"embedding the training images of {directory.run_id}")
    report = clean_run(directory.run_id, name=name, angle=angle)
    job = load_job(directory.path / "job.yaml", kind="train")
    assert isinstance(job, TrainJob)
    shown: dict[str, Any] = asdict(report)
    if not as_json:
        _print(report)
    if report.kept < report.images / 2:
        print_note("more than half of the images are dropped: train the run for longer, or take a wider --angle")
    if retrain:
        shown |= _retrain(retrain_job(job, report.dataset), directory.record().metrics, as_json)
    elif not as_json:
        one = " objective.subcenters=1" if job.objective.name == "subcenter_arcface" else ""
        print_note(f"train on it: armillary run {directory.path / 'job.yaml'} data.name={report.dataset}{one}")
    if as_json:
        print_json(shown)


def _print(report: CleaningReport) -> None:
    rows: list[tuple[str, str]] = [
        ("training images", str(report.images)),
        ("nearest to a dominant sub-center", f"{report.in_dominant} ({report.in_dominant / report.images:.1%})"),
        (f"kept, within {report.angle:g} degrees of it", f"{report.kept} ({report.kept / report.images:.1%})"),
        ("training classes with images left", f"{report.classes_kept} of {report.classes}"),
    ]
    if report.noise is not None:
        rows += [
            ("wrong labels before", f"{report.noise.before:.1%}"),
            ("wrong labels in dominant sub-centers", f"{report.noise.in_dominant:.1%}"),
            ("wrong labels kept", f"{report.noise.kept:.1%}"),
            ("right labels kept", f"{report.noise.right_kept:.1%}"),
        ]
    print_table(table(("", ("", "right")), rows, title=f"dataset {report.dataset}"))


def _retrain(job: TrainJob, before: dict[str, float], as_json: bool) -> dict[str, Any]:
    from armillary.cli.progress import progress
    from armillary.tracking.run import run_tracked

    with progress(job.name, [job]) as bar:
        record = run_tracked(job, on_epoch=bar.report)
    if not as_json:
        rows = [
            (metric, number(before.get(metric)), number(value))
            for metric, value in record.metrics.items()
            if not metric.startswith("train/")
        ]
        print_table(
            table(
                ("metric", ("before", "right"), ("cleaned", "right")),
                rows,
                title=f"{record.run_id} ({record.seconds:.1f} s)",
            )
        )
    return {"retrained": record.run_id, "before": before, "metrics": record.metrics}
