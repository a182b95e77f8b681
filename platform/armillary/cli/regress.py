"""``armillary regress``: run regression jobs, compare them with their blessed baseline, accept a new one."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.text import Text

    from armillary.regression.gate import Decision
    from armillary.regression.results import RegressionResult
    from armillary.regression.runner import OnResult, Runner
    from armillary.spec.jobs import RegressionJob, TrainJob
    from armillary.training.api import Submission
    from armillary.training.rundir import RunRecord

app = typer.Typer(help="Run regression jobs and compare them with their blessed baseline.", no_args_is_help=True)

FileOrName = Annotated[
    str, typer.Argument(metavar="FILE_OR_NAME", help="a regression job file, or a regression's name")
]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]
_STYLES = {"pass": "green", "improved": "cyan", "inconclusive": "yellow", "no baseline": "yellow"}


@app.command()
def run(
    file: Annotated[Path, typer.Argument(help="a regression job file")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value; keys of a train job apply to every job of the list")
    ] = None,
    json: Json = False,
) -> None:
    """Train every job with every seed, store the result, print the verdicts; exit 1 on a drop or a missing run."""
    from armillary.regression.gate import exit_code
    from armillary.regression.runner import expand, judge, run_regression

    own, for_jobs = _split_overrides(overrides or [])
    job = load_regression(file, own)
    settings = _settings(for_jobs)
    _preflight([train for planned, train in expand(job, settings) if planned.seed == job.seeds[0]])
    try:
        result = run_regression(job, _crew_runner(job.concurrent), overrides=settings)
    except KeyboardInterrupt:
        again = " ".join(["armillary regress run", str(file), *(overrides or [])])
        raise KeyboardInterrupt(f"The stored result counts as missing; run it again: {again}") from None
    decisions = judge(result)
    _print(result, decisions, json)
    raise typer.Exit(exit_code(decisions))


@app.command()
def check(
    target: FileOrName,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value of the regression itself")] = None,
    json: Json = False,
) -> None:
    """Judge the newest stored result again; exit 1 when any metric regressed or any run is missing."""
    from armillary.regression.gate import exit_code
    from armillary.regression.results import latest_result
    from armillary.regression.runner import judge
    from armillary.spec.errors import UserError

    own, for_jobs = _split_overrides(overrides or [])
    if for_jobs:
        raise UserError(
            f"check trains nothing, so {for_jobs[0]!r} changes nothing",
            hint=f"armillary regress run {target} {' '.join(for_jobs)}",
        )
    job = load_regression(Path(target), own) if _is_file(target) else None
    if own and job is None:
        raise UserError(f"{own[0]!r} changes a job file, and {target!r} is a name", hint="give the job file")
    result = latest_result(job.name if job else target)
    decisions = judge(result, metrics=job.metrics, confidence=job.confidence) if job else judge(result)
    _print(result, decisions, json)
    raise typer.Exit(exit_code(decisions))


@app.command()
def bless(
    target: FileOrName,
    why: Annotated[str, typer.Option("--why", help="the reason, kept in the history")] = "",
    json: Json = False,
) -> None:
    """Accept the newest result as the baseline of its data and configuration."""
    from armillary.cli.console import out, print_json
    from armillary.regression import runner

    name = _name(target)
    blessing = runner.bless(name, why)
    if json:
        print_json({"name": name, **blessing.model_dump(mode="json")})
        return
    out.print(f"blessed result {blessing.result_id} of {name} as {blessing.who}: {blessing.why}", markup=False)
    for entry in blessing.entries:
        data = f"data {entry.fingerprint[:12]}" if entry.fingerprint else "data without fingerprint"
        out.print(f"  {entry.job}: {len(entry.runs)} runs, {data}, configuration {entry.config[:12]}", markup=False)


@app.command()
def history(target: FileOrName, json: Json = False) -> None:
    """Who blessed what, when, at which commit, and why; newest last."""
    from armillary.cli.console import out, print_json, print_table, table
    from armillary.regression.baseline import Baseline
    from armillary.regression.results import load_results

    name = _name(target)
    blessings = Baseline.load(name).blessings
    if json:
        print_json({"name": name, "blessings": [blessing.model_dump(mode="json") for blessing in blessings]})
        return
    if not blessings:
        stored = len(load_results(name))
        out.print(f"{name}: no blessing, {stored} stored result{'' if stored == 1 else 's'}", markup=False)
        return
    rows = [
        (clock(item.when), item.who, (item.commit or "-")[:12], item.result_id, _blessed(item.entries), item.why)
        for item in blessings
    ]
    print_table(table(["when", "who", "commit", "result", "jobs", "why"], rows))


def _blessed(entries: Sequence[Any]) -> str:
    return ", ".join(f"{entry.job} ({len(entry.runs)})" for entry in entries)


def _split_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides of the regression itself (``seeds=[0]``), and of every train job in it (``objective.scale=1``)."""
    from armillary.spec.jobs import RegressionJob

    own = [item for item in overrides if item.split("=", 1)[0].split(".")[0].strip() in RegressionJob.model_fields]
    return own, [item for item in overrides if item not in own]


def _settings(overrides: Sequence[str]) -> dict[str, Any]:
    """``key=value`` texts as values by dotted key, each value read as YAML."""
    from armillary.spec import document
    from armillary.spec.errors import UserError

    settings = {}
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator or not value.strip():
            raise UserError(f"found {text!r}", where="command line", allowed="key=value, e.g. objective.scale=1")
        settings[key.strip()] = document.parse(value, "command line").values
    return settings


def _is_file(target: str) -> bool:
    return Path(target).is_file() or Path(target).suffix in (".yaml", ".yml")


def _name(target: str) -> str:
    return load_regression(Path(target)).name if _is_file(target) else target


def load_regression(path: Path, overrides: Sequence[str] = ()) -> RegressionJob:
    """The regression job in a file.

    Raises:
        UserError: the file is wrong, or holds another kind of job.
    """
    from armillary.spec.jobs import RegressionJob
    from armillary.spec.loading import load_job

    job = load_job(path, overrides, kind="regression")
    assert isinstance(job, RegressionJob)
    return job


def _preflight(jobs: Sequence[TrainJob]) -> None:
    """All of a list is checked before anything of it starts."""
    from armillary.training.preflight import plan

    for job in jobs:
        plan(job)


def _crew_runner(concurrent: int) -> Runner:
    from armillary.cli.progress import progress
    from armillary.sweeps.matrix import run_matrix

    def runner(submissions: Sequence[Submission], on_result: OnResult) -> list[RunRecord]:
        jobs = [item.job for item in submissions]
        records: dict[int, RunRecord] = {}
        with progress(f"{len(submissions)} runs", jobs) as bar:
            for positions in _worker_groups(jobs):

                def finished(place: int, record: RunRecord, positions: list[int] = positions) -> None:
                    on_result(positions[place], record)

                chosen = [submissions[position] for position in positions]
                done = run_matrix(chosen, concurrent, on_report=bar.report, on_result=finished)
                records.update(zip(positions, done, strict=True))
        return [records[position] for position in range(len(submissions))]

    return runner


def _worker_groups(jobs: Sequence[TrainJob]) -> list[list[int]]:
    """Positions of the jobs that can share crews: a crew keeps its number of workers, their resources, its cluster."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for position, job in enumerate(jobs):
        group = (job.train.workers, job.train.gpus_per_worker, job.train.threads, job.cluster.address)
        groups.setdefault(group, []).append(position)
    return list(groups.values())


def _print(result: RegressionResult, decisions: Sequence[Decision], json: bool) -> None:
    from armillary.cli.console import out, print_json, print_table, table
    from armillary.regression.gate import overall

    verdict = overall(decisions)
    if json:
        print_json(
            {
                "name": result.name,
                "result": str(result.path),
                "started": result.started,
                "finished": result.finished,
                "commit": result.commit,
                "overrides": result.overrides,
                "verdict": verdict,
                "decisions": [decision.model_dump(mode="json") for decision in decisions],
            }
        )
        return
    numeric = [(heading, "right") for heading in ("baseline", "candidate", "change (+ is better)", "interval")]
    columns: list[Any] = ["job", "metric", *numeric, "verdict", "why"]
    title = f"{result.name}: {_styled(verdict).plain}, result {result.result_id}"
    print_table(table(columns, [_row(decision) for decision in decisions], title=title))
    if result.overrides:
        changed = " ".join(f"{key}={value}" for key, value in result.overrides.items())
        out.print(f"run with overrides: {changed}", markup=False)
    elif verdict == "no baseline":
        out.print(f'to accept it: armillary regress bless {result.name} --why "..."', markup=False)


def _row(decision: Decision) -> tuple[object, ...]:
    def mean(value: float | None, runs: int) -> str:
        return "-" if value is None else f"{value:.4f} (n={runs})"

    interval = "-" if decision.interval is None else "[{:+.4f}, {:+.4f}]".format(*decision.interval)
    method = f" {decision.method}" if decision.interval else ""
    return (
        decision.job,
        decision.metric,
        mean(decision.baseline_mean, decision.baseline_runs),
        mean(decision.candidate_mean, decision.candidate_runs),
        "-" if decision.change is None else f"{decision.change:+.4f}",
        interval + method,
        _styled(decision.verdict),
        decision.reason,
    )


def _styled(verdict: str) -> Text:
    from rich.text import Text

    return Text(verdict, style=_STYLES.get(verdict, "bold red"))


def clock(when: datetime | float | None) -> str:
    """A moment, or seconds since the epoch, in local time; a dash for ``None``."""
    if when is None:
        return "-"
    moment = when if isinstance(when, datetime) else datetime.fromtimestamp(when)
    return f"{moment.astimezone():%Y-%m-%d %H:%M %Z}"
