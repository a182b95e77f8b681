"""Runs a regression's jobs and judges the outcome.

Training goes through one callable, :data:`Runner`, so that this layer neither knows how runs are launched nor waits for
a cluster in its tests. ``armillary.cli.regress`` passes the warm-crew matrix of ``armillary.sweeps``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from armillary.regression.baseline import Baseline, Blessing, bless_result
from armillary.regression.gate import Decision, Observation, decide
from armillary.regression.results import RegressionResult, ResultRun, latest_result, new_result_id
from armillary.spec.errors import UserError
from armillary.spec.jobs import GateMetric, RegressionEntry, RegressionJob, TrainJob
from armillary.spec.loading import apply_overrides, config_digest
from armillary.training.api import Submission
from armillary.training.rundir import RunRecord

# (position of the submission, its record), called as soon as that run is over.
OnResult = Callable[[int, RunRecord], None]
# Trains every submission and returns one record each, in the order given.
Runner = Callable[[Sequence[Submission], OnResult], list[RunRecord]]


def entry_name(entry: RegressionEntry) -> str:
    """The name a job has in the regression's tables and baselines."""
    return entry.name or entry.job.name


def expand(job: RegressionJob, overrides: Mapping[str, Any] | None = None) -> list[tuple[ResultRun, TrainJob]]:
    """The runs of a regression, jobs x seeds, each with the train job it stands for.

    Args:
        job: the regression.
        overrides: dotted keys of a train job set on every job of the list, after the entry's own ``set``. They change
            what is trained but not which baseline it is compared with, which is how a drop is planted.

    Raises:
        UserError: two entries share a name, a seed is listed twice, or an override does not fit.
    """
    names = [entry_name(entry) for entry in job.jobs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"two jobs of regression {job.name!r} are called {name!r}",
                key="jobs",
                hint="give each a name of its own",
            )
    if len(set(job.seeds)) != len(job.seeds):
        raise UserError(f"a seed is listed twice: {list(job.seeds)}", key="seeds", allowed="different whole numbers")
    planned = []
    for name, entry in zip(names, job.jobs, strict=True):
        stated = apply_overrides(entry.job, dict(entry.set))
        changed = apply_overrides(stated, dict(overrides or {}), where="command line")
        config = config_digest(stated)
        for seed in job.seeds:
            # Another fold holds out other people: that is another question, whoever asked for it.
            run = ResultRun(job=name, config=config, fold=changed.data.fold, seed=seed)
            planned.append((run, apply_overrides(changed, {"seed": seed})))
    return planned


def run_regression(
    job: RegressionJob, runner: Runner, *, overrides: Mapping[str, Any] | None = None
) -> RegressionResult:
    """Runs every job with every seed and stores the result as it grows.

    The result exists, with every run unfinished, before the first run starts: a process killed on the way leaves runs
    that :func:`check` calls missing instead of an older result that it would pass.

    Args:
        job: the regression.
        runner: trains the submissions.
        overrides: see :func:`expand`.

    Raises:
        UserError: a mistake in the job; when nothing was trained yet, no result is left behind.
    """
    planned = expand(job, overrides)
    result = RegressionResult(
        result_id=new_result_id(),
        name=job.name,
        metrics=job.metrics,
        confidence=job.confidence,
        overrides=dict(overrides or {}),
        runs=[run for run, _ in planned],
    )
    result.save()
    submissions = [Submission(job=train, group=f"regression/{job.name}", variant=run.job) for run, train in planned]

    def on_result(position: int, record: RunRecord) -> None:
        result.runs[position] = _with_record(result.runs[position], record)
        result.save()

    try:
        records = runner(submissions, on_result)
        if len(records) != len(submissions):
            raise RuntimeError(f"the runner returned {len(records)} records for {len(submissions)} runs")
        for position, record in enumerate(records):
            result.runs[position] = _with_record(result.runs[position], record)
    except UserError:
        if all(run.status == "created" for run in result.runs):
            result.path.unlink()
        raise
    except BaseException as error:
        # Whatever stopped the runs, Ctrl-C included, the stored result says so before the error travels on.
        result.error = f"{type(error).__name__}: {error}"
        result.save()
        raise
    result.finished = time.time()
    result.save()
    return result


def judge(
    result: RegressionResult, *, metrics: Sequence[GateMetric] | None = None, confidence: float | None = None
) -> list[Decision]:
    """One decision per job and metric of a result, against the baseline of the same data and configuration.

    Args:
        result: what was run.
        metrics: gate these instead of the metrics the result was made with.
        confidence: of the intervals, instead of the result's.
    """
    baseline = Baseline.load(result.name)
    decisions = []
    for name in dict.fromkeys(run.job for run in result.runs):
        runs = [run for run in result.runs if run.job == name]
        # A run that never started has no fingerprint; the gate reports it as missing before it looks for a baseline.
        fingerprints = {run.fingerprint for run in runs if run.status == "finished"}
        entry, why = None, f"the runs of {name!r} were made on different data"
        if len(fingerprints) == 1:
            fingerprint = fingerprints.pop()
            entry = baseline.find(name, runs[0].config, runs[0].fold, fingerprint)
            why = baseline.why_none(name, runs[0].fold, fingerprint)
        for metric in metrics or result.metrics:
            blessed = entry.observations(metric.name) if entry else []
            decisions.append(
                decide(
                    metric,
                    blessed,
                    [_observation(run, metric.name) for run in runs],
                    confidence=confidence or result.confidence,
                    job=name,
                    no_baseline=f"the blessed runs of {name!r} do not hold {metric.name}" if entry else why,
                )
            )
    return decisions


def check(name: str, job: RegressionJob | None = None) -> list[Decision]:
    """The verdicts on the newest result of a regression.

    Args:
        name: of the regression.
        job: take metrics, tolerances and confidence from this job file instead of from the stored result.

    Raises:
        UserError: the regression never ran.
    """
    result = latest_result(name)
    return judge(result, metrics=job.metrics, confidence=job.confidence) if job else judge(result)


def bless(name: str, why: str) -> Blessing:
    """Makes the newest result the baseline; see :func:`armillary.regression.baseline.bless_result`."""
    return bless_result(latest_result(name), why)


def _with_record(run: ResultRun, record: RunRecord) -> ResultRun:
    return run.model_copy(
        update={
            "status": record.status,
            "run_id": record.run_id,
            "fingerprint": record.fingerprint,
            "commit": record.git_commit,
            "seconds": record.seconds,
            "metrics": dict(record.metrics),
            "error": record.error,
        }
    )


def _observation(run: ResultRun, metric: str) -> Observation:
    if run.status == "created":
        return Observation(run.key, None, "never ran")
    if run.status != "finished":
        cause = f": {run.error.strip().splitlines()[-1]}" if run.error and run.error.strip() else ""
        return Observation(run.key, None, f"is {run.status}{cause}")
    if metric not in run.metrics:
        return Observation(run.key, None, f"finished without reporting {metric}")
    return Observation(run.key, run.metrics[metric], f"reported {metric} as {run.metrics[metric]}")
