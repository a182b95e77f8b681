"""A job that trains in seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from armillary.spec.jobs import TrainJob

Job = Callable[..., TrainJob]


@pytest.fixture
def tiny_job() -> Job:
    """Makes a job on small ORL images; arguments are dotted overrides with ``__`` for dots."""

    def make(**overrides: Any) -> TrainJob:
        from armillary.spec.loading import apply_overrides

        job = TrainJob.model_validate(
            {
                "name": "tiny",
                "data": {"name": "orl", "image_size": [28, 24]},
                "backbone": {"name": "small_convnet", "embedding_dim": 32, "width": 8},
                "objective": {"name": "arcface", "margin": 0.3, "scale": 16},
                "train": {"epochs": 2, "batch_size": 56, "checkpoint_every": 1, "threads": 1},
            }
        )
        return apply_overrides(job, {key.replace("__", "."): value for key, value in overrides.items()})

    return make
