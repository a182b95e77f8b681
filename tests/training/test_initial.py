"""Training that starts from another run's encoder: what is loaded, what is refused, few labels, the middle layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from armillary.components.heads import Projector
from armillary.components.tail import Tail, TailedEncoder
from armillary.spec.errors import UserError
from armillary.spec.jobs import TrainJob
from armillary.spec.loading import dump_job
from armillary.training.api import Submission
from armillary.training.crew import crew_pool
from armillary.training.model import load_encoder, load_projector, save_encoder, save_projector
from armillary.training.preflight import plan
from armillary.training.rundir import RunDirectory, RunRecord

SIMCLR = {"name": "simclr", "projection_hidden": 24, "projection_dim": 8}


def with_objective(job: TrainJob, objective: dict[str, Any]) -> TrainJob:
    return job.model_copy(update={"objective": job.objective.model_validate(objective)})


@pytest.fixture
def simclr(tiny_job: Any) -> TrainJob:
    return with_objective(tiny_job(), SIMCLR)


def finished(job: TrainJob, run_id: str = "20260101-pretrained") -> tuple[RunDirectory, dict[str, Tensor]]:
    """A run's folder as training leaves it, with the weights of another seed; and those."""
    torch.manual_seed(1)
    run = RunDirectory.create(RunRecord(run_id=run_id, name=job.name, status="finished"), dump_job(job))
    objective = plan(job).build()
    for buffer in objective.encoder.buffers():
        if buffer.is_floating_point():
            buffer.add_(0.5)
    save_encoder(run.path / "model", objective.encoder, job, 1, (28, 24))
    save_projector(run.path / "model", objective)
    return run, {name: value.clone() for name, value in objective.encoder.state_dict().items()}


def test_the_encoder_is_the_runs(tiny_job: Any, simclr: TrainJob, orl: Path) -> None:
    run, state = finished(simclr)
    started = plan(tiny_job(train__init_from=run.run_id[:10])).build().encoder.state_dict()
    assert started.keys() == state.keys()
    assert all(torch.equal(started[name], value) for name, value in state.items())
    fresh = plan(tiny_job()).build().encoder.state_dict()
    assert not all(torch.equal(fresh[name], value) for name, value in state.items())


def test_a_teacher_starts_as_the_run_too(tiny_job: Any, simclr: TrainJob, orl: Path) -> None:
    run, state = finished(simclr)
    byol = with_objective(tiny_job(train__init_from=run.run_id), {"name": "byol", "projection_hidden": 16})
    teacher = plan(byol).build().get_submodule("teacher.encoder").state_dict()
    assert all(torch.equal(teacher[name], value) for name, value in state.items())


def test_fine_tuning_from_the_middle_of_the_projector(tiny_job: Any, simclr: TrainJob, orl: Path) -> None:
    """At step 0 the features are the pretrained run's middle features."""
    run, state = finished(simclr)
    job = tiny_job(train__init_from=run.run_id, backbone__tail=[24])
    encoder = plan(job).build().encoder.eval()
    assert isinstance(encoder, TailedEncoder)
    projector = Projector(32, 24, 8, last_norm=True).eval()
    projector.load_state_dict(load_projector(run))
    pretrained = plan(simclr).build().encoder.eval()
    pretrained.load_state_dict(state)
    images = torch.rand(3, 1, 28, 24)
    expected = pretrained(images)
    for layer in list(projector)[:3]:
        expected = layer(expected)
    torch.testing.assert_close(encoder(images), expected)
    # A run whose encoder has the tail already hands it on.
    again, tailed = finished(job, "20260102-tuned")
    started = plan(tiny_job(train__init_from=again.run_id, backbone__tail=[24])).build().encoder.state_dict()
    assert all(torch.equal(started[name], value) for name, value in tailed.items())


def test_a_tails_layers_have_the_projectors_names() -> None:
    names = Projector(6, 5, 3, layers=3, last_norm=True).state_dict().keys()
    assert [name for name in Tail(6, [5, 5]).state_dict() if name not in names] == []
    assert Tail(6, [5, 4])(torch.rand(3, 6)).shape == (3, 4)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"train__init_from": "20270101"}, "train.init_from: unknown run '20270101'"),
    (
        {"backbone__width": 12},
        r"init_from: run .* has another network: small_convnet \(embedding_dim 32, width 8\)",
    ),
    ({"backbone": {"name": "small_vit", "embedding_dim": 32}}, "has another network"),
    ({"data__image_size": [32, 32]}, r"1 x 28 x 24; the job's is .* 1 x 32 x 32"),
    ({"backbone__tail": [20]}, r"backbone.tail: .* no projector whose first layers(.|\n)*the first of \[24\]"),
    ({"data__fold": 1}, "train.init_from: run .* was trained on images that this job evaluates: its data are fold 0"),
    ({"data__holdout": "validation"}, "was trained on images that this job evaluates"),
    ({"data__split": "sample", "evaluate__protocols": ["knn"]}, "was trained on images that this job evaluates"),
]


@pytest.mark.parametrize(("overrides", "says"), WRONG, ids=[next(iter(item[0])) for item in WRONG])
def test_what_does_not_fit_is_refused(
    tiny_job: Any, simclr: TrainJob, orl: Path, overrides: dict[str, Any], says: str
) -> None:
    run, _ = finished(simclr)
    with pytest.raises(UserError, match=says):
        plan(tiny_job(**{"train__init_from": run.run_id, **overrides}))


def test_what_an_earlier_ancestor_saw_counts_too(tiny_job: Any, simclr: TrainJob, orl: Path) -> None:
    """Embeddings judged on fold 1 must not come from a chain that began on fold 0."""
    first, _ = finished(simclr)
    second, _ = finished(simclr.model_copy(update={"data": simclr.data.model_copy(update={"fold": 1})}), "20260102-b")
    text = (second.path / "job.yaml").read_text().replace("init_from: null", f"init_from: {first.run_id}")
    (second.path / "job.yaml").write_text(text)
    with pytest.raises(UserError, match=f"run {first.run_id} was trained on images"):
        plan(tiny_job(train__init_from=second.run_id, data__fold=1))


def test_a_run_without_a_model(tiny_job: Any, simclr: TrainJob, orl: Path) -> None:
    run = RunDirectory.create(RunRecord(run_id="20260101-half", name="half", status="stopped"), dump_job(simclr))
    with pytest.raises(UserError, match="has no model: it is stopped"):
        plan(tiny_job(train__init_from=run.run_id))


def test_another_dataset_may_be_fine_tuned_on(tiny_job: Any, simclr: TrainJob, orl: Path) -> None:
    run, _ = finished(simclr)
    job = tiny_job(train__init_from=run.run_id, data={"name": "digits", "split": "sample", "image_size": [28, 24]})
    job = job.model_copy(update={"evaluate": job.evaluate.model_copy(update={"protocols": ("knn",)})})
    assert plan(job).data.name == "digits"


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_from_a_sharded_pretraining_to_few_labels(tiny_job: Any, simclr: TrainJob, orl: Path, ray_cluster: Any) -> None:
    """Pre-trained on two workers at stage 3, fine-tuned on one from the projector's first layer, all by real runs."""
    two = simclr.model_copy(update={"train": simclr.train.model_copy(update={"workers": 2, "zero": 3})})
    with crew_pool(two, 1) as pair:
        (pretrained,) = pair.run_all([Submission(two)])
    assert pretrained.status == "finished", pretrained.error
    start = tiny_job(train__init_from=pretrained.run_id, backbone__tail=[24], data__labeled_share=0.3, train__epochs=0)
    trained = tiny_job(
        train__init_from=pretrained.run_id, backbone__tail=[24], data__labeled_share=0.3, train__batch_size=28
    )
    with crew_pool(start, 1) as crew:
        records = crew.run_all([Submission(start), Submission(trained)])
    assert [record.status for record in records] == ["finished"] * 2, [record.error for record in records]
    before, after = (load_encoder(RunDirectory.find(record.run_id)).state_dict() for record in records)
    run = RunDirectory.find(pretrained.run_id)
    theirs = {f"encoder.{name}": value for name, value in load_encoder(run).state_dict().items()}
    theirs |= {f"tail.{name}": value for name, value in load_projector(run).items() if "1." in name}
    assert all(torch.equal(before[name], value) for name, value in theirs.items() if name in before)
    assert before.keys() <= theirs.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before if name.endswith("weight"))
    assert records[1].metrics["train/loss"] > 0
