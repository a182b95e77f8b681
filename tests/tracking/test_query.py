"""From run folders through a real store to the printed leaderboard, and the command line."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from armillary.cli.leaderboard import app as leaderboard_app
from armillary.cli.track import app as track_app
from armillary.spec.errors import UserError
from armillary.tracking.mlflow_store import MlflowStore, open_store
from armillary.tracking.query import leaderboard, rows
from armillary.tracking.run import track_finished
from armillary.tracking.spool import load_state, sync

# Makes a run folder; see conftest.py.
MakeRun = Callable[..., Any]

AUC = "verification/auc"


@pytest.fixture
def study(make_run: MakeRun) -> None:
    """Two margins with three seeds each, a baseline, a trial, and runs that did not finish."""
    for seed in range(3):
        for margin, quality in ((0.3, 0.975), (0.0, 0.955)):
            settings = {"objective.margin": margin, "seed": seed}
            run = make_run(f"m{margin}-{seed}", events=2, settings=settings, group="study/margin")
            run.finish(verification__auc=quality + 0.002 * seed, verification__eer=0.1)
    make_run("pixels", settings={"backbone.name": "pixels", "train.epochs": 0}).finish(verification__auc=0.94)
    make_run("trial", group="sweep/arcface", settings={"objective.margin": 0.7}).finish(verification__auc=0.99)
    make_run("unfinished", status="running")
    make_run("failed", status="failed", metrics={AUC: 0.999})


@pytest.mark.usefixtures("study")
def test_pending_runs_are_sent_and_ranked(store: MlflowStore) -> None:
    (board,), report = leaderboard()
    assert (len(report.sent), report.running, report.failed) == (9, ["unfinished"], {})
    assert [(group.label, group.config) for group in board.groups] == [
        ("arcface", "margin=0.3"),
        ("arcface", "margin=0"),
        ("pixels", ""),
    ]
    best = board.groups[0]
    assert (best.folds, best.seeds) == ((0,), (0, 1, 2))
    assert best.metrics[AUC].mean == pytest.approx(0.977)
    # The standard deviation is 0.002; 4.3026527 is Student's quantile for 2 degrees of freedom.
    assert best.metrics[AUC].half_width == pytest.approx(4.3026527 * 0.002 / 3**0.5)
    assert [group.verdict for group in board.groups] == ["best", "worse", "untested"]
    assert not leaderboard()[1].sent


@pytest.mark.usefixtures("study")
def test_filters(store: MlflowStore) -> None:
    sync()
    assert len(rows()) == 7
    assert len(rows(trials=True)) == 8
    assert {row.run_id for row in rows(group="sweep/arcface")} == {"trial"}
    assert len(rows(group="study/margin")) == 6
    assert rows(dataset="digits") == []


def test_nothing_stored_makes_no_database(armillary_home: Path) -> None:
    assert leaderboard()[0] == []
    assert not armillary_home.exists()
    result = CliRunner().invoke(leaderboard_app, [])
    assert (result.exit_code, result.stdout.strip()) == (0, "no finished runs yet")


@pytest.mark.usefixtures("study")
def test_command_prints_every_format(store: MlflowStore) -> None:
    def printed(*arguments: str) -> str:
        result = CliRunner().invoke(leaderboard_app, list(arguments))
        assert result.exit_code == 0, result.output
        return result.stdout

    # A pipe gets whole lines with all columns, whatever width a terminal would have.
    (line,) = [line for line in printed().splitlines() if "margin=0.3" in line]
    assert "0.977 ± 0.005" in line
    assert "0.100 ± 0.000" in line
    assert "0.977 ± 0.005" in printed("--format", "md")
    assert "0.977 ± 0.005".replace("±", r"$\pm$") in printed("--format", "latex")
    lines = list(csv.DictReader(io.StringIO(printed("--format", "csv", "--limit", "2"))))
    assert [line["config"] for line in lines] == ["margin=0.3", "margin=0"]
    (board,) = json.loads(printed("--format", "json", "--trials"))
    assert board["groups"][0]["runs"] == ["trial"]
    assert json.loads(printed("--json"))[0]["groups"][0]["config"] == "margin=0.3"
    assert json.loads(printed("--json", "--dataset", "digits")) == []
    with pytest.raises(UserError, match="unknown metric"):
        CliRunner().invoke(leaderboard_app, ["--metric", "verification/acu"], catch_exceptions=False)


@pytest.mark.usefixtures("study")
def test_sync_command(store: MlflowStore) -> None:
    result = CliRunner().invoke(track_app, ["sync", "--json"])
    assert (result.exit_code, len(json.loads(result.stdout)["sent"])) == (0, 9)
    assert "0 sent, 1 not finished, 0 failed" in CliRunner().invoke(track_app, ["sync"]).stdout


@pytest.mark.usefixtures("study")
def test_a_broken_folder_does_not_hide_the_others(store: MlflowStore, armillary_home: Path) -> None:
    (armillary_home / "runs" / "failed" / "run.json").write_text("{")
    boards, report = leaderboard()
    assert set(report.failed) == {"failed"}
    assert len(boards[0].groups) == 3
    assert CliRunner().invoke(track_app, ["sync"]).exit_code == 1


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def server(tmp_path: Path, migrated: Path) -> Iterator[str]:
    """A real tracking server on loopback, with a database and artifacts of its own."""
    port = free_port()
    (tmp_path / "server.db").write_bytes(migrated.read_bytes())
    arguments = ["--backend-store-uri", f"sqlite:///{tmp_path / 'server.db'}", "--host", "127.0.0.1"]
    arguments += ["--artifacts-destination", (tmp_path / "files").as_uri(), "--port", str(port), "--workers", "1"]
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *arguments], stdout=log, stderr=log, start_new_session=True
        )
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while True:
        assert process.poll() is None, "the server ended"
        try:
            urllib.request.urlopen(url, timeout=5)
        except OSError:
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.2)
        else:
            return


@pytest.mark.slow
def test_a_server_holds_the_same_as_a_database(
    server: str, store: MlflowStore, make_run: MakeRun, tmp_path: Path
) -> None:
    runs = []
    for seed in range(2):
        run = make_run(f"run-{seed}", events=3, settings={"tracking.uri": server, "seed": seed})
        (run.path / "evaluation" / "metrics.json").write_text("{}")
        run.finish(verification__auc=0.9 + seed / 100)
        assert track_finished(run)
        runs.append(run)
    there = open_store(server)
    for run in runs:
        state = load_state(run)
        assert state is not None
        assert state.mlflow_run_id is not None
        expected = [(event["step"], event["time"], event["metrics"]["train/loss"]) for event in run.events()]
        assert there.history(state.mlflow_run_id, "train/loss") == expected
        # Sent again from the beginning, as after a kill: the server keeps every point once.
        (run.path / "tracking.json").unlink()
        assert track_finished(run)
        assert there.history(state.mlflow_run_id, "train/loss") == expected
        assert [item.path for item in there._client.list_artifacts(state.mlflow_run_id, "evaluation")] == [
            "evaluation/metrics.json"
        ]
    assert list((tmp_path / "files").rglob("metrics.json"))
    (board,), _ = leaderboard(uri=server)
    assert board.groups[0].seeds == (0, 1)
    assert there.known_runs() == {"run-0", "run-1"}
    assert rows() == []


@pytest.mark.slow
def test_ui_serves_the_default_store_on_loopback(store: MlflowStore, make_run: MakeRun) -> None:
    make_run("run-1", events=1).finish(verification__auc=0.9)
    sync()
    port = free_port()
    code = f"from armillary.cli.track import app; app(['ui', '--port', '{port}'])"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().decode().startswith(f"MLflow: http://127.0.0.1:{port}")
        wait_for(f"http://127.0.0.1:{port}/health", process)
        assert open_store(f"http://127.0.0.1:{port}").known_runs() == {"run-1"}
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=30)
