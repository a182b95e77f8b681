"""What a regression leaves on disk, under ``regressions/<name>/`` of the Armillary home.

::

    results/<time>.json    one RegressionResult a firing, written before the first run starts and after every run
    baseline.json          every blessing ever made, newest last (``baseline.py``)
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from armillary.regression.gate import Key
from armillary.spec.errors import UserError, unknown_name
from armillary.spec.home import home
from armillary.spec.jobs import GateMetric
from armillary.training.rundir import Status, write_atomically

# NaN and infinities must survive the round trip: a run that reports them is a missing one, not an unreadable file.
_STORED = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

Stored = TypeVar("Stored", bound=BaseModel)


class ResultRun(BaseModel):
    """One run of a regression, planned or done.

    ``config`` is the digest of the configuration as the job file states it: without the seed and without command-line
    overrides, so that a run with a planted change still meets its baseline.
    """

    model_config = _STORED

    job: str
    config: str
    fold: int
    seed: int
    status: Status = "created"
    run_id: str | None = None
    fingerprint: str = ""
    commit: str | None = None
    seconds: float = 0.0
    metrics: dict[str, float] = Field(default_factory=dict)
    error: str | None = None

    @property
    def key(self) -> Key:
        """What pairs this run with a baseline run."""
        return Key(self.job, self.fold, self.seed)


class RegressionResult(BaseModel):
    """One execution of a regression job; ``started`` is in seconds since the epoch, ``seconds`` the wall time.

    ``finished`` stays ``None`` when the process was killed: the runs it did not get to are then missing, not passed.
    """

    model_config = _STORED

    result_id: str
    name: str
    metrics: tuple[GateMetric, ...]
    confidence: float
    overrides: dict[str, object] = Field(default_factory=dict)
    started: float = Field(default_factory=time.time)
    finished: float | None = None
    error: str | None = None
    runs: list[ResultRun]

    @property
    def path(self) -> Path:
        """Where this result is stored."""
        return results_dir(self.name) / f"{self.result_id}.json"

    @property
    def commit(self) -> str | None:
        """The git commit the runs were made at; several are joined by a comma."""
        return ", ".join(sorted({run.commit for run in self.runs if run.commit})) or None

    def save(self) -> None:
        """Stores the result, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, self.model_dump_json(indent=2))


def regression_dir(name: str) -> Path:
    """The folder of one regression."""
    return home() / "regressions" / name


def results_dir(name: str) -> Path:
    """The folder of a regression's results."""
    return regression_dir(name) / "results"


def new_result_id() -> str:
    """The current UTC time to the microsecond; sorting ids sorts results by age."""
    return datetime.now(UTC).strftime("%Y%m%dT%H%M%S_%fZ")


def known_regressions() -> list[str]:
    """Names with at least one stored result, sorted."""
    return sorted({path.parent.parent.name for path in (home() / "regressions").glob("*/results/*.json")})


def load_results(name: str) -> list[RegressionResult]:
    """All results of a regression, oldest first.

    Raises:
        UserError: a result file cannot be read.
    """
    return [read_stored(RegressionResult, path) for path in sorted(results_dir(name).glob("*.json"))]


def latest_result(name: str) -> RegressionResult:
    """The newest result, finished or not.

    Raises:
        UserError: this regression never ran (with the nearest names that did), or its file cannot be read.
    """
    paths = sorted(results_dir(name).glob("*.json"))
    if paths:
        return read_stored(RegressionResult, paths[-1])
    known = known_regressions()
    if known:
        raise unknown_name("regression", name, known)
    raise UserError(
        f"regression {name!r} has no result yet",
        hint="run it first: armillary regress run FILE",
    )


def read_stored(model: type[Stored], path: Path) -> Stored:
    """A state file as its model.

    Raises:
        UserError: the file is torn or from another version.
    """
    try:
        return model.model_validate_json(path.read_text())
    except (ValidationError, UnicodeDecodeError) as error:
        detail = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise UserError(
            f"this {model.__name__} cannot be read: {detail}",
            where=str(path),
            hint="move the file away; a result is made again by armillary regress run",
        ) from None
