"""A fixed list of runs over warm crews, each recorded in MLflow as it ends: what studies and regressions train with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from armillary.tracking.run import track_finished
from armillary.training.api import OnReport, Submission
from armillary.training.crew import CrewPool, crew_pool
from armillary.training.rundir import RunDirectory, RunRecord

# (position among the submissions, record), as each run ends.
OnResult = Callable[[int, RunRecord], None]


def run_matrix(
    submissions: Sequence[Submission],
    concurrent: int,
    *,
    pool: CrewPool | None = None,
    on_report: OnReport | None = None,
    on_result: OnResult | None = None,
) -> list[RunRecord]:
    """Trains every submission.

    Args:
        submissions: what to train; all must ask for the same worker group.
        concurrent: runs at a time, each on a crew of its own.
        pool: crews to use; ``None`` starts ``concurrent`` of them.
        on_report: called after every epoch.
        on_result: called as runs end, in whatever order they do.

    Returns:
        The records in the order of the submissions; a failed run has ``status`` ``failed``.

    Raises:
        UserError: one of the jobs cannot run; nothing was started.
    """

    def finish(position: int, run: RunDirectory) -> None:
        track_finished(run)
        if on_result:
            on_result(position, run.record())

    if pool is not None:
        return pool.run_all(submissions, on_report, finish)
    with crew_pool(submissions[0].job, concurrent) as own:
        return own.run_all(submissions, on_report, finish)
