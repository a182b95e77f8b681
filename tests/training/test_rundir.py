"""The run folder survives kills and never repeats a step."""

from __future__ import annotations

from pathlib import Path

import pytest

from armillary.spec.errors import UserError
from armillary.training.rundir import RunDirectory, RunRecord, all_runs


def make(run_id: str) -> RunDirectory:
    return RunDirectory.create(RunRecord(run_id=run_id, name="x"), "kind: train\n")


def test_a_resumed_epoch_is_not_logged_twice() -> None:
    run = make("20260101-a")
    for step in (1, 2, 2, 1, 3):
        run.append_event(step, {"train/loss": float(step)})
    assert [event["step"] for event in run.events()] == [1, 2, 3]


def test_a_line_torn_by_a_kill_is_skipped_and_the_next_one_is_whole() -> None:
    run = make("20260101-a")
    run.append_event(1, {"train/loss": 1.0})
    with (run.path / "events.jsonl").open("a") as file:
        file.write('{"step": 2, "metr')
    assert [event["step"] for event in run.events()] == [1]
    run.append_event(2, {"train/loss": 2.0})
    assert [event["step"] for event in run.events()] == [1, 2]


def test_find_by_beginning() -> None:
    make("20260101-abc")
    make("20260102-abd")
    assert RunDirectory.find("20260101").run_id == "20260101-abc"
    with pytest.raises(UserError, match="ambiguous"):
        RunDirectory.find("2026")
    with pytest.raises(UserError, match="unknown run") as caught:
        RunDirectory.find("20260101-abx")
    assert "20260101-abc" in str(caught.value)


def test_find_without_any_run(armillary_home: Path) -> None:
    with pytest.raises(UserError, match="no run is stored"):
        RunDirectory.find("x")


def test_update_keeps_the_rest() -> None:
    run = make("20260101-a")
    run.update(status="failed", error="a reason")
    record = all_runs()[0].record()
    assert (record.status, record.error, record.name) == ("failed", "a reason", "x")


def test_a_metric_that_is_not_a_number_can_be_read_back() -> None:
    run = make("20260101-a")
    run.update(metrics={"verification/auc": float("nan")})
    assert all_runs()[0].record().metrics["verification/auc"] != 0
    assert str(run.record().metrics["verification/auc"]) == "nan"


def test_a_run_has_one_owner_at_a_time() -> None:
    run = make("20260101-a")
    with run.claimed(), pytest.raises(UserError, match="still being trained"), run.claimed(patience=0.2):
        pass
    with run.claimed(patience=0.2):
        pass
