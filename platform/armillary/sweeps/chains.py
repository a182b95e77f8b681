"""Chains: runs one after the other, each of which may begin with what an earlier one has left."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any

from armillary.spec.jobs import ChainJob, TrainJob
from armillary.spec.loading import STEP, apply_overrides
from armillary.tracking.run import run_tracked
from armillary.training.api import OnReport
from armillary.training.rundir import RunDirectory, RunRecord


def run_chain(
    job: ChainJob,
    *,
    on_start: Callable[[str, RunDirectory], None] | None = None,
    on_epoch: OnReport | None = None,
) -> dict[str, RunRecord]:
    """Runs the steps in order and records each (``group`` is ``chain/<id>``, ``variant`` the step's name).

    Args:
        job: the chain.
        on_start: called with a step's name and the folder of its run.
        on_epoch: called after every epoch of every step.

    Returns:
        The steps' records by name.

    Raises:
        UserError: a step cannot run; those before it are kept.
        WorkFailed: a step's run failed; those before it are kept.
    """
    group = f"chain/{time.strftime('%Y%m%d-%H%M%S')}-{job.name}-{secrets.token_hex(2)}"
    records: dict[str, RunRecord] = {}
    for step in job.steps:

        def begin(run: RunDirectory, name: str = step.name) -> None:
            if on_start:
                on_start(name, run)

        runs = {name: record.run_id for name, record in records.items()}
        records[step.name] = run_tracked(
            step_job(job, step.set, runs), group=group, variant=step.name, on_start=begin, on_epoch=on_epoch
        )
    return records


def step_job(job: ChainJob, changes: Mapping[str, Any], runs: Mapping[str, str]) -> TrainJob:
    """The job of a step, with run ids for the names of earlier steps."""

    def resolved(value: Any) -> Any:
        named = isinstance(value, str) and value.startswith(STEP)
        return runs[value.removeprefix(STEP)] if named else value

    return apply_overrides(job.base, {key: resolved(value) for key, value in changes.items()})
