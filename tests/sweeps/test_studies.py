"""Studies: the matrix, the comparison, the report."""

from __future__ import annotations

from pathlib import Path

import pytest

from armillary.cli.main import main
from armillary.spec.errors import UserError
from armillary.spec.jobs import StudyJob
from armillary.spec.loading import dump_job
from armillary.sweeps.matrix import run_matrix
from armillary.sweeps.report import answers, study_board, write_report
from armillary.sweeps.studies import expand, find_study, run_study, studies_dir, unfinished_studies
from armillary.training.api import Submission
from armillary.training.crew import CrewPool
from armillary.training.records import create_run
from armillary.training.rundir import RunDirectory, claimed


def test_the_matrix(study_job: StudyJob) -> None:
    runs = expand(study_job)
    count = {
        name: sum(variant == name for variant, _ in runs) for name in ("arcface", "normface", "pixels", "untrained")
    }
    assert count == {"arcface": 4, "normface": 4, "pixels": 2, "untrained": 4}
    assert {(job.data.fold, job.seed) for variant, job in runs if variant == "normface"} == {
        (0, 0), (0, 1), (1, 0), (1, 1),
    }  # fmt: skip
    assert all(job.objective.name == "normface" for variant, job in runs if variant == "normface")


def test_a_comparison_with_nobody(study_job: StudyJob) -> None:
    job = study_job.model_copy(update={"compare": ("arcface", "cosface")})
    with pytest.raises(UserError, match="cosface"):
        run_study(job)


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_a_study_is_run_ranked_and_reported(study_job: StudyJob, orl: Path, crews: CrewPool) -> None:
    job = study_job.model_copy(update={"folds": (0,)})
    result = run_study(job, pool=crews)
    assert len(result.records) == 7
    board = study_board(job, result)
    assert {group.variant for group in board.groups} == {"arcface", "normface", "pixels", "untrained"}
    assert [group.baseline for group in board.groups if group.variant == "pixels"] == [True]
    sentences = answers(job, board)
    means = {group.variant: group.metrics["verification/auc"].mean for group in board.groups}
    assert f"{means['arcface'] - means['normface']:+.4f}" in sentences[0]
    page = write_report(job, result).read_text()
    assert "Does it work?" in page
    assert "normface" in page
    assert "<script src" not in page
    assert "<link" not in page


def begun(job: StudyJob, name: str = "20260101-000000-tiny-0000") -> Path:
    """What a study leaves that was killed before its first run."""
    folder = studies_dir() / name
    folder.mkdir(parents=True)
    (folder / "study.yaml").write_text(dump_job(job))
    return folder


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_a_killed_study_trains_the_runs_it_lacks(study_job: StudyJob, orl: Path, crews: CrewPool) -> None:
    job = study_job.model_copy(update={"folds": (0,), "seeds": (0,)})
    folder = begun(job)
    group, runs = f"study/{folder.name}", expand(job)
    # It was killed while the second run was trained: two are finished, one is not, one was never begun.
    finished = [Submission(run, group=group, variant=name) for name, run in (runs[0], runs[2])]
    kept = run_matrix(finished, 1, pool=crews)
    lost = create_run(runs[1][1], "", group=group, variant=runs[1][0])
    lost.update(status="running")

    study_id, stored = find_study(unfinished_studies()[-1].name)
    assert (study_id, stored) == (folder.name, job)
    missing: list[int] = []
    result = run_study(stored, resume=study_id, pool=crews, on_start=lambda _, count: missing.append(count))
    assert missing == [2]
    assert [record.variant for record in result.records] == [name for name, _ in runs]
    assert [result.records[0], result.records[2]] == kept
    assert result.records[1].run_id != lost.run_id
    assert RunDirectory.find(lost.run_id).record().status == "failed"
    assert sum(len(group.run_ids) for group in study_board(job, result).groups) == 4
    write_report(job, result)
    with pytest.raises(UserError, match="finished"):
        find_study(study_id)


def test_a_study_goes_on_as_it_was_begun(study_job: StudyJob, capsys: pytest.CaptureFixture[str]) -> None:
    study_id = begun(study_job).name
    assert find_study(study_id[:8], ["concurrent=1"])[1].concurrent == 1
    with pytest.raises(UserError, match="as it was begun"):
        find_study(study_id, ["base.train.epochs=9"])
    with pytest.raises(UserError, match="nobody"):
        find_study("nobody")
    with claimed(studies_dir() / study_id, "", 0), pytest.raises(UserError, match="another process"):
        run_study(study_job, resume=study_id)
    # The command takes the newest of what is unfinished, runs and studies alike.
    with pytest.raises(SystemExit) as caught:
        main(["run", "--resume", "last", "seeds=[5]"])
    assert caught.value.code == 2
    assert "a study goes on as it was begun" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "changes", [{"metrics": ("verification/auc", "knn/top1")}, {"against": ("train/loss", "knn/top1")}]
)
def test_metrics_that_no_run_measures_are_refused_before_any_trains(
    study_job: StudyJob, changes: dict[str, object]
) -> None:
    with pytest.raises(UserError, match="no run measures 'knn/top1'") as caught:
        run_study(study_job.model_copy(update=changes))
    assert caught.value.key == next(iter(changes))
    assert unfinished_studies() == []


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_a_study_that_cannot_run_leaves_nothing(study_job: StudyJob, crews: CrewPool) -> None:
    data = study_job.base.data.model_copy(update={"name": "nowhere"})
    base = study_job.base.model_copy(update={"data": data})
    with pytest.raises(UserError, match="nowhere"):
        run_study(study_job.model_copy(update={"base": base}), pool=crews)
    assert unfinished_studies() == []
