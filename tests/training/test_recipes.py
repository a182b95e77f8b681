"""The recipes that ship start every objective of their families by a change of its name."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from armillary.objectives import names, registry
from armillary.spec.jobs import TrainJob
from armillary.spec.loading import load_job
from armillary.testing.tiny import SMALL
from armillary.training.preflight import plan


def without_labels() -> list[str]:
    """Registered objectives on single images that need nothing but the images."""
    found = []
    for name in names():
        needs = registry.get(name).needs
        plain = needs.modality == "image" and not needs.fields and needs.sampler == "random"
        if plain and needs.recipe != "frames":
            found.append(name)
    return found


def pretrain(name: str) -> TrainJob:
    fields = registry.get(name).Hyperparameters.model_fields
    small = {key: value for key, value in SMALL.items() if key in fields and key not in ("cell", "patches")}
    overrides = [f"objective.name={name}", "train.batch_size=8", "train.epochs=1"]
    overrides += [f"objective.{key}={json.dumps(value)}" for key, value in small.items()]
    job = load_job("recipes/pretrain", overrides)
    assert isinstance(job, TrainJob)
    return job


def test_there_are_methods_without_labels() -> None:
    assert {"simclr", "mae", "maskfeat", "rotation", "jigsaw", "cpc", "dim", "amdim"} <= set(without_labels())


# As they are written, with the batches and hyperparameters that users get.
FAMILIES = {
    "retrieval": ("pairwise", "tuple", "contrastive_supervised", "set_based"),
    "cross_resolution": ("cross_resolution",),
    "image_text": ("image_text",),
    "sentences": ("text",),
}
BY_FAMILY = [
    (recipe, name) for recipe, families in FAMILIES.items() for name in names() if registry.get(name).family in families
]


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "name"), BY_FAMILY)
def test_recipes_start_by_name(recipe: str, name: str, armillary_home: Path) -> None:
    job = load_job(f"recipes/{recipe}", [f"objective.name={name}"])
    assert isinstance(job, TrainJob)
    takes_one_step(job)


@pytest.mark.slow
@pytest.mark.parametrize("name", without_labels())
def test_pretraining_starts_by_name(name: str, armillary_home: Path) -> None:
    """One real step: the recipe's data, the method's own views, the default network of its kind."""
    takes_one_step(pretrain(name))


def takes_one_step(job: TrainJob) -> None:
    ready = plan(job)
    torch.manual_seed(0)
    objective = ready.build()
    batches = ready.batches()
    objective.before_epoch(0, batches.samples)
    loss = objective(next(iter(batches.epoch(0)))).loss
    loss.backward()
    assert math.isfinite(float(loss.detach()))
    # Skip-gram's first step moves its output vectors alone.
    moved = objective if "every_parameter_learns" in objective.waivers else objective.encoder
    assert any(bool(p.grad.abs().max() > 0) for p in moved.parameters() if p.grad is not None)
