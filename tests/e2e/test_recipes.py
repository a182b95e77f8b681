"""Every registered objective fits its family's recipe, changed in little but the name; some train by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from armillary.objectives import names, registry
from armillary.spec.jobs import TrainJob
from armillary.spec.loading import apply_overrides, load_job
from armillary.testing.convergence import preset_job
from armillary.training.api import Submission
from armillary.training.crew import CrewPool
from armillary.training.preflight import plan

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
    "siamese_pose": {"data.name": "identities_small", "data.split": "identity", "evaluate.protocols": ["verification"]},
    **{name: {"views.local_size": 0.5} for name in ("ibot", "dinov2", "dinov3_gram", "pq")},
    "maskfeat": {"objective.cell": 4},
}


def recipe_job(name: str) -> TrainJob:
    """The objective's recipe, cut short."""
    cls = registry.get(name)
    if cls.needs_for(cls.Hyperparameters()).recipe == "frames":
        return preset_job(cls)  # videos are another dataset
    # con2r is a graph's term on images.
    recipe = "retrieval" if name == "con2r" else RECIPES[cls.family]
    job = load_job(f"recipes/{recipe}", [f"objective.name={name}"])
    assert isinstance(job, TrainJob)
    changes = {**SHORT, **SMALL_DATA.get(recipe, {}), **NEEDED.get(name, {})}
    if cls.needs.encoder == "tokens":
        changes["backbone.name"] = "small_vit"
    return apply_overrides(job, changes)


def test_every_family_has_a_recipe() -> None:
    assert {registry.get(name).family for name in names()} <= set(RECIPES)


@pytest.mark.parametrize("name", names())
def test_every_objective_fits_its_recipe(name: str) -> None:
    ready = plan(recipe_job(name))
    ready.build()
    assert next(iter(ready.batches().epoch(0))).views


def test_recipes_train(crews: CrewPool, orl: Path) -> None:
    chosen = ["adaface", "multi_similarity", "siamese_low_res", "vicreg"]
    records = crews.run_all([Submission(recipe_job(name)) for name in chosen])
    failed = {name: record.error for name, record in zip(chosen, records, strict=True) if record.status != "finished"}
    assert failed == {}
