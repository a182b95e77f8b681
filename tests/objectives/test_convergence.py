"""What the short trainings ask of every method on images without labels: something falls, nothing collapses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from armillary.objectives import names, registry
from armillary.testing.convergence import collapsed_on_held_out, converge, falling, preset_job
from armillary.training.preflight import plan


def test_every_method_without_labels_must_lower_something() -> None:
    without_labels = [
        name
        for name in names()
        if registry.get(name).needs.modality == "image" and "label" not in registry.get(name).needs.fields
    ]
    assert {"byol", "dino", "mae", "pcl", "rotation", "simclr", "swav", "vicreg"} <= set(without_labels)
    assert all(falling(registry.get(name)) for name in without_labels)
    assert falling(registry.get("pcl")) == "prototype_loss"
    assert not falling(registry.get("arcface"))


class Spread(nn.Module):
    """Images to a common vector and a share of ``dims`` of their pixels."""

    def __init__(self, share: float, dims: int) -> None:
        super().__init__()
        self.share, self.dims = share, dims

    def forward(self, images: Tensor) -> Tensor:
        """Rows of 16 numbers."""
        rows = torch.zeros(len(images), 16)
        rows[:, : self.dims] = self.share * images.flatten(1)[:, 100 : 100 + self.dims]
        return rows + 1


@pytest.mark.parametrize(
    ("share", "dims", "says"),
    [(1.0, 16, None), (0.1, 16, None), (1e-3, 16, "nearly one embedding"), (1.0, 1, "on a line")],
)
def test_held_out_embeddings_that_say_nothing(
    share: float, dims: int, says: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls = registry.get("mae")
    ready = plan(preset_job(cls))
    objective: Any = ready.build()
    monkeypatch.setattr(objective, "exported", lambda: Spread(share, dims))
    found = collapsed_on_held_out(objective, ready)
    assert (found is None) if says is None else (found is not None and says in found), found


def test_a_training_says_what_fell() -> None:
    learned = converge(registry.get("simclr"), {"train.epochs": 2, "train.batch_size": 128})
    assert learned.last < learned.first
    assert learned.collapsed is None
