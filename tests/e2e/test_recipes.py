"""Every registered objective fits its family's recipe, changed in little but the name; some train by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from armillary.objectives import card, names, registry
from armillary.spec.jobs import TrainJob
from armillary.spec.loading import apply_overrides, load_job
from armillary.testing.convergence import preset_job
from armillary.training.api import Submission
from armillary.training.crew import CrewPool
from armillary.training.preflight import plan

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]

# One epoch of few images: what is tested is that everything fits together.
SHORT = {"train.epochs": 1, "train.threads": 1, "train.checkpoint_every": 0}
SMALL_DATA: dict[str, dict[str, Any]] = {
    "faces": {"data.name": "identities_small"},
    "pretrain": {"data.labeled_share": 0.2},
}


def recipe_job(name: str) -> TrainJob:
    """The objective's recipe as its card names it, cut short."""
    cls = registry.get(name)
    recipe = card.recipe(cls)
    if recipe is None:
        return preset_job(cls)
    job = load_job(f"recipes/{recipe}", [f"objective.name={name}", *card.overrides(cls)])
    assert isinstance(job, TrainJob)
    return apply_overrides(job, {**SHORT, **SMALL_DATA.get(recipe, {})})


def test_every_family_has_a_recipe() -> None:
    without = [name for name in names() if card.recipe(registry.get(name)) is None]
    assert {registry.get(name).needs.recipe for name in without} == {"frames"}


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
