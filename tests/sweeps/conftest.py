"""The smallest sweep and study that mean something."""

from __future__ import annotations

from typing import Any

import pytest

from armillary.spec.jobs import StudyJob, SweepJob

BASE: dict[str, Any] = {
    "name": "tiny",
    "data": {"name": "orl", "image_size": [28, 24], "holdout": "validation"},
    "backbone": {"name": "small_convnet", "embedding_dim": 32, "width": 8},
    "objective": {"name": "arcface", "margin": 0.3, "scale": 16},
    "train": {"epochs": 4, "batch_size": 56, "threads": 1},
}


@pytest.fixture
def sweep_job() -> SweepJob:
    """Four trials of margin and learning rate."""
    space = {
        "objective.margin": {"low": 0.1, "high": 0.6},
        "optimizer.lr": {"low": 1e-4, "high": 1e-2, "log": True},
    }
    return SweepJob.model_validate(
        {"kind": "sweep", "name": "tiny", "base": BASE, "space": space, "trials": 4, "grace_epochs": 1, "concurrent": 2}
    )


@pytest.fixture
def study_job() -> StudyJob:
    """Two variants and two baselines on two folds."""
    return StudyJob.model_validate(
        {
            "kind": "study",
            "name": "tiny",
            "question": "Does it work?",
            "base": {**BASE, "data": {**BASE["data"], "holdout": "test"}},
            "variants": [
                {"name": "arcface"},
                {"name": "normface", "set": {"objective.name": "normface", "objective.scale": 16}},
                {"name": "pixels", "set": {"backbone.name": "pixels", "train.epochs": 0}},
                {"name": "untrained", "set": {"train.epochs": 0}},
            ],
            "folds": [0, 1],
            "seeds": [0, 1],
            "compare": ["arcface", "normface"],
        }
    )
