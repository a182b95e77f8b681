"""A run whose embedding collapsed is marked and says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from armillary.components.collapse import CollapseMonitor
from armillary.objectives import Batch, BuildContext, Citation, Hyperparameters, Needs, Objective, Output
from armillary.spec.jobs import TrainJob
from armillary.testing.gloo_pool import GlooPool
from armillary.testing.logged import train_logged
from armillary.training.preflight import Plan, plan

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("gloo")]


class Shrink(Objective):
    """Pulls all embeddings to one point, or does nothing: collapse on demand."""

    name, family, citation = "shrink", "test", Citation("nobody", "nothing")
    needs = Needs(fields=("label",))
    weight = 1.0

    def build(self, context: BuildContext) -> None:
        self.point = torch.nn.Parameter(torch.ones(context.embedding_dim))
        self.collapse = CollapseMonitor()

    def forward(self, batch: Batch) -> Output:
        embeddings = self.encoder(batch.views[0]) * (1 - self.weight) + self.weight * self.point
        self.collapse.update(embeddings)
        return Output(embeddings.square().mean(), {"size": embeddings.detach().norm()})

    def epoch_metrics(self) -> dict[str, Tensor]:
        return self.collapse.metrics()


class Collapsing(Plan):
    def build(self) -> Objective:
        ready: Any = super().build()
        return Shrink(Hyperparameters(), BuildContext(ready.encoder, 32, 3, 40))


class Healthy(Collapsing):
    def build(self) -> Objective:
        objective: Any = super().build()
        objective.weight = 0.0
        return objective  # type: ignore[no-any-return]


def train(job: Any, kind: type[Plan], home: str) -> tuple[Any, list[str]]:
    """The record and what was logged, in a process group of one."""

    def load_plan() -> Plan:
        ready = plan(job)
        return kind(ready.job, ready.data, ready.views, ready.needs)

    return train_logged(load_plan, job, home)


def test_a_collapsed_run_is_marked(tiny_job: Any, orl: Path, armillary_home: Path) -> None:
    job = tiny_job(train__epochs=1)
    with GlooPool(1) as alone:
        collapsed, messages = alone.run(train, job, Collapsing, str(armillary_home))[0]
        healthy, silence = alone.run(train, job, Healthy, str(armillary_home))[0]
    assert collapsed.status == "finished"
    assert collapsed.warnings[0].startswith("collapsed: all samples have nearly one embedding")
    assert collapsed.metrics["train/embedding_std"] < 0.01
    assert "nearly one embedding" in messages[0]
    assert healthy.status == "finished"
    assert healthy.metrics["train/effective_rank"] > 2
    assert healthy.warnings == silence == []


def simsiam(target_gradient: float) -> TrainJob:
    """Six epochs on the scanned digits."""
    return TrainJob.model_validate(
        {
            "data": {"name": "digits", "split": "sample", "image_size": [16, 16]},
            "views": {"blur": 0.0, "flip": 0},
            "backbone": {"name": "small_convnet", "embedding_dim": 64, "width": 16},
            "objective": {
                "name": "simsiam",
                "projection_dim": 128,
                "projection_hidden": 128,
                "predictor_hidden": 32,
                "target_gradient": target_gradient,
            },
            "optimizer": {"lr": 2e-3, "warmup_epochs": 1},
            "train": {"epochs": 6, "batch_size": 64, "threads": 1},
            "evaluate": {"protocols": ["knn"]},
        }
    )


def test_simsiam_without_its_stop_gradient_is_marked(armillary_home: Path) -> None:
    """The encoder's embeddings still spread; what the loss compares does not."""
    with GlooPool(1) as alone:
        collapsed, _ = alone.run(train, simsiam(1.0), Plan, str(armillary_home))[0]
        healthy, silence = alone.run(train, simsiam(0.0), Plan, str(armillary_home))[0]
    assert collapsed.warnings[0].startswith("collapsed: projections draw together")
    assert collapsed.metrics["train/embedding_std"] > 0.6
    assert healthy.metrics["train/projection_std"] > 0.9
    assert healthy.warnings == silence == []
