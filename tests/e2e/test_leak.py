"""If unseen people could be told apart without learning from labels, something would leak: shuffle them and see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from armillary.spec.jobs import TrainJob
from armillary.spec.loading import apply_overrides, load_job
from armillary.training.api import Submission
from armillary.training.crew import CrewPool

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]

METRIC = "verification/auc"
# Shuffled labels still teach filters that see faces and invariance to the views; more than this would be a leak.
GAIN_WITHOUT_LABELS = 0.03
# What right labels add, on average over the objectives, in so short a training.
GAIN_FROM_LABELS = 0.01
SMALL = {"backbone.width": 16, "train.epochs": 20, "train.threads": 1, "train.checkpoint_every": 0}
SETTINGS: dict[str, dict[str, Any]] = {
    "arcface": {"objective.scale": 16, "objective.margin": 0.3},
    "cosface": {"objective.scale": 16, "objective.margin": 0.2},
    "supcon": {"objective.projection_hidden": 128},
}


def supervised() -> list[str]:
    """Objectives that read labels, of each way of reading them: heads, tuples, positives in a contrast."""
    return ["arcface", "cosface", "normface", "softmax", "supcon", "triplet"]


def test_shuffled_labels_drop_supervised_objectives_to_the_untrained_level(orl: Path, crews: CrewPool) -> None:
    base = load_job("quickstart", [])
    assert isinstance(base, TrainJob)
    base = apply_overrides(base, SMALL)
    jobs = {("untrained", 0.0): apply_overrides(base, {"train.epochs": 0})}
    for name in supervised():
        job = apply_overrides(base, {"objective.name": name, **SETTINGS.get(name, {})})
        for noise in (0.0, 1.0):
            # At 1 every label is replaced by one of the 27 wrong ones.
            jobs[name, noise] = apply_overrides(job, {"data.label_noise": noise})
    records = crews.run_all([Submission(job) for job in jobs.values()])
    assert [record.error for record in records] == [None] * len(jobs)
    auc = {key: record.metrics[METRIC] for key, record in zip(jobs, records, strict=True)}
    untrained = auc["untrained", 0.0]
    for name in supervised():
        assert auc[name, 1.0] < untrained + GAIN_WITHOUT_LABELS, (name, auc)
    gains = [auc[name, 0.0] - auc[name, 1.0] for name in supervised()]
    assert sum(gains) / len(gains) > GAIN_FROM_LABELS, auc
