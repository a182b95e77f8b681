"""Studies: variants x folds x seeds of one base job, and the report that answers the question they were run for."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from armillary.spec.errors import UserError, WorkFailed
from armillary.spec.home import home
from armillary.spec.jobs import StudyJob, TrainJob
from armillary.spec.loading import apply_overrides, dump_job
from armillary.sweeps.axis import place_of
from armillary.sweeps.matrix import run_matrix
from armillary.training.api import OnReport, Submission
from armillary.training.crew import CrewPool
from armillary.training.rundir import RunRecord, write_atomically


@dataclass(frozen=True)
class StudyResult:
    """A finished study: its id (``group`` is ``study/<id>``), folder and runs."""

    study_id: str
    folder: Path
    records: tuple[RunRecord, ...]

    @property
    def group(self) -> str:
        """What its runs are tagged with."""
        return f"study/{self.study_id}"


def expand(job: StudyJob) -> list[tuple[str, TrainJob]]:
    """The runs of a study: (variant, job) pairs. A variant without parameters or training repeats no seed in vain.

    Raises:
        UserError: a variant does not fit the base job.
    """
    runs = []
    for variant in job.variants:
        changed = apply_overrides(job.base, variant.set)
        seeds = job.seeds[:1] if changed.backbone.name == "pixels" else job.seeds
        for fold in job.folds:
            for seed in seeds:
                runs.append((variant.name, apply_overrides(changed, {"data.fold": fold, "seed": seed})))
    return runs


def run_study(
    job: StudyJob,
    *,
    pool: CrewPool | None = None,
    on_start: Callable[[str], None] | None = None,
    on_report: OnReport | None = None,
) -> StudyResult:
    """Runs the whole matrix; each run is recorded as it ends.

    Raises:
        UserError: the study cannot run; nothing was started.
        WorkFailed: some runs failed; the others are kept.
    """
    names = [variant.name for variant in job.variants]
    for name in job.compare or ():
        if name not in names:
            raise UserError(f"there is no variant {name!r} to compare", key="compare", allowed=", ".join(names))
    if job.axis is not None:
        for variant in job.variants:
            place_of(job, variant)
    study_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{job.name}-{secrets.token_hex(2)}"
    submissions = [Submission(run, group=f"study/{study_id}", variant=name) for name, run in expand(job)]
    if on_start:
        on_start(study_id)
    records = run_matrix(submissions, job.concurrent, pool=pool, on_report=on_report)
    folder = home() / "studies" / study_id
    folder.mkdir(parents=True)
    write_atomically(folder / "study.yaml", dump_job(job))
    _raise_failures(records)
    return StudyResult(study_id, folder, tuple(records))


def _raise_failures(records: Sequence[RunRecord]) -> None:
    failed = [record for record in records if record.status != "finished"]
    if failed:
        first = failed[0]
        raise WorkFailed(
            f"{len(failed)} of {len(records)} runs did not finish; the first, {first.run_id}: {first.error}\n"
            "  finished runs are kept: armillary leaderboard"
        )
