"""What runs keep for procedures: whole heads of split rows, pictures; and what studies say along an axis."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from armillary import collectives, losses
from armillary.evaluation.figures import line_figure
from armillary.objectives.margin_softmax import ArcFace
from armillary.spec.errors import UserError
from armillary.spec.home import DESCRIPTION, WEIGHTS
from armillary.spec.jobs import StudyJob, TrainJob
from armillary.sweeps.axis import lines, place_of
from armillary.testing import tiny
from armillary.testing.gloo_pool import shared_pool
from armillary.training.head_rows import HeadRows
from armillary.training.model import load_head, save_head
from armillary.training.rundir import RunDirectory, RunRecord

JOB = {"objective": {"name": "arcface"}, "train": {"epochs": 1}}


def whole_rows(classes: int) -> tuple[Tensor, int]:
    """A rank's view of all rows, and how many it owns."""
    objective = tiny.build(ArcFace)
    torch.manual_seed(1)
    objective.loss = losses.ArcFace(classes, 8)
    rows = HeadRows(objective, TrainJob.model_validate(JOB))
    assert collectives.world_size() == 2
    return rows.whole()["loss.weight"].detach().clone(), len(rows.rows["loss.weight"])


@pytest.mark.xdist_group("gloo")
@pytest.mark.parametrize("classes", [5, 1])
def test_split_rows_are_put_together(classes: int) -> None:
    torch.manual_seed(1)
    weight = losses.ArcFace(classes, 8).weight.detach()
    both = shared_pool().run(whole_rows, classes)
    assert sum(count for _, count in both) == classes
    for found, _ in both:
        assert torch.equal(found, weight)


def test_a_head_is_kept_and_missed(armillary_home: Path) -> None:
    run = RunDirectory.create(RunRecord(run_id="one", name="one"), "")
    with pytest.raises(UserError, match="run one has no model: it is created"):
        load_head(run)
    (run.path / "model" / DESCRIPTION).write_text('{"objective": "triplet"}')
    (run.path / "model" / WEIGHTS).touch()
    with pytest.raises(UserError, match="run one, of triplet, has no class head"):
        load_head(run)
    save_head(run.path / "model", {"loss.weight": torch.ones(3, 2)})
    assert torch.equal(load_head(run)["loss.weight"], torch.ones(3, 2))


def study() -> StudyJob:
    return StudyJob.model_validate(
        {
            "kind": "study",
            "base": JOB,
            "axis": "data.label_noise",
            "variants": [
                {"name": "arcface 0%"},
                {"name": "arcface 50%", "set": {"data.label_noise": 0.5}},
                {"name": "softmax 50%", "set": {"objective.name": "softmax", "data.label_noise": 0.5}},
            ],
        }
    )


def records() -> list[RunRecord]:
    found = [("arcface 0%", 0.9), ("arcface 0%", 0.8), ("arcface 50%", 0.6), ("softmax 50%", 0.5)]
    return [RunRecord(run_id=str(at), name="x", variant=v, metrics={"m": m}) for at, (v, m) in enumerate(found)]


def test_variants_that_differ_in_the_axis_are_a_line() -> None:
    first, second = lines(study(), records(), "m")
    assert first.name == "arcface"
    assert first.values == {0.0: [0.9, 0.8], 0.5: [0.6]}
    assert first.sentence("noise", "m") == "arcface: m 0.8500 at noise 0, 0.6000 at 0.5 (-0.2500)."
    assert (second.name, second.values) == ("softmax 50%", {0.5: [0.5]})
    figure = line_figure({line.name: line.values for line in (first, second)}, x="noise", y="m")
    drawn = {trace.name: (list(trace.x), list(trace.y)) for trace in figure.data if trace.name}
    places, means = drawn["arcface (2 runs)"]
    assert places == [0.0, 0.5]
    assert means == pytest.approx([0.85, 0.6])
    # The axis is filled by what was measured.
    low, high = figure.layout.yaxis.range
    assert 0.4 < low < 0.5
    assert 0.9 < high < 1


def test_a_line_over_a_decimal_number_is_named_by_the_words_before_it() -> None:
    variants = [{"name": f"alpha {alpha}", "set": {"objective.margin": alpha}} for alpha in (0.1, 0.3)]
    job = StudyJob.model_validate({"kind": "study", "base": JOB, "axis": "objective.margin", "variants": variants})
    found = [RunRecord(run_id=v["name"], name="x", variant=v["name"], metrics={"m": -1.0}) for v in variants]
    (line,) = lines(job, found, "m")
    assert line.name == "alpha"
    low, high = line_figure({line.name: line.values}, x="margin", y="m").layout.yaxis.range
    assert low < -1 < high


@pytest.mark.parametrize("axis", ["data.no_such_key", "data.name", "objective.margin"])
def test_an_axis_is_a_number(axis: str) -> None:
    job = study().model_copy(update={"axis": axis})
    with pytest.raises(UserError, match=axis):
        place_of(job, job.variants[0])
