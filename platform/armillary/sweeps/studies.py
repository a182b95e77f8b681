"""Studies: variants x folds x seeds of one base job, and the report that answers the question they were run for."""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from armillary.spec.errors import UserError, WorkFailed, unknown_name
from armillary.spec.home import home
from armillary.spec.jobs import StudyJob, TrainJob
from armillary.spec.loading import apply_overrides, digest, dump_job, load_job
from armillary.sweeps.axis import place_of
from armillary.sweeps.matrix import run_matrix
from armillary.training.api import OnReport, Submission
from armillary.training.crew import CrewPool
from armillary.training.preflight import with_backbone
from armillary.training.rundir import RunRecord, all_runs, claimed, write_atomically

REPORT = "report.html"


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
        # As the runs' own jobs say it, by whose digest finished ones are found again.
        changed = with_backbone(apply_overrides(job.base, variant.set))
        seeds = job.seeds[:1] if changed.backbone.name == "pixels" else job.seeds
        for fold in job.folds:
            for seed in seeds:
                runs.append((variant.name, apply_overrides(changed, {"data.fold": fold, "seed": seed})))
    return runs


def studies_dir() -> Path:
    """One folder per study."""
    return home() / "studies"


def unfinished_studies() -> list[Path]:
    """The folders of studies that have no report yet, oldest first."""
    folders = [path.parent for path in studies_dir().glob("*/study.yaml") if not (path.parent / REPORT).is_file()]
    return sorted(folders, key=lambda folder: (folder / "study.yaml").stat().st_mtime)


def find_study(name: str, overrides: Sequence[str] = ()) -> tuple[str, StudyJob]:
    """The study to go on with, by id or an unambiguous beginning of one, and its job.

    Args:
        name: of the study.
        overrides: ``concurrent=N`` is all that may change; other runs would answer another question.

    Raises:
        UserError: there is none, it is finished, or an override changes what is run.
    """
    known = sorted(path.parent.name for path in studies_dir().glob("*/study.yaml"))
    matches = [known_id for known_id in known if known_id.startswith(name)]
    if len(matches) != 1:
        raise unknown_name("study", name, matches or known)
    folder = studies_dir() / matches[0]
    if (folder / REPORT).is_file():
        raise UserError(f"study {matches[0]} is finished", hint=f"its report: {folder / REPORT}")
    stored, job = (load_job(folder / "study.yaml", changes, kind="study") for changes in ((), overrides))
    assert isinstance(job, StudyJob)
    if digest(job.model_copy(update={"concurrent": 1})) != digest(stored.model_copy(update={"concurrent": 1})):
        raise UserError(
            "a study goes on as it was begun", key=overrides[0].split("=")[0], allowed="only concurrent=N may change"
        )
    return matches[0], job


def run_study(
    job: StudyJob,
    *,
    resume: str | None = None,
    pool: CrewPool | None = None,
    on_start: Callable[[str, int], None] | None = None,
    on_report: OnReport | None = None,
) -> StudyResult:
    """Runs the whole matrix; each run is recorded as it ends.

    Args:
        job: what to run.
        resume: the id of a study that broke off: runs that finished are kept, the others begin anew.
        pool: crews to train on; ``None`` starts ``job.concurrent`` of them.
        on_start: called with the study's id and the number of runs still to train.
        on_report: called after every epoch of every run.

    Raises:
        UserError: the study cannot run, nothing was started; or another process is at work on it.
        WorkFailed: some runs failed; the others are kept.
    """
    _check(job)
    study_id = resume or f"{time.strftime('%Y%m%d-%H%M%S')}-{job.name}-{secrets.token_hex(2)}"
    folder = studies_dir() / study_id
    folder.mkdir(parents=True, exist_ok=resume is not None)
    with claimed(folder, f"another process is at work on study {study_id}", patience=5):
        runs = expand(job)
        done = _finished(study_id) if resume else {}
        if not resume:
            write_atomically(folder / "study.yaml", dump_job(job))
        missing = [(name, run) for name, run in runs if (name, digest(run)) not in done]
        if on_start:
            on_start(study_id, len(missing))
        submissions = [Submission(run, group=f"study/{study_id}", variant=name) for name, run in missing]
        try:
            records = run_matrix(submissions, job.concurrent, pool=pool, on_report=on_report) if missing else []
        except UserError:
            if not resume:
                shutil.rmtree(folder)
            raise
        done |= {(name, digest(run)): record for (name, run), record in zip(missing, records, strict=True)}
    _raise_failures(study_id, records)
    return StudyResult(study_id, folder, tuple(done[name, digest(run)] for name, run in runs))


def _check(job: StudyJob) -> None:
    names = [variant.name for variant in job.variants]
    for name in job.compare or ():
        if name not in names:
            raise UserError(f"there is no variant {name!r} to compare", key="compare", allowed=", ".join(names))
    if job.axis is not None:
        for variant in job.variants:
            place_of(job, variant)
    measured = {"train", *(protocol for _, run in expand(job) for protocol in run.evaluate.protocols)}
    for key, chosen in (("metrics", job.metrics), ("against", job.against or ())):
        for metric in chosen:
            if metric.split("/")[0] not in measured:
                raise UserError(f"no run measures {metric!r}", key=key, allowed=f"{', '.join(sorted(measured))}/...")


def _finished(study_id: str) -> dict[tuple[str, str], RunRecord]:
    """The finished runs of a study by variant and digest of their job; those that a kill left behind are marked."""
    found: dict[tuple[str, str], RunRecord] = {}
    for run in all_runs():
        record = run.record()
        if record.group != f"study/{study_id}":
            continue
        if record.status in ("created", "running"):
            # The workers of a killed driver live on for some seconds, and may even finish their run.
            with run.claimed():
                record = run.record()
                if record.status != "finished":
                    record = run.update(status="failed", error="lost when the study was interrupted")
        if record.status == "finished":
            found.setdefault((record.variant or "", record.digest), record)
    return found


def _raise_failures(study_id: str, records: Sequence[RunRecord]) -> None:
    failed = [record for record in records if record.status != "finished"]
    if failed:
        first = failed[0]
        raise WorkFailed(
            f"{len(failed)} of {len(records)} runs did not finish; the first, {first.run_id}: {first.error}\n"
            f"  finished runs are kept; run the others again with: armillary run --resume {study_id}"
        )
