"""Training with what it logs, for tests of warnings."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from unittest.mock import patch

from armillary.spec.jobs import TrainJob
from armillary.training import loop
from armillary.training.preflight import Plan
from armillary.training.records import create_run
from armillary.training.rundir import RunRecord


def train_logged(load_plan: Callable[[], Plan], job: TrainJob, home: str) -> tuple[RunRecord, list[str]]:
    """The record and the messages of a run, in the process group that this process is in.

    Args:
        load_plan: makes what is trained.
        job: what the run is recorded as.
        home: the state folder.
    """
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    loop.logger.addHandler(handler)
    try:
        with patch.dict(os.environ, ARMILLARY_HOME=home):
            record = loop.execute(load_plan, create_run(job, "none"), lambda *_: "continue")
    finally:
        loop.logger.removeHandler(handler)
    return record, messages
