"""Blessed baselines: what a regression's metrics are compared with, who said so, when, and why.

A baseline belongs to one (job name, configuration, fold, data fingerprint). Runs on other data, or of a job file that
was edited, find none: numbers from different questions are never compared. Nothing is ever removed from the file: the
newest blessing of a key counts, and going back to older data finds the baseline that was blessed for it.
"""

from __future__ import annotations

import getpass
import math
import time

from pydantic import BaseModel, ConfigDict, Field

from armillary.regression.gate import Key, Observation
from armillary.regression.results import RegressionResult, ResultRun, read_stored, regression_dir
from armillary.spec.errors import UserError
from armillary.training.rundir import write_atomically


class BaselineRun(BaseModel):
    """One blessed run; all of its finite metrics are kept, so that a metric gated later already has its baseline."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run_id: str | None
    seed: int
    metrics: dict[str, float]


class BaselineEntry(BaseModel):
    """The blessed runs of one job on one data fingerprint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    job: str
    config: str
    fold: int
    fingerprint: str
    runs: tuple[BaselineRun, ...]

    def observations(self, metric: str) -> list[Observation]:
        """The runs' values of a metric; runs that never reported it are left out."""
        return [
            Observation(Key(self.job, self.fold, run.seed), run.metrics[metric])
            for run in self.runs
            if metric in run.metrics
        ]


class Blessing(BaseModel):
    """One act of accepting a result as the new baseline; ``when`` is in seconds since the epoch."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    who: str
    when: float
    commit: str | None = Field(description="git commit of the runs")
    why: str
    result_id: str
    entries: tuple[BaselineEntry, ...]


class Baseline(BaseModel):
    """Every blessing of one regression, oldest first."""

    model_config = ConfigDict(extra="forbid")

    name: str
    blessings: list[Blessing] = Field(default_factory=list)

    @classmethod
    def load(cls, name: str) -> Baseline:
        """The stored baseline, or an empty one.

        Raises:
            UserError: the file cannot be read.
        """
        path = regression_dir(name) / "baseline.json"
        return read_stored(cls, path) if path.is_file() else cls(name=name)

    def save(self) -> None:
        """Stores the baseline, whole or not at all."""
        path = regression_dir(self.name) / "baseline.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, self.model_dump_json(indent=2))

    def find(self, job: str, config: str, fold: int, fingerprint: str) -> BaselineEntry | None:
        """The newest blessed entry of exactly this job, configuration, fold and data."""
        for entry in self._newest_first(job):
            if (entry.config, entry.fold, entry.fingerprint) == (config, fold, fingerprint):
                return entry
        return None

    def why_none(self, job: str, fold: int, fingerprint: str) -> str:
        """The reason, in words, that :meth:`find` has nothing for a job on this data."""
        entries = self._newest_first(job)
        if not entries:
            return f"nothing is blessed for {job!r} yet"
        newest = entries[0]
        same_data = [entry for entry in entries if entry.fingerprint == fingerprint]
        if same_data and all(entry.fold != fold for entry in same_data):
            return f"fold {fold} was run, fold {same_data[0].fold} is blessed"
        if same_data:
            return f"the configuration of {job!r} in the job file changed since it was blessed"
        return (
            f"the data's fingerprint is {fingerprint[:12]!r}, the baseline was blessed on {newest.fingerprint[:12]!r}"
        )

    def _newest_first(self, job: str) -> list[BaselineEntry]:
        return [entry for blessing in reversed(self.blessings) for entry in blessing.entries if entry.job == job]


def bless_result(result: RegressionResult, why: str) -> Blessing:
    """Accepts a result's numbers as the baseline of its data and configurations, and stores that.

    Raises:
        UserError: no reason given; the result was made with command-line overrides; a run did not finish, lacks a gated
            metric, or the seeds of one job ran on different data.
    """
    if not why.strip():
        raise UserError("a blessing needs a reason", key="--why", hint='--why "ArcFace head rewritten, +0.4 points"')
    if result.overrides:
        raise UserError(
            f"result {result.result_id} of {result.name!r} was made with overrides "
            f"({', '.join(f'{key}={value}' for key, value in result.overrides.items())}), it cannot be the baseline",
            hint="run it again without overrides, or put them into the job file",
        )
    for run in result.runs:
        _refuse_incomplete(result, run)
    blessing = Blessing(
        who=_user(),
        when=time.time(),
        commit=result.commit,
        why=why.strip(),
        result_id=result.result_id,
        entries=tuple(_entry(result, job) for job in dict.fromkeys(run.job for run in result.runs)),
    )
    baseline = Baseline.load(result.name)
    baseline.blessings.append(blessing)
    baseline.save()
    return blessing


def _entry(result: RegressionResult, job: str) -> BaselineEntry:
    runs = [run for run in result.runs if run.job == job]
    fingerprints = {run.fingerprint for run in runs}
    if len(fingerprints) > 1:
        raise UserError(f"the runs of {job!r} were made on different data ({', '.join(sorted(fingerprints))})")
    return BaselineEntry(
        job=job,
        config=runs[0].config,
        fold=runs[0].fold,
        fingerprint=runs[0].fingerprint,
        runs=tuple(
            BaselineRun(
                run_id=run.run_id,
                seed=run.seed,
                metrics={name: value for name, value in run.metrics.items() if math.isfinite(value)},
            )
            for run in runs
        ),
    )


def _refuse_incomplete(result: RegressionResult, run: ResultRun) -> None:
    what = f"run {run.job} seed {run.seed} of result {result.result_id}"
    if run.status != "finished":
        raise UserError(f"{what} did not finish ({run.status}), so the result cannot be blessed", hint=run.error)
    for metric in result.metrics:
        value = run.metrics.get(metric.name)
        if value is None or not math.isfinite(value):
            raise UserError(
                f"{what} has no finite {metric.name} (found {value}), so the result cannot be blessed",
                allowed=f"a metric it reports: {', '.join(sorted(run.metrics)) or 'none'}",
            )


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"  # a container whose user id has no account
