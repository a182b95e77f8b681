"""Every registered objective trains by its family's recipe, changed in nothing but the name: Ray, DeepSpeed and all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from armillary.objectives import names, registry
from armillary.spec.jobs import TrainJob
from armillary.spec.loading import apply_overrides, load_job
from armillary.training.api import Submission
from armillary.training.crew import CrewPool

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]

FACES = "margin_softmax softmax adaptive_margin queue_augmented curriculum probabilistic set_based generative"
LABEL_FREE = (
    "contrastive_views mutual_information decorrelation self_distillation dense pretext clustering masked_modelling "
    "density_ratio cross_modal augmentation"
)
RECIPES = {
    **dict.fromkeys(FACES.split(), "faces"),
    **dict.fromkeys(["tuple", "pairwise", "contrastive_supervised"], "retrieval"),
    "cross_resolution": "cross_resolution",
    "text": "sentences",
    "image_text": "image_text",
    "graph": "graphs",
    "interactions": "recommendation",
    **dict.fromkeys(LABEL_FREE.split(), "pretrain"),
}
# One epoch of few images: what is tested is that everything fits together.
SHORT = {"train.epochs": 1, "train.threads": 1, "train.checkpoint_every": 0}
SMALL_DATA: dict[str, dict[str, Any]] = {
    "faces": {"data.name": "identities_small"},
    "pretrain": {"data.labeled_share": 0.2},
}
# What the recipes' own words ask for.
NEEDED: dict[str, dict[str, Any]] = {
    "focusface": {},
    "siamese_pose": {"data.name": "identities_small", "data.split": "identity", "evaluate.protocols": ["verification"]},
    "temporal_contrastive": {"data.name": "identities_video"},
    "frame_order": {"data.name": "identities_video"},
    "distillation": {},
}


def recipe_job(name: str) -> TrainJob:
    """The objective's recipe, cut short."""
    cls = registry.get(name)
    recipe = RECIPES[cls.family]
    job = load_job(f"recipes/{recipe}", [f"objective.name={name}"])
    assert isinstance(job, TrainJob)
    changes = {**SHORT, **SMALL_DATA.get(recipe, {}), **NEEDED.get(name, {})}
    if cls.needs.encoder == "tokens":
        changes["backbone.name"] = "small_vit"
    return apply_overrides(job, changes)


def test_every_family_has_a_recipe() -> None:
    assert {registry.get(name).family for name in names()} <= set(RECIPES)


@pytest.mark.timeout(1200)
def test_every_objective_trains_by_its_recipe(crews: CrewPool, orl: Path) -> None:
    chosen = names()
    records = crews.run_all([Submission(recipe_job(name)) for name in chosen])
    failed = {name: record.error for name, record in zip(chosen, records, strict=True) if record.status != "finished"}
    assert failed == {}
