"""Chains: steps that begin with what earlier ones left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from armillary.spec.errors import UserError
from armillary.spec.jobs import ChainJob
from armillary.spec.loading import load_job
from armillary.sweeps.chains import run_chain, step_job
from armillary.training.rundir import RunDirectory

CHAIN = """
kind: chain
name: small
base:
  data: {name: orl, image_size: [28, 24]}
  backbone: {name: small_convnet, embedding_dim: 32, width: 8}
  objective: {name: simclr_v2, projection_hidden: 24, projection_dim: 8}
  train: {epochs: 1, batch_size: 56, threads: 1}
  tracking: {experiment: chains}
steps:
  - {name: pretrain}
  - name: finetune
    set:
      train.init_from: step:pretrain
      backbone.tail: [24]
      objective.name: softmax
      data.labeled_share: 0.3
  - name: distill
    set: {objective.name: distillation, objective.teacher: step:finetune}
"""


def load(folder: Path, text: str = CHAIN) -> ChainJob:
    (folder / "chain.yaml").write_text(text)
    job = load_job(folder / "chain.yaml")
    assert isinstance(job, ChainJob)
    return job


def test_steps_stand_for_runs(tmp_path: Path) -> None:
    job = load(tmp_path)
    tuned = step_job(job, job.steps[1].set, {"pretrain": "run-1"})
    assert tuned.train.init_from == "run-1"
    assert tuned.objective.name == "softmax"
    assert tuned.objective.options == {}
    distilled = step_job(job, job.steps[2].set, {"pretrain": "run-1", "finetune": "run-2"})
    assert distilled.objective.options == {"teacher": "run-2"}
    assert distilled.data.labeled_share == 1


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("step:pretrain", "step:distill", r"chain.yaml:\d+.*train.init_from: unknown earlier step 'distill'"),
        ("step:finetune", "step:finetun", "did you mean 'finetune'"),
        ("name: finetune", "name: pretrain", "a second step is named 'pretrain'"),
        ("backbone.tail: [24]", "backbone.tail: [0]", "backbone.tail"),
        ("data.labeled_share: 0.3", "data.labelled_share: 0.3", "labeled_share"),
    ],
)
def test_mistakes_are_found_before_anything_runs(tmp_path: Path, old: str, new: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        load(tmp_path, CHAIN.replace(old, new, 1))


def test_the_recipe_has_three_steps() -> None:
    job = load_job("recipes/semi_supervised")
    assert isinstance(job, ChainJob)
    assert [step.name for step in job.steps] == ["pretrain", "finetune", "distill"]
    assert {load_job(f"recipes/{name}").kind for name in ("pretrain", "finetune")} == {"train"}


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_pretrain_fine_tune_distil(tmp_path: Path, orl: Path, ray_cluster: Any) -> None:
    """Three real runs; only the second reads labels, a third of them; none sees the people who are judged."""
    records = run_chain(load(tmp_path))
    assert list(records) == ["pretrain", "finetune", "distill"]
    assert {record.status for record in records.values()} == {"finished"}
    assert [record.variant for record in records.values()] == list(records)
    assert len({record.group for record in records.values()}) == 1
    finetune = load_job(RunDirectory.find(records["finetune"].run_id).path / "job.yaml")
    assert finetune.train.init_from == records["pretrain"].run_id  # type: ignore[union-attr]
    assert "train/agreement" in records["distill"].metrics
    assert (RunDirectory.find(records["pretrain"].run_id).path / "model" / "projector.safetensors").is_file()
