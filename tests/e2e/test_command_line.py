"""The commands of the README, as a user types them, in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from armillary.training.rundir import all_runs

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]

SMALL = [
    "data.image_size=[28,24]",
    "backbone.width=8",
    "train.epochs=3",
    "train.threads=1",
]


def armillary(*arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Runs the command line with a Ray cluster of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "armillary", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)


def test_run_then_evaluate_then_leaderboard(orl: Path) -> None:
    done = armillary("run", "jobs/quickstart.yaml", *SMALL, "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["status"] == "finished"
    judged = armillary("evaluate", record["run_id"], "--json")
    assert judged.returncode == 0, judged.stderr
    again = json.loads(judged.stdout)["metrics"]
    assert again["verification/auc"] == pytest.approx(record["metrics"]["verification/auc"], abs=1e-9)
    board = armillary("leaderboard", "--format", "json")
    assert board.returncode == 0, board.stderr
    assert record["run_id"] in board.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "quickstart", "objective.name=arcfase"], ["objective.name", "'arcface'"]),
        (["run", "quickstart", "objective.margin=9"], ["objective.margin", "9"]),
        (["run", "quickstart", "objective.margin=wide"], ["objective.margin", "wide"]),
        (["run", "quickstart", "train.epoch=3"], ["train.epoch", "epochs"]),
        (["run", "quickstart", "data.name=nowhere"], ["data.name", "nowhere"]),
        (["run", "quickstart", "train.workers=99", "train.batch_size=99"], ["99 workers x 1 CPU = 99 CPU"]),
        (["run", "--resume", "nothing"], ["no run"]),
    ],
)
def test_a_mistake_costs_one_message(armillary_home: Path, arguments: list[str], says: list[str]) -> None:
    done = armillary(*arguments)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for part in says:
        assert part in done.stderr
    assert not (armillary_home / "runs").exists()


@contextmanager
def interruptible() -> Iterator[None]:
    """What is started inside hears SIGINT, even where a shell started the tests in the background and ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_stops_and_says_how_to_go_on(orl: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "armillary", "run", "quickstart", *SMALL[:2], "train.epochs=500"]
    with (tmp_path / "log").open("w") as log, interruptible():
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not any(list(run.events()) for run in all_runs()):
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        code = process.wait(timeout=60)
    finally:
        process.kill()
    said = (tmp_path / "log").read_text()
    assert code == 130, said
    (run,) = all_runs()
    assert f"armillary run --resume {run.run_id}" in said
    assert "Traceback" not in said
    assert run.record().status == "stopped"
