"""The scheduler with its real SQLite store and real subprocesses."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from armillary.cli.schedule import app
from armillary.regression import schedule
from armillary.spec.errors import UserError
from armillary.spec.jobs import RegressionJob

NIGHTLY = """\
kind: regression
name: {name}
jobs: [{{job: {{objective: {{name: arcface}}}}}}]
metrics: [{{name: verification/auc}}]
schedule: "{cron}"
"""


def write(folder: Path, name: str = "nightly", cron: str = "0 3 * * *") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(NIGHTLY.format(name=name, cron=cron))
    return path


def add_and_lose(folder: Path, name: str = "nightly", cron: str = "0 3 * * *") -> Path:
    """Schedules a job whose file is gone by the time it fires: ``regress run`` really starts, and refuses quickly."""
    path = write(folder, name, cron)
    schedule.add(path, load(path))
    path.unlink()
    return path


def load(path: Path) -> RegressionJob:
    from armillary.cli.regress import load_regression

    return load_regression(path)


def until(condition: Any, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def make_due(name: str, when: datetime | None = None) -> None:
    """Moves the next run of a stored job; the store and the process that serves it are the real ones."""
    with schedule._paused_scheduler() as scheduler:
        scheduler.get_job(name).modify(next_run_time=when or datetime.now(UTC))


def test_the_store_survives_a_restart(tmp_path: Path, armillary_home: Path) -> None:
    file = write(tmp_path)
    added = schedule.add(file, load(file))
    code = "from armillary.regression import schedule; print([row.model_dump_json() for row in schedule.rows()][0])"
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert schedule.Scheduled.model_validate_json(fresh.stdout) == added
    assert (added.cron, added.file) == ("0 3 * * *", str(file))
    assert added.next_run is not None
    assert (added.next_run.hour, added.next_run.minute) == (3, 0)
    assert added.next_run > datetime.now(UTC)
    assert (armillary_home / "schedule" / "jobs.db").is_file()


def test_add_moves_a_job_to_its_changed_line(tmp_path: Path) -> None:
    schedule.add(write(tmp_path), load(write(tmp_path)))
    make_due("nightly", datetime.now(UTC) + timedelta(minutes=5))
    soon = schedule.rows()[0].next_run
    assert schedule.add(write(tmp_path), load(write(tmp_path))).next_run == soon, "unchanged: a due run stays due"
    changed = write(tmp_path, cron="30 4 * * *")
    assert schedule.add(changed, load(changed)).cron == "30 4 * * *"
    assert [(row.next_run.hour, row.next_run.minute) for row in schedule.rows() if row.next_run] == [(4, 30)]


def test_mistakes(tmp_path: Path) -> None:
    file = write(tmp_path)
    job = load(file)
    with pytest.raises(UserError, match="nothing is"):
        schedule.remove("nightly")
    with pytest.raises(UserError, match="has no schedule"):
        schedule.add(file, job.model_copy(update={"schedule": None}))
    with pytest.raises(UserError, match="25 is out of range"):
        schedule.add(file, job.model_copy(update={"schedule": "0 25 * * *"}))
    assert schedule.rows() == []
    schedule.add(file, job)
    with pytest.raises(UserError, match="already scheduled from"):
        schedule.add(tmp_path / "copy.yaml", job)
    with pytest.raises(UserError, match="unknown scheduled regression 'nigthly'"):
        schedule.remove("nigthly")
    schedule.remove("nightly")
    assert schedule.rows() == []


def test_fire_records_a_real_run(tmp_path: Path, armillary_home: Path) -> None:
    file = add_and_lose(tmp_path)
    firing = schedule.fire("nightly", str(file))
    assert (firing.event, firing.verdict, firing.run_exit, firing.check_exit) == ("fired", "missing", 2, None)
    assert firing.seconds > 0.1
    assert firing.log is not None
    assert "nightly.yaml" in Path(firing.log).read_text()
    assert schedule.history() == [firing]
    assert schedule.rows()[0].last == firing
    with (armillary_home / "schedule" / "history.jsonl").open("a") as torn:
        torn.write('{"name": "nigh')
    schedule.fire("nightly", str(file))
    assert len(schedule.history("nightly")) == 2
    assert schedule.history("weekly") == []


def test_a_stale_result_is_not_the_firings(tmp_path: Path) -> None:
    answer = tmp_path / "answer.json"
    report = {"verdict": "pass", "started": 100.0, "decisions": [{"verdict": "pass", "reason": "Unchanged."}]}
    answer.write_text(json.dumps(report))
    assert schedule._read_check(answer, started=99.0) == ("pass", "Unchanged.")
    assert schedule._read_check(answer, started=101.0)[0] == "missing"
    answer.write_text("")
    assert schedule._read_check(answer, started=99.0)[0] == "missing"


def test_the_second_firing_waits_for_the_first(tmp_path: Path) -> None:
    file = add_and_lose(tmp_path)
    threads = [threading.Thread(target=schedule.fire, args=(name, str(file))) for name in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    one, two = schedule.history()
    assert one.time + one.seconds <= two.time


def test_what_did_not_run_is_in_the_history() -> None:
    from apscheduler import events

    now = datetime.now(UTC)
    full = OSError("no space left on device")
    for event in (
        events.JobExecutionEvent(events.EVENT_JOB_MISSED, "nightly", "default", now),
        events.JobSubmissionEvent(events.EVENT_JOB_MAX_INSTANCES, "nightly", "default", [now]),
        events.JobExecutionEvent(events.EVENT_JOB_ERROR, "nightly", "default", now, exception=full),
    ):
        schedule._on_left_out(event)
    recorded = schedule.history()
    assert [item.event for item in recorded] == ["missed", "skipped", "failed"]
    assert {item.verdict for item in recorded} == {"missing"}
    assert recorded[2].reason == "OSError: no space left on device"


@pytest.fixture
def up(tmp_path: Path) -> Any:
    """Starts ``armillary schedule up FILE`` and ends it for certain."""
    children = []

    def start(*files: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "armillary", "schedule", "up", *map(str, files)]
        child = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        children.append(child)
        assert child.stderr is not None
        for line in child.stderr:
            if "scheduler up" in line:
                return child
        raise AssertionError(f"ended with {child.wait()} before it was up")

    yield start
    for child in children:
        if child.poll() is None:
            child.kill()
            child.wait()


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_up_fires_what_is_due_and_stops_cleanly(tmp_path: Path, up: Any, end: signal.Signals) -> None:
    add_and_lose(tmp_path)
    child = up()
    make_due("nightly")
    until(lambda: schedule.history())
    assert [(item.event, item.run_exit) for item in schedule.history()] == [("fired", 2)]
    with pytest.raises(UserError, match="already up"):
        schedule.up()
    child.send_signal(end)
    assert child.wait(timeout=20) == 0
    assert [row.name for row in schedule.rows()] == ["nightly"]


@pytest.mark.slow
def test_a_night_slept_through_is_made_up_for_once_within_the_grace(tmp_path: Path, up: Any) -> None:
    add_and_lose(tmp_path, "late", "*/5 * * * *")
    now = datetime.now(UTC)
    # Of several missed times the newest counts: no other may lie within the grace.
    add_and_lose(tmp_path, "lost", f"0 {(now.astimezone().hour + 12) % 24} * * *")
    make_due("late", now - timedelta(minutes=30))
    make_due("lost", now - timedelta(seconds=schedule.MISFIRE_GRACE_SECONDS + 60))
    up()
    # A firing is recorded when it ends; one that falls due before that is skipped.
    until(lambda: {("late", "fired"), ("lost", "missed")} <= {(item.name, item.event) for item in schedule.history()})
    time.sleep(1)
    assert [item.event for item in schedule.history("lost")] == ["missed"]
    late = [item.event for item in schedule.history("late")]
    assert "missed" not in late
    assert len(late) <= 2, "six missed firings are one, and perhaps one that fell due meanwhile"


@pytest.mark.slow
def test_stopping_reaches_the_running_command(tmp_path: Path, up: Any) -> None:
    file = write(tmp_path)
    schedule.add(file, load(file))
    child = up()
    make_due("nightly")
    logs = schedule.schedule_dir() / "logs"
    until(lambda: list(logs.glob("nightly-*.log")))
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=20) == 0
    (firing,) = schedule.history()
    assert (firing.event, firing.verdict) == ("stopped", "missing")
    assert firing.run_exit is not None
    assert firing.run_exit != 0


def test_looking_at_a_due_job_leaves_it_due(tmp_path: Path) -> None:
    add_and_lose(tmp_path)
    due = datetime.now(UTC) - timedelta(seconds=5)
    make_due("nightly", due)
    assert [row.next_run for row in schedule.rows()] == [due]
    assert [row.next_run for row in schedule.rows()] == [due], "reading the schedule must not use up a firing"


def test_up_takes_the_cron_line_from_the_edited_file(tmp_path: Path, up: Any) -> None:
    schedule.add(write(tmp_path), load(write(tmp_path)))
    write(tmp_path, cron="30 4 * * *")
    up(write(tmp_path, name="weekly", cron="0 5 * * sun"))
    assert {row.name: row.cron for row in schedule.rows()} == {"nightly": "30 4 * * *", "weekly": "0 5 * * sun"}


def test_command_line(tmp_path: Path) -> None:
    runner = CliRunner()
    assert "nothing is scheduled" in runner.invoke(app, ["list"]).stdout
    assert runner.invoke(app, ["add", str(write(tmp_path))]).stdout.startswith("nightly: 0 3 * * *, next ")
    listed = runner.invoke(app, ["list"]).stdout
    assert "0 3 * * *" in listed
    (row,) = json.loads(runner.invoke(app, ["list", "--json"]).stdout)
    assert (row["name"], row["file"], row["last"]) == ("nightly", str(tmp_path / "nightly.yaml"), None)
    other = write(tmp_path, name="weekly")
    broken = write(tmp_path, name="broken", cron="never")
    result = runner.invoke(app, ["add", str(other), str(broken)])
    assert isinstance(result.exception, UserError)
    assert runner.invoke(app, ["remove", "nightly"]).exit_code == 0
    assert [row.name for row in schedule.rows()] == [], "one wrong file of two adds neither"
