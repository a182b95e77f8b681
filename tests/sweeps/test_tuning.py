"""Sweeps: Optuna, Tune and crews together, and a sweep that was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from armillary.spec.errors import UserError
from armillary.spec.jobs import SweepJob
from armillary.spec.loading import dump_job
from armillary.sweeps.tuning import check_sweep, find_sweep, read_result, run_sweep, sweeps_dir
from armillary.training.crew import CrewPool
from armillary.training.rundir import all_runs


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"space": {"objective.marjin": {"low": 0.1, "high": 0.2}}}, "marjin"),
        ({"space": {"objective.margin": {"low": 0.1, "high": 9}}}, "objective.margin"),
        ({"metric": "knn/top1"}, "metric"),
        ({"space": {"objective.margin": {"low": 0.1}}}, "low"),
    ],
)
def test_a_sweep_that_cannot_run(sweep_job: SweepJob, orl: Path, change: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError) as caught:
        check_sweep(sweep_job.model_copy(update=change))
    assert key in str(caught.value)
    assert not sweeps_dir().exists()


def test_early_stopping_gets_the_metric_in_time(sweep_job: SweepJob, orl: Path) -> None:
    base, _, _ = check_sweep(sweep_job)
    assert base.evaluate.every == sweep_job.grace_epochs


def test_no_sweep_to_resume() -> None:
    with pytest.raises(UserError, match="no unfinished sweep"):
        find_sweep(None)


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
class TestRealSweeps:
    """On the session's cluster."""

    def test_a_sweep_finds_and_records(self, sweep_job: SweepJob, orl: Path, crews: CrewPool) -> None:
        import optuna

        finished: list[str] = []
        reports: list[tuple[str, int]] = []
        result = run_sweep(
            sweep_job,
            pool=crews,
            on_report=lambda run_id, epoch, _: reports.append((run_id, epoch)),
            on_finish=lambda run: finished.append(run.run_id),
        )
        assert len(result.trials) == 4
        assert sorted(finished) == sorted(trial.run_id for trial in result.trials)
        assert {run_id for run_id, _ in reports} == set(finished)
        assert result.best is not None
        assert result.best.epochs == 4
        whole = [trial.value for trial in result.trials if trial.epochs == 4]
        assert result.best.value == max(value for value in whole if value is not None)
        assert all(0.1 <= trial.parameters["objective.margin"] <= 0.6 for trial in result.trials)
        study = optuna.load_study(study_name=result.study, storage=result.storage)
        assert sorted(trial.params["objective.margin"] for trial in study.trials) == pytest.approx(
            sorted(trial.parameters["objective.margin"] for trial in result.trials)
        )
        with pytest.raises(UserError, match="finished"):
            find_sweep(result.sweep_id)

    def test_a_killed_sweep_goes_on(self, sweep_job: SweepJob, orl: Path, tmp_path: Path, crews: CrewPool) -> None:
        job = sweep_job.model_copy(update={"scheduler": "none", "concurrent": 1})
        (tmp_path / "sweep.yaml").write_text(dump_job(job))
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        with (tmp_path / "killed.log").open("w") as log:
            command = [sys.executable, "-m", "armillary", "sweep", str(tmp_path / "sweep.yaml")]
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            deadline = time.monotonic() + 240
            while time.monotonic() < deadline and process.poll() is None:
                if sum(run.record().status == "finished" for run in all_runs()) >= 2:
                    break
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
            process.wait()
        sweep_id, own = find_sweep(None)
        before = {run.run_id for run in all_runs() if run.record().status == "finished"}
        assert 2 <= len(before) < 4, (tmp_path / "killed.log").read_text()
        result = run_sweep(own, resume=sweep_id, pool=crews)
        finished = [trial for trial in result.trials if trial.status == "finished"]
        assert len(finished) >= 4
        assert before <= {trial.run_id for trial in finished}
        assert read_result(sweep_id).finished
