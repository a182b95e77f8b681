"""A run on noisy procedural faces, trained in this process once a session."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from armillary.spec.jobs import TrainJob
    from armillary.training.rundir import RunDirectory

JOB: dict[str, Any] = {
    "name": "noisy",
    "data": {"name": "noisy"},
    "backbone": {"name": "small_convnet", "embedding_dim": 48, "width": 8},
    "objective": {"name": "subcenter_arcface", "scale": 16, "margin": 0.3},
    "optimizer": {"warmup_epochs": 1},
    "train": {"epochs": 8, "batch_size": 64, "threads": 1},
    "evaluate": {"protocols": ["verification"]},
}


def train(job: TrainJob) -> tuple[RunDirectory, float]:
    """Trains a job in this process: its run, finished, and the verification AUC of the people it has not seen."""
    from armillary.evaluation.suite import evaluate_encoder, metrics_of
    from armillary.testing.convergence import fit
    from armillary.training.model import save_encoder, save_head
    from armillary.training.preflight import plan
    from armillary.training.records import create_run

    ready = plan(job)
    torch.manual_seed(job.seed)
    objective = ready.build()
    fit(objective, ready)
    encoder = objective.exported()
    run = create_run(job, ready.data.fingerprint)
    save_encoder(run.path / "model", encoder, job, 3, (32, 32))
    save_head(run.path / "model", {"loss.weight": objective.get_parameter("loss.weight")})
    run.update(status="finished")
    results = evaluate_encoder(encoder, ready.data, job.evaluate.protocols, seed=job.seed)
    return run, metrics_of(results)["verification/auc"]


@pytest.fixture(scope="session")
def trainer() -> Callable[[TrainJob], tuple[RunDirectory, float]]:
    """:func:`train`, for tests that train more than the one run."""
    return train


@pytest.fixture(scope="session")
def trained_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state folder with the dataset ``noisy`` (38% wrong labels) and a finished run on it."""
    from armillary.data.identities import IdentitiesSpec, make_identities
    from armillary.spec.jobs import TrainJob

    home = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARMILLARY_HOME", str(home))
        spec = IdentitiesSpec.model_validate(
            {
                "identities": 30,
                "images_per_identity": 40,
                "size": 32,
                "difficulty": 0.2,
                "noise": {"flip": 0.25, "outlier": 0.13},
            }
        )
        make_identities("noisy", spec)
        train(TrainJob.model_validate(JOB))
    return home


@pytest.fixture
def run_id(trained_home: Path, armillary_home: Path) -> str:
    """The run's id, in this test's own state folder."""
    shutil.copytree(trained_home, armillary_home)
    return next(path.name for path in (armillary_home / "runs").iterdir())
