"""A run whose batches mostly have nothing to learn from says so, once, and what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from armillary.objectives import registry
from armillary.spec.jobs import TrainJob
from armillary.testing.gloo_pool import GlooPool
from armillary.testing.logged import train_logged
from armillary.training.preflight import plan
from armillary.training.scarcity import mostly_empty


def triplet(**options: Any) -> tuple[TrainJob, Any]:
    job = TrainJob.model_validate({"data": {"name": "orl"}, "objective": {"name": "triplet", **options}})
    return job, registry.hyperparameters("triplet", job.objective.options)


def epochs(*empty: float) -> list[dict[str, Any]]:
    return [
        {"step": step, "metrics": {"train/empty": share, "train/active_share": 0.013}}
        for step, share in enumerate(empty, 1)
    ]


def test_the_first_such_epoch_is_named() -> None:
    job, options = triplet(margin=0.05)
    assert mostly_empty(job, options, []) is None
    assert mostly_empty(job, options, [{"step": 1, "metrics": {"train/loss": 1.0}}]) is None
    assert mostly_empty(job, options, epochs(0.0, 0.5)) is None
    early = mostly_empty(job, options, epochs(0.9, 1.0))
    late = mostly_empty(job, options, epochs(0.1, 0.6, 0.9))
    assert early is not None
    assert early[0] == 1
    assert early[1] == (
        "triplet: 90% of the batches of epoch 1 had nothing to learn from (1.3% of all its tuples were active); try a "
        "larger train.batch_size or another objective.samples_per_class than 4 or a larger objective.margin than 0.05 "
        "or another objective.mining than semi_hard"
    )
    assert late is not None
    assert late[0] == 2
    assert late[1].endswith("nothing is left to learn")


def train(job: Any, home: str) -> tuple[Any, list[str]]:
    return train_logged(lambda: plan(job), job, home)


@pytest.mark.slow
@pytest.mark.xdist_group("gloo")
def test_a_run_without_active_triplets_says_so_once(tiny_job: Any, orl: Path, armillary_home: Path) -> None:
    """With a margin of 0 a semi-hard negative, which is farther than the positive, costs nothing."""
    options = {"name": "triplet", "margin": 0.0, "mining": "semi_hard", "samples_per_class": 2}
    job = tiny_job(objective=options, train__epochs=2)
    with GlooPool(1) as alone:
        record, messages = alone.run(train, job, str(armillary_home))[0]
        learning, silence = alone.run(train, tiny_job(objective={**options, "margin": 0.5}), str(armillary_home))[0]
    assert record.status == "finished"
    assert record.metrics["train/empty"] > 0.5
    told = [sentence for sentence in record.warnings if "nothing to learn from" in sentence]
    assert len(told) == 1
    assert told[0].startswith("triplet: ")
    assert sum(told[0] in message for message in messages) == 1
    assert told[0] in json.loads(record.model_dump_json())["warnings"]
    assert learning.metrics["train/empty"] == 0
    assert not [message for message in (*learning.warnings, *silence) if "nothing to learn" in message]
