"""The narrow interface through which everything above trains: sweeps, studies, regressions and the command line.

``run_job`` trains one job on a worker group of its own, fault-tolerant and resumable. ``CrewPool`` keeps warm worker
groups that take one run after another. Both write the same run folders and return the same record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

# (run_id, step, metrics) -> "continue" or "stop"; called in the driver after every epoch.
OnReport = Callable[[str, int, Mapping[str, float]], Literal["continue", "stop"]]


@dataclass(frozen=True)
class Submission:
    """A run to be trained: a job and where it belongs."""

    job: object
    group: str | None = None
    variant: str | None = None
    run_id: str | None = None
    tags: dict[str, str] = field(default_factory=dict)
