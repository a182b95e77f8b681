"""Real runs on a real Ray cluster: trained, killed, resumed, spread over workers and stages."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from armillary.spec.errors import UserError, WorkFailed
from armillary.spec.jobs import TrainJob
from armillary.spec.loading import dump_job
from armillary.training.api import Submission
from armillary.training.crew import CrewPool, crew_pool
from armillary.training.launch import find_resumable, run_job
from armillary.training.model import load_encoder
from armillary.training.rundir import RunDirectory, all_runs

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]

JUDGED = ("verification/auc", "verification/eer", "identification/rank1", "train/loss")


def judged(metrics: dict[str, float]) -> list[float]:
    return [metrics[name] for name in JUDGED]


def test_a_run_leaves_everything_behind(tiny_job: Any, orl: Path, ray_cluster: Any) -> None:
    reports: list[int] = []
    record = run_job(tiny_job(), on_report=lambda _, epoch, __: reports.append(epoch))
    assert record.status == "finished"
    assert reports == [1, 2]
    run = RunDirectory.find(record.run_id)
    assert 0.5 < record.metrics["verification/auc"] < 1
    with (run.path / "evaluation" / "metrics.json").open() as file:
        assert json.load(file)["verification/auc"] == record.metrics["verification/auc"]
    assert (run.path / "evaluation" / "verification.npz").is_file()
    assert sum(p.numel() for p in load_encoder(run).parameters()) > 0
    assert record.fingerprint
    assert record.versions["torch"]


def test_workers_and_stages_agree(tiny_job: Any, orl: Path, crews: CrewPool) -> None:
    """One worker, then two at every ZeRO stage: the same loss and the same verification."""
    two = {"train__workers": 2, "train__threads": 1}
    (alone,) = crews.run_all([Submission(tiny_job())])
    with crew_pool(tiny_job(**two), 1) as pair:
        records = pair.run_all([Submission(tiny_job(**two, train__zero=zero)) for zero in (0, 1, 2, 3)])
    for zero, record in enumerate(records):
        assert record.status == "finished", record.error
        assert judged(record.metrics) == pytest.approx(judged(alone.metrics), abs=2e-3), f"zero {zero}"


def test_a_killed_run_resumes_to_the_same_result(
    tiny_job: Any, orl: Path, armillary_home: Path, tmp_path: Path, crews: CrewPool
) -> None:
    """Bit for bit on one worker; on two, as far as adding the same numbers in another order allows."""
    job = tiny_job(train__epochs=30)
    (whole,) = crews.run_all([Submission(job)])
    interrupted = killed_on_the_way(job, tmp_path)
    copy = RunDirectory(interrupted.path.with_name("20260101-copy"))
    shutil.copytree(interrupted.path, copy.path)
    copy.update(run_id=copy.run_id)

    resumed = run_job(job, resume=interrupted)
    assert [event["step"] for event in interrupted.events()] == list(range(1, 31))
    assert judged(resumed.metrics) == judged(whole.metrics)
    assert losses(interrupted) == losses(RunDirectory.find(whole.run_id))

    on_two = run_job(tiny_job(train__epochs=30, train__workers=2), resume=copy)
    assert judged(on_two.metrics) == pytest.approx(judged(whole.metrics), rel=2e-2, abs=2e-2)
    assert losses(copy) == pytest.approx(losses(interrupted), rel=2e-2)


def killed_on_the_way(job: TrainJob, folder: Path) -> RunDirectory:
    """Trains a job in a process, and a cluster, of its own, and kills it after a few epochs."""
    (folder / "job.yaml").write_text(dump_job(job))
    command = [sys.executable, "-m", "armillary", "run", str(folder / "job.yaml")]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    known = {run.run_id for run in all_runs()}
    with (folder / "killed.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and process.poll() is None:
            started = [run for run in all_runs() if run.run_id not in known]
            if started and sum(1 for _ in started[0].events()) >= 3:
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    run = find_resumable(None)
    with run.claimed():  # its workers outlive it by moments
        assert 3 <= sum(1 for _ in run.events()) < 30, (folder / "killed.log").read_text()
    return run


def losses(run: RunDirectory) -> list[float]:
    return [event["metrics"]["train/loss"] for event in run.events()]


def test_a_checkpoint_of_another_model_is_refused(tiny_job: Any, orl: Path, crews: CrewPool) -> None:
    (record,) = crews.run_all([Submission(tiny_job(train__epochs=1))])
    run = RunDirectory.find(record.run_id)
    run.update(status="stopped")
    before = (run.path / "job.yaml").read_text()
    with pytest.raises(UserError, match="another model") as caught:
        run_job(tiny_job(train__epochs=2, backbone__width=12), resume=run)
    assert "backbone.width" in str(caught.value)
    assert (run.path / "job.yaml").read_text() == before


def test_a_finished_run_is_not_resumed(tiny_job: Any, orl: Path, crews: CrewPool) -> None:
    (record,) = crews.run_all([Submission(tiny_job(train__epochs=0))])
    with pytest.raises(UserError, match="finished"):
        find_resumable(record.run_id)


def test_a_cluster_that_does_not_start_leaves_nothing(
    tiny_job: Any, orl: Path, armillary_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Ray does where its processes take over half a minute to come up."""
    import ray

    def late(**_: Any) -> None:
        raise Exception("The current node timed out during startup.\nMore.")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", late)
    with pytest.raises(WorkFailed, match=r"too busy .* timed out during startup\.\n"):
        run_job(tiny_job())
    assert not list((armillary_home / "runs").glob("*"))


def test_a_diverging_run_fails_and_says_so(tiny_job: Any, orl: Path, ray_cluster: Any) -> None:
    with pytest.raises(WorkFailed, match=r"optimizer\.lr|training diverged"):
        run_job(
            tiny_job(optimizer__name="sgd", optimizer__lr=100, optimizer__warmup_epochs=0, objective__name="softmax")
        )
    assert all_runs()[-1].record().status == "failed"
