"""Crews: many runs, one start."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from armillary.spec.errors import UserError
from armillary.training.api import Submission
from armillary.training.crew import CrewPool
from armillary.training.desk import Desk
from armillary.training.launch import run_job
from armillary.training.rundir import all_runs


def test_the_desk_hands_out_each_run_once(tiny_job: Any) -> None:
    desk = Desk()
    job = tiny_job()
    first, second = desk.submit("/runs/a", job), desk.submit("/runs/b", job)
    assert [desk.next(0)[0], desk.next(1)[0]] == ["/runs/a", "/runs/b"]
    assert desk.next(0) == "wait"
    assert desk.report(first, 1, {"x": 1.0}) == "continue"
    desk.stop(first)
    assert desk.report(first, 2, {"x": 2.0}) == "stop"
    desk.finish(first, None)
    assert desk.poll(first, 1) == ([(2, {"x": 2.0})], True, None)
    desk.crew_lost(1, "gone")
    assert desk.poll(second, 0) == ([], True, "gone")
    desk.close()
    assert desk.next(0) == "close"


def test_a_run_stopped_while_it_waits_never_starts(tiny_job: Any) -> None:
    desk = Desk()
    run_id = desk.submit("/runs/a", tiny_job())
    desk.stop(run_id)
    assert desk.next(0) == "wait"
    assert desk.poll(run_id, 0) == ([], True, None)


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
class TestRealCrews:
    """On the session's crews."""

    def test_a_crew_gives_what_a_run_of_its_own_gives(self, tiny_job: Any, orl: Path, crews: CrewPool) -> None:
        """Clean slate: a job alone, on a crew, and on a crew after other jobs, ends in the same numbers."""
        job = tiny_job()
        other = tiny_job(seed=5, objective__name="normface", objective__scale=16)
        alone = run_job(job).metrics["verification/auc"]
        records = crews.run_all([Submission(job), Submission(other), Submission(job)])
        assert [record.status for record in records] == ["finished"] * 3
        values = [record.metrics["verification/auc"] for record in records]
        assert values[0] == values[2] == alone
        assert values[1] != alone

    def test_a_failed_run_leaves_the_crew_fit(self, tiny_job: Any, orl: Path, crews: CrewPool) -> None:
        bad = tiny_job(objective__name="softmax", optimizer__name="sgd", optimizer__lr=100, optimizer__warmup_epochs=0)
        *failed, fine = crews.run_all([Submission(bad), Submission(bad), Submission(tiny_job(train__epochs=1))])
        assert [record.status for record in failed] == ["failed"] * 2
        assert re.search(r"optimizer\.lr|training diverged", failed[0].error or "")
        assert fine.status == "finished"

    def test_a_bad_job_starts_nothing(self, tiny_job: Any, orl: Path, crews: CrewPool) -> None:
        with pytest.raises(UserError, match=r"objective\.margin"):
            crews.run_all([Submission(tiny_job()), Submission(tiny_job(objective__margin=9))])
        assert all_runs() == []
