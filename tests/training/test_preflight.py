"""Whatever is wrong with a job is said before anything starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from armillary.data.views.geometry import output_size
from armillary.objectives import registry
from armillary.spec.errors import UserError
from armillary.spec.jobs import TrainJob
from armillary.spec.loading import load_job
from armillary.training.preflight import check_capacity, plan, with_backbone

WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"objective__name": "arcfase"}, "objective.name", "'arcface'"),
    ({"objective__margin": 9}, "objective.margin", "9"),
    ({"objective__margin": "wide"}, "objective.margin", "wide"),
    ({"objective__marjin": 0.2}, "objective.marjin", "'margin'"),
    ({"backbone__name": "resnet"}, "backbone.name", "small_convnet"),
    ({"backbone__name": "timm/resnet17"}, "backbone.name", "resnet18"),
    ({"backbone__widht": 4}, "backbone.widht", "'width'"),
    ({"views__name": "facez"}, "views", "faces"),
    ({"views__flipp": 1}, "views.flipp", "flip"),
    ({"evaluate__protocols": ["verificatoin"]}, "evaluate.protocols", "verification"),
    ({"evaluate__protocols": ["knn"]}, "evaluate.protocols", "sample"),
    ({"data__name": "nowhere"}, "data.name", "orl"),
    ({"data__fold": 7}, "data.fold", "7"),
    ({"train__workers": 1000, "train__batch_size": 1000}, "train.workers", "1000 workers x 1 CPU = 1000 CPU"),
    ({"train__gpus_per_worker": 1}, "train.gpus_per_worker", "GPU"),
    ({"train__batch_size": 57, "train__accumulate": 2}, "train.batch_size", "multiple of 2"),
    ({"objective__name": "supcon", "train__accumulate": 2}, "train.accumulate", "supcon"),
    ({"objective__name": "supcon", "train__sample_rate": 0.1}, "train.sample_rate", "no class head"),
    ({"train__sample_rate": 0}, "train.sample_rate", "0"),
    ({"objective": {"name": "deepid2_plus", "stages": [5]}}, "objective.stages", "no earlier stage 5"),
    ({"objective": {"name": "pcl", "clusters": [100_000]}}, "objective.clusters", "100000 clusters for"),
    ({"backbone__name": "pixels"}, "train.epochs", "nothing to train"),
]


@pytest.mark.parametrize(("overrides", "key", "says"), WRONG, ids=[next(iter(item[0])) for item in WRONG])
def test_a_mistake_names_its_key(
    tiny_job: Any, orl: Path, armillary_home: Path, overrides: dict[str, Any], key: str, says: str
) -> None:
    before = sorted(armillary_home.rglob("*"))
    with pytest.raises(UserError) as caught:
        plan(tiny_job(**overrides))
    assert key in str(caught.value)
    assert says in str(caught.value)
    assert sorted(armillary_home.rglob("*")) == before


def test_a_field_that_the_data_lacks(tiny_job: Any, orl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from armillary.objectives import Needs, get

    monkeypatch.setattr(get("arcface"), "needs", Needs(fields=("label", "quality")))
    with pytest.raises(UserError, match="no 'quality'"):
        plan(tiny_job())


def test_an_encoder_without_what_the_objective_uses(tiny_job: Any, orl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from armillary.objectives import Needs, get

    monkeypatch.setattr(get("arcface"), "needs", Needs(fields=("label",), encoder="tokens"))
    with pytest.raises(UserError, match=r"backbone.name: arcface uses the encoder's patch tokens(.|\n)*small_vit"):
        plan(tiny_job())
    plan(tiny_job(backbone={"name": "small_vit", "embedding_dim": 16, "patch": 4}))


def test_local_crops_and_an_encoder_for_one_size(tiny_job: Any, orl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simclr = registry.get("simclr")
    monkeypatch.setattr(simclr, "needs", replace(simclr.needs, views=6))
    job = tiny_job(views__name="multicrop_small", objective__name="simclr", objective__margin=None)
    job = job.model_copy(update={"objective": job.objective.model_validate({"name": "simclr"})})
    with pytest.raises(UserError, match=r"the views are 28 x 24 and 16 x 12 px, and small_convnet takes one size only"):
        plan(job)
    mean = job.model_copy(update={"backbone": job.backbone.model_validate({"name": "small_convnet", "pool": "mean"})})
    plan(mean)
    vit = job.model_copy(update={"backbone": job.backbone.model_validate({"name": "small_vit", "patch": 4})})
    plan(vit)  # half of 28 x 24 px, to multiples of 4
    vit = vit.model_copy(update={"views": job.views.model_validate({"name": "multicrop_small", "local_size": 14})})
    with pytest.raises(UserError, match=r"views.local_size: patches of 4 x 4 px do not divide images of 14 x 12 px"):
        plan(vit)


def test_a_recipe_of_other_views_than_asked_for(tiny_job: Any, orl: Path) -> None:
    job = tiny_job(views__name="multicrop_small", backbone__pool="mean")
    with pytest.raises(UserError, match=r"views.name: the recipe multicrop_small makes 6 views, arcface compares 1"):
        plan(job)


@pytest.mark.parametrize(
    ("objective", "network"),
    [
        ("simclr", "small_convnet"),
        ("mae", "small_vit"),
        ("simcse", "text_transformer"),
        ("graphcl", "gin"),
        ("simgcl", "lightgcn"),
    ],
)
def test_a_network_that_fits_the_objective(objective: str, network: str) -> None:
    job = TrainJob.model_validate({"data": {"name": "digits"}, "objective": {"name": objective}})
    auto = job.model_copy(update={"backbone": job.backbone.model_validate({"name": "auto", "embedding_dim": 32})})
    assert with_backbone(auto).backbone.model_dump() == {**auto.backbone.model_dump(), "name": network}
    assert with_backbone(job) is job


def test_the_pretraining_recipe_takes_methods_on_patches_by_name() -> None:
    for objective in ("mae", "maskfeat", "ibot", "dinov2"):
        job = load_job("recipes/pretrain", [f"objective.name={objective}"])
        assert isinstance(job, TrainJob)
        ready = plan(job)
        assert ready.job.backbone.name == "small_vit"
        assert output_size(ready.views.recipe(ready.needs.views - 1), 32, 32) in ((32, 32), (12, 12))


def test_the_sum_that_does_not_fit(tiny_job: Any) -> None:
    job = tiny_job(train__workers=4, train__gpus_per_worker=2)
    with pytest.raises(UserError, match=r"4 workers x 2 GPU = 8 GPU, but the cluster has 4") as caught:
        check_capacity(job, {"CPU": 8.0, "GPU": 4.0})
    assert "1 to 2 workers" in str(caught.value)


def test_a_good_job_has_its_parts(tiny_job: Any, orl: Path) -> None:
    ready = plan(tiny_job())
    assert ready.data.num_classes == 28
    assert ready.needs.fields == ("label",)
    assert ready.build().encoder is not None
