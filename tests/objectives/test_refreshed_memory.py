"""Banks and clusters that are made anew every epoch: what an epoch compares with is what the epoch before left."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from armillary.components.bank import encode_all
from armillary.losses.tensors import normalize
from armillary.objectives import Batch, registry
from armillary.testing import tiny


def made(name: str, options: dict[str, Any]) -> tuple[Any, Batch]:
    cls = registry.get(name)
    return tiny.build(cls, options), tiny.batch(cls.needs_for(tiny.hyperparameters(cls, options)))


def step(objective: Any, batch: Batch, number: int) -> float:
    objective.step = number
    objective.zero_grad()
    loss = objective(batch).loss
    loss.backward()
    with torch.no_grad():
        for parameter in objective.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.1 * parameter.grad)
    objective.after_step(number)
    return float(loss.detach())


def test_arb_aligns_with_what_the_last_epoch_wrote() -> None:
    objective, batch = made("arb", {"formulation": "survey"})
    objective.before_epoch(0, lambda: iter([batch]))
    assert not objective.last_epoch.written.any()
    view1, view2 = objective.project(batch.views).detach().chunk(2)
    step(objective, batch, 0)
    kept = normalize(normalize(view1) + normalize(view2))
    torch.testing.assert_close(objective.this_epoch.lookup(batch.index), kept, rtol=1e-4, atol=1e-5)
    # Within the epoch nothing is compared with its own bank.
    step(objective, batch, 1)
    assert not objective.last_epoch.written.any()
    newest = objective.this_epoch.lookup(batch.index)
    objective.before_epoch(1, lambda: iter([batch]))
    assert torch.equal(objective.last_epoch.lookup(batch.index), newest)
    view1, view2 = normalize(objective.project(batch.views).detach()).chunk(2)
    expected = sum((view - newest).square().sum(dim=1).mean() for view in (view1, view2)) / 2
    assert step(objective, batch, 2) == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("name", ["pcl", "hcsc"])
def test_clusters_are_those_of_the_teacher_as_the_epoch_begins(name: str) -> None:
    objective, batch = made(name, {"clusters": [4, 2], "warmup_epochs": 1, "momentum": 0.5})
    objective.before_epoch(0, lambda: iter([batch]))
    assert not objective.clustered
    step(objective, batch, 0)
    for epoch in (1, 2):
        rows, seen = encode_all(
            [batch],
            lambda part: normalize(objective.teacher(part.views[0])),
            objective.dataset_size,
            objective.teacher,
        )
        objective.epoch = epoch
        objective.before_epoch(epoch, lambda: iter([batch]))
        assert objective.clustered
        finest = next(iter(objective.rooms()))
        points, labels = rows[seen], finest.assigned[seen]
        for number in labels.unique():
            mean = normalize(points[labels == number].mean(dim=0))
            torch.testing.assert_close(finest.prototypes[number], mean, rtol=1e-4, atol=1e-5)
        before = finest.prototypes.clone()
        step(objective, batch, epoch)
        assert torch.equal(finest.prototypes, before)
