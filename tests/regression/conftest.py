"""A cheap real trainer, and the regression that is run with it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cache
from itertools import count

import numpy as np
import pytest

from armillary.regression.runner import OnResult
from armillary.spec.jobs import GateMetric, ObjectiveSpec, RegressionEntry, RegressionJob, TrainJob, TrainSpec
from armillary.training.api import Submission
from armillary.training.rundir import RunRecord

_numbers = count()


@cache
def _digits() -> tuple[np.ndarray, np.ndarray, str]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = images / np.linalg.norm(images, axis=1, keepdims=True)
    return images, labels, hashlib.sha256(images.tobytes()).hexdigest()


def train_digits(submission: Submission) -> RunRecord:
    """NormFace on raw digits: softmax over scaled cosines to ten class vectors, gradient descent, held-out accuracy."""
    job = submission.job
    assert isinstance(job, TrainJob)
    images, labels, fingerprint = _digits()
    rng = np.random.default_rng(job.seed)
    order = rng.permutation(len(images))
    train, held_out = order[:600], order[600:]
    scale = float(job.objective.options["scale"])
    weight = rng.normal(size=(10, images.shape[1]))
    for _ in range(job.train.epochs):
        norm = np.linalg.norm(weight, axis=1, keepdims=True)
        unit = weight / norm
        logits = scale * images[train] @ unit.T
        logits -= logits.max(axis=1, keepdims=True)
        probability = np.exp(logits)
        probability /= probability.sum(axis=1, keepdims=True)
        probability[np.arange(len(train)), labels[train]] -= 1
        gradient = scale * probability.T @ images[train] / len(train)
        gradient = (gradient - (gradient * unit).sum(axis=1, keepdims=True) * unit) / norm
        weight -= job.optimizer.lr * gradient
    unit = weight / np.linalg.norm(weight, axis=1, keepdims=True)
    accuracy = float((np.argmax(images[held_out] @ unit.T, axis=1) == labels[held_out]).mean())
    return RunRecord(
        run_id=f"run{next(_numbers)}",
        name=job.name,
        status="finished",
        group=submission.group,
        variant=submission.variant,
        fingerprint=fingerprint,
        git_commit="c0ffee",
        metrics={"identification/rank1": accuracy, "identification/error": 1 - accuracy},
        seconds=0.1,
    )


def digits_runner(submissions: Sequence[Submission], on_result: OnResult) -> list[RunRecord]:
    """Trains one submission after another."""
    records = []
    for position, submission in enumerate(submissions):
        records.append(train_digits(submission))
        on_result(position, records[-1])
    return records


@pytest.fixture
def regression() -> RegressionJob:
    """Two jobs, three seeds, two metrics."""
    train = TrainSpec(epochs=40)
    entries = tuple(
        RegressionEntry(
            job=TrainJob(name=name, objective=ObjectiveSpec.model_validate({"name": "normface", "scale": scale})),
            set={"train.epochs": train.epochs, "optimizer.lr": 20.0},
        )
        for name, scale in (("sharp", 16), ("soft", 8))
    )
    metrics = (
        GateMetric(name="identification/rank1", tolerance=0.01),
        GateMetric(name="identification/error", direction="lower", tolerance=0.01),
    )
    return RegressionJob(kind="regression", name="nightly", jobs=entries, seeds=(0, 1, 2), metrics=metrics)


@pytest.fixture
def blessed(regression: RegressionJob) -> RegressionJob:
    """The regression, run once and blessed."""
    from armillary.regression.runner import bless, run_regression

    run_regression(regression, digits_runner)
    bless("nightly", "first light")
    return regression


@pytest.fixture
def runner() -> Callable[[Sequence[Submission], OnResult], list[RunRecord]]:
    """The real trainer as a runner."""
    return digits_runner
