"""``armillary regress`` from job file to exit code, with the cheap real trainer in place of the crews."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from armillary.cli import regress
from armillary.regression.results import latest_result, load_results
from armillary.regression.runner import Runner
from armillary.spec.errors import UserError
from armillary.spec.jobs import ObjectiveSpec, TrainJob, TrainSpec

NIGHTLY = """\
kind: regression
name: nightly
jobs:
  - name: normface
    job: {objective: {name: normface, scale: 16}, data: {name: digits}, optimizer: {lr: 20}}
seeds: [0, 1, 2]
metrics:
  - {name: identification/rank1, tolerance: 0.01}
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runner: Runner) -> str:
    """The job file. Its runs go to the trainer of this folder, which has its own rules about data: no preflight."""
    monkeypatch.setattr(regress, "_crew_runner", lambda _: runner)
    monkeypatch.setattr(regress, "_preflight", lambda _: None)
    path = tmp_path / "nightly.yaml"
    path.write_text(NIGHTLY)
    return str(path)


def call(*arguments: str) -> Result:
    result = CliRunner().invoke(regress.app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_the_whole_story(file: str) -> None:
    first = call("run", file)
    assert first.exit_code == 0
    assert "no baseline" in first.stdout
    assert "armillary regress bless nightly" in first.stdout
    assert call("bless", "nightly", "--why", "first light").exit_code == 0
    assert call("run", file).exit_code == 0
    assert "pass" in call("check", file).stdout

    dropped = call("run", file, "objective.scale=1")
    assert dropped.exit_code == 1
    assert "regressed" in dropped.stdout
    assert "run with overrides: objective.scale=1" in dropped.stdout
    checked = call("check", "nightly", "--json")
    assert checked.exit_code == 1
    report = json.loads(checked.stdout)
    assert (report["verdict"], report["overrides"]) == ("regressed", {"objective.scale": 1})
    assert report["decisions"][0]["change"] < -0.1

    listed = call("history", "nightly").stdout
    assert "first light" in listed
    assert "normface (3)" in listed
    assert json.loads(call("history", file, "--json").stdout)["blessings"][0]["why"] == "first light"


def test_overrides_of_the_regression_itself(file: str) -> None:
    assert call("run", file, "seeds=[4]", "train.epochs=3").exit_code == 0
    assert [run.seed for run in latest_result("nightly").runs] == [4]
    assert latest_result("nightly").overrides == {"train.epochs": 3}
    call("run", file)
    call("bless", "nightly", "--why", "three seeds")
    call("run", file, "objective.scale=1")
    assert call("check", file).exit_code == 1
    assert call("check", file, "metrics.0.tolerance=0.9").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "nightly.yaml", "objective.scale"), "found 'objective.scale'"),
        (("run", "nightly.yaml", "trian.epochs=3"), "trian"),
        (("run", "nightly.yaml", "seeds=[0,0]"), "a seed is listed twice"),
        (("run", "absent.yaml"), "absent.yaml"),
        (("check", "nightly.yaml", "objective.scale=1"), "check trains nothing"),
        (("check", "nightly", "confidence=0.9"), "is a name"),
        (("check", "nightly"), "has no result yet"),
        (("bless", "nightly", "--why", "x"), "has no result yet"),
    ],
)
def test_mistakes_write_nothing(file: str, arguments: tuple[str, ...], words: str, armillary_home: Path) -> None:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert words in str(caught.value)
    assert not armillary_home.exists()


def test_a_train_job_is_no_regression(file: str, tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("objective: {name: normface}\n")
    with pytest.raises(UserError, match="found 'train'"):
        call("run", "train.yaml")


def test_jobs_share_crews_only_with_the_same_workers() -> None:
    objective = ObjectiveSpec(name="arcface")
    jobs = [TrainJob(objective=objective, train=TrainSpec(workers=count)) for count in (1, 2, 1)]
    assert regress._worker_groups(jobs) == [[0, 2], [1]]


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_a_planted_drop_on_real_crews(
    tmp_path: Path, armillary_home: Path, orl: Path, ray_cluster: Mapping[str, float]
) -> None:
    """Ray, DeepSpeed and the ORL faces: an untrained network in place of a trained one is an alarm."""
    path = tmp_path / "faces.yaml"
    path.write_text(
        "kind: regression\nname: faces\nseeds: [0, 1, 2]\nconcurrent: 1\n"
        "jobs: [{job: {objective: {name: arcface, scale: 16}, data: {image_size: [56, 48]},"
        " train: {epochs: 12, precision: bf16}}}]\n"
        "metrics: [{name: verification/auc, tolerance: 0.005}]\n"
    )
    assert call("run", str(path)).exit_code == 0
    call("bless", "faces", "--why", "first light")
    assert call("run", str(path), "train.epochs=0").exit_code == 1
    (decision,) = json.loads(call("check", "faces", "--json").stdout)["decisions"]
    assert (decision["verdict"], decision["method"]) == ("regressed", "paired")
    assert latest_result("faces").runs[0].fingerprint


@pytest.mark.slow
def test_an_objective_that_does_not_exist_is_refused_before_anything_is_written(
    tmp_path: Path, armillary_home: Path
) -> None:
    path = tmp_path / "nightly.yaml"
    path.write_text(NIGHTLY.replace("name: normface, scale", "name: normfaec, scale"))
    with pytest.raises(UserError, match="unknown objective 'normfaec'"):
        call("run", str(path))
    assert not list(armillary_home.rglob("*.json"))
    assert load_results("nightly") == []
