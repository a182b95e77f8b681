"""Training with its record kept in MLflow: what the command line calls instead of ``training`` itself."""

from __future__ import annotations

from collections.abc import Callable

from armillary.spec.jobs import TrainJob
from armillary.tracking.mlflow_store import check_uri
from armillary.tracking.spool import Flusher, target
from armillary.training.api import OnReport
from armillary.training.rundir import RunDirectory, RunRecord


def run_tracked(
    job: TrainJob,
    *,
    resume: RunDirectory | None = None,
    group: str | None = None,
    variant: str | None = None,
    on_start: Callable[[RunDirectory], None] | None = None,
    on_epoch: OnReport | None = None,
) -> RunRecord:
    """Trains a job and records it while it runs; a store that does not answer never stops the training.

    Args:
        job: the job, with secrets filled in.
        resume: take this run up again from its last checkpoint.
        group: the sweep, study or regression the run belongs to, as ``kind/name``.
        variant: its row there.
        on_start: called with the run's folder before training starts.
        on_epoch: called in this process after every epoch.

    Raises:
        UserError: the job, or its tracking URI, cannot be right; nothing was started.
    """
    from armillary.training.launch import run_job

    uri = check_uri(job.tracking.uri)
    flushers: list[Flusher] = []

    def begin(run: RunDirectory) -> None:
        flusher = Flusher(run, uri, job.tracking.experiment)
        flusher.start()
        flushers.append(flusher)
        if on_start:
            on_start(run)

    try:
        return run_job(job, resume=resume, group=group, variant=variant, on_start=begin, on_report=on_epoch)
    finally:
        # Also after an error or Ctrl-C: the record then says failed or stopped.
        for flusher in flushers:
            flusher.close()


def track_finished(run: RunDirectory) -> bool:
    """Records a run that ended elsewhere, e.g. on a crew; the same as following it from the start.

    Returns:
        Whether the store has everything; if not, a warning said how to send it later.
    """
    uri, experiment = target(run)
    return Flusher(run, uri, experiment).close()
