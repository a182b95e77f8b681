"""Run folders as training would leave them, and a migrated MLflow database to start from."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from armillary.spec.jobs import TrainJob
from armillary.tracking import mlflow_store
from armillary.training.rundir import RunDirectory, RunRecord

CREATED = 1_760_000_000.0


class TrainedRun(RunDirectory):
    """A run folder with the steps of a training in short."""

    def report(self, count: int) -> None:
        """Adds reports of that many epochs, with values that floating point cannot write short."""
        first = max((event["step"] for event in self.events()), default=0) + 1
        for step in range(first, first + count):
            self.append_event(step, {"train/loss": 1 / (step + 2), "train/lr": 1e-3 * 0.9**step})

    def finish(self, **metrics: float) -> RunRecord:
        """Ends the run well, with final metrics in whose names ``__`` stands for a slash."""
        values = {name.replace("__", "/"): value for name, value in metrics.items()}
        return self.update(status="finished", finished=CREATED + 60, seconds=60.0, metrics=values)


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty store; MLflow needs some seconds to make one, so that it is made once and copied."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    mlflow_store.MlflowStore(f"sqlite:///{path}")
    return path


@pytest.fixture
def store(armillary_home: Path, migrated: Path) -> Iterator[mlflow_store.MlflowStore]:
    """The default store of this test's home."""
    armillary_home.mkdir(parents=True, exist_ok=True)
    shutil.copy(migrated, armillary_home / "mlflow.db")
    yield mlflow_store.open_store()
    mlflow_store._open.cache_clear()


@pytest.fixture
def make_run(armillary_home: Path) -> Callable[..., TrainedRun]:
    """Makes a run folder: a job from dotted keys, and a record."""

    def make(
        run_id: str = "run-1", *, settings: dict[str, Any] | None = None, events: int = 0, **record: Any
    ) -> TrainedRun:
        tree: dict[str, Any] = {"kind": "train", "objective": {"name": "arcface"}}
        for key, value in (settings or {}).items():
            *parents, last = key.split(".")
            place = tree
            for parent in parents:
                place = place.setdefault(parent, {})
            place[last] = value
        job = TrainJob.model_validate(tree)
        fields: dict[str, Any] = {
            "run_id": run_id,
            "name": job.name,
            "created": CREATED,
            "fingerprint": "f" * 64,
            "digest": "d0",
        }
        text = yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False)
        run = TrainedRun(RunDirectory.create(RunRecord(**(fields | record)), text).path)
        run.report(events)
        return run

    return make
