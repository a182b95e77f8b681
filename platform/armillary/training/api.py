"""The narrow interface through which everything above trains: sweeps, studies, regressions and the command line.

:func:`armillary.training.launch.run_job` trains one job on a worker group of its own, fault-tolerant and resumable.
:class:`armillary.training.crew.CrewPool` keeps warm worker groups that take one run after another. Both write the same
run folders and end in the same :class:`~armillary.training.rundir.RunRecord`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from armillary.spec.jobs import TrainJob

# (run_id, epoch, metrics), called in the driver after every epoch.
OnReport = Callable[[str, int, Mapping[str, float]], None]


@dataclass(frozen=True)
class Submission:
    """A run to be trained: a job, and which sweep, study or regression it is part of."""

    job: TrainJob
    group: str | None = None
    variant: str | None = None
