"""``armillary run``: any job, by its kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from armillary.cli.console import number, page, print_json, print_note, print_table, table
from armillary.spec.errors import UserError

if TYPE_CHECKING:
    from armillary.spec.jobs import ChainJob, StudyJob, TrainJob
    from armillary.training.rundir import RunRecord

app = typer.Typer(help="Train a job.", add_completion=False)

Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, e.g. objective.margin=0.4", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@app.command()
def run(
    job: Annotated[
        str | None, typer.Argument(help="A job file of any kind, or the name of one that ships with Armillary.")
    ] = None,
    overrides: Overrides = None,
    resume: Annotated[
        str | None, typer.Option(help="Go on with this run, or with this study; 'last' takes the newest unfinished.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Runs a job: trains it, sweeps it, or works through a study or a chain, as its kind says.

    With --resume no job file is named: the run's own is used, and overrides such as train.workers=2 apply to it. A run
    goes on from its last checkpoint; a study trains the runs that it lacks.
    """
    if resume is not None:
        _resume(resume, [part for part in (job, *(overrides or [])) if part], as_json)
        return
    if job is None:
        raise UserError("name a job file", hint="armillary run quickstart, or armillary run --resume last")
    from armillary.spec.loading import load_job

    loaded: Any = load_job(job, overrides or [])
    match loaded.kind:
        case "train":
            _train(loaded, None, as_json)
        case "sweep":
            from armillary.cli.sweep import run_and_print

            run_and_print(loaded, None, as_json)
        case "study":
            _study(loaded, None, as_json)
        case "chain":
            _chain(loaded, as_json)
        case _:
            command = {"regression": "armillary regress run", "evaluate": "armillary evaluate"}[loaded.kind]
            raise UserError(f"{job} is a job of kind {loaded.kind!r}", hint=f"{command} {job}")


def _resume(name: str, overrides: list[str], as_json: bool) -> None:
    from armillary.spec.jobs import TrainJob
    from armillary.spec.loading import load_job
    from armillary.sweeps.studies import find_study
    from armillary.training.launch import find_resumable

    wrong = [part for part in overrides if "=" not in part]
    if wrong:
        raise UserError(f"--resume uses the run's own job; {wrong[0]!r} is not an override", allowed="key=value")
    study = _study_named(name)
    if study is not None:
        study_id, study_job = find_study(study, overrides)
        _study(study_job, study_id, as_json)
        return
    directory = find_resumable(None if name == "last" else name)
    job = load_job(directory.path / "job.yaml", overrides)
    assert isinstance(job, TrainJob)
    _train(job, directory, as_json)


def _study_named(name: str) -> str | None:
    """The study that is meant by a name of a run or study, or by ``last``; ``None`` where a run is."""
    from armillary.sweeps.studies import studies_dir, unfinished_studies
    from armillary.training.rundir import all_runs

    runs = all_runs()
    if name == "last":
        studies = unfinished_studies()
        alone = (run.record() for run in runs)
        begun = [record.created for record in alone if record.group is None and record.status != "finished"]
        if studies and (studies[-1] / "study.yaml").stat().st_mtime > max(begun, default=0.0):
            return studies[-1].name
        return None
    if any(run.run_id.startswith(name) for run in runs):
        return None
    return name if next(studies_dir().glob(f"{name}*/study.yaml"), None) else None


def _train(job: TrainJob, resume: Any, as_json: bool) -> None:
    from armillary.cli.progress import progress
    from armillary.tracking.run import run_tracked

    known: list[str] = [resume.run_id] if resume else []

    def started(run: Any) -> None:
        known.append(run.run_id)
        epochs = f"{job.train.epochs} epoch{'s' * (job.train.epochs != 1)}"
        print_note(f"run {run.run_id}: {job.objective.name} on {job.data.name}, {epochs}")

    try:
        with progress(job.name, [job]) as bar:
            record = run_tracked(job, resume=resume, on_start=started, on_epoch=bar.report)
    except KeyboardInterrupt:
        hint = f"Resume it with: armillary run --resume {known[-1]}" if known else "Nothing was started."
        raise KeyboardInterrupt(hint) from None
    _print(record, as_json)


def _print(record: RunRecord, as_json: bool) -> None:
    if as_json:
        print_json(record.model_dump())
        return
    rows = [(name, number(value)) for name, value in record.metrics.items()]
    print_table(table(("metric", ("value", "right")), rows, title=f"{record.run_id} ({record.seconds:.1f} s)"))
    for warning in record.warnings:
        print_note(f"warning: {warning}")
    print_note(f"judge it again: armillary evaluate {record.run_id}\nrank it: armillary leaderboard")


def _study(job: StudyJob, resume: str | None, as_json: bool) -> None:
    from armillary.cli.progress import progress
    from armillary.sweeps.report import answers, marks, study_board, write_report
    from armillary.sweeps.studies import expand, run_study
    from armillary.tracking import format as shown

    known, runs = list[str](), [item for _, item in expand(job)]

    def started(study_id: str, missing: int) -> None:
        known.append(study_id)
        print_note(f"study {study_id}: {missing} of {len(runs)} runs to train")

    try:
        with progress(job.name, runs) as bar:
            result = run_study(job, resume=resume, on_start=started, on_report=bar.report)
    except KeyboardInterrupt:
        hint = f"Go on with: armillary run --resume {known[-1]}" if known else "Nothing was started."
        raise KeyboardInterrupt(hint) from None
    report = write_report(job, result)
    board = study_board(job, result)
    if as_json:
        print_json({"study": result.study_id, "report": str(report), "board": shown.as_json([board])})
        return
    console = page()
    console.print(shown.as_table([board], console.width))
    for sentence in [*answers(job, board), *marks(job, result.records)]:
        console.print(sentence, markup=False)
    print_note(f"report: {report}")


def _chain(job: ChainJob, as_json: bool) -> None:
    from armillary.cli.progress import progress
    from armillary.spec.loading import apply_overrides
    from armillary.sweeps.chains import run_chain

    def started(step: str, run: Any) -> None:
        print_note(f"step {step}: run {run.run_id}")

    with progress(job.name, [apply_overrides(job.base, step.set) for step in job.steps]) as bar:
        records = run_chain(job, on_start=started, on_epoch=bar.report)
    if as_json:
        print_json({name: record.model_dump() for name, record in records.items()})
        return
    names = list(dict.fromkeys(name for record in records.values() for name in record.metrics if "train/" not in name))
    rows = [
        (step, *(number(record.metrics.get(name)) for name in names), record.run_id) for step, record in records.items()
    ]
    print_table(table(("step", *((name, "right") for name in names), "run"), rows, title=job.name))
