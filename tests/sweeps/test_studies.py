"""Studies: the matrix, the comparison, the report."""

from __future__ import annotations

from pathlib import Path

import pytest

from armillary.spec.errors import UserError
from armillary.spec.jobs import StudyJob
from armillary.sweeps.report import answers, study_board, write_report
from armillary.sweeps.studies import expand, run_study
from armillary.training.crew import CrewPool


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
