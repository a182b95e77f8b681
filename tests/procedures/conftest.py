"""A run on noisy procedural faces, trained in this process once a session."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

JOB: dict[str, Any] = {
    "name": "noisy",
    "data": {"name": "noisy"},
    "backbone": {"name": "small_convnet", "embedding_dim": 48, "width": 8},
    "objective": {"name": "subcenter_arcface", "scale": 16, "margin": 0.3},
    "optimizer": {"warmup_epochs": 1},
    "train": {"epochs": 8, "batch_size": 64, "threads": 1},
    "evaluate": {"protocols": ["verification"]},
}


@pytest.fixture(scope="session")
def trained_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state folder with the dataset ``noisy`` (38% wrong labels) and a finished run on it."""
    from armillary.data.identities import IdentitiesSpec, make_identities
    from armillary.spec.jobs import TrainJob
    from armillary.testing.convergence import fit
    from armillary.training.model import save_encoder, save_head
    from armillary.training.preflight import plan
    from armillary.training.records import create_run

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
        job = TrainJob.model_validate(JOB)
        ready = plan(job)
        torch.manual_seed(0)
        objective = ready.build()
        fit(objective, ready)
        run = create_run(job, ready.data.fingerprint)
        save_encoder(run.path / "model", objective.exported(), job, 3, (32, 32))
        save_head(run.path / "model", {"loss.weight": objective.get_parameter("loss.weight")})
        run.update(status="finished")
    return home


@pytest.fixture
def run_id(trained_home: Path, armillary_home: Path) -> str:
    """The run's id, in this test's own state folder."""
    shutil.copytree(trained_home, armillary_home)
    return next(path.name for path in (armillary_home / "runs").iterdir())
