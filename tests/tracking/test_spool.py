"""Run folders against a real SQLite store of MLflow."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from armillary.spec.errors import UserError
from armillary.spec.jobs import TrainJob
from armillary.tracking import mlflow_store
from armillary.tracking.mlflow_store import MlflowStore, StoreError, check_uri, redact
from armillary.tracking.records import params_of, row_of, tags_of
from armillary.tracking.run import track_finished
from armillary.tracking.spool import Flusher, load_state, sync, target
from armillary.training.rundir import RunDirectory

# Makes a run folder; see conftest.py.
MakeRun = Callable[..., Any]

CREATED = 1_760_000_000.0


def mlflow_id(run: RunDirectory) -> str:
    state = load_state(run)
    assert state is not None
    assert state.mlflow_run_id is not None
    return state.mlflow_run_id


def expected(run: RunDirectory, metric: str) -> list[tuple[int, int, float]]:
    return sorted((event["step"], event["time"], event["metrics"][metric]) for event in run.events())


def assert_exact(store: MlflowStore, run: RunDirectory) -> None:
    """Every point once, none missing, to the last bit."""
    for metric in ("train/loss", "train/lr"):
        assert store.history(mlflow_id(run), metric) == expected(run, metric)


def mlflow_run(store: MlflowStore, run: RunDirectory) -> Any:
    return store._client.get_run(mlflow_id(run))


def test_a_run_from_start_to_end(store: MlflowStore, make_run: MakeRun) -> None:
    run = make_run(
        "run-1",
        settings={
            "objective.margin": 0.3,
            "train.epochs": 5,
            "data.fold": 2,
            "seed": 4,
            "tracking.experiment": "faces",
        },
        status="running",
        git_commit="abc",
        versions={"torch": "2.14.1"},
        group="study/margins",
        variant="small",
    )
    flusher = Flusher(run, None, "faces", interval=0.05)
    flusher.start()
    run.report(3)
    deadline = time.monotonic() + 30
    while (state := load_state(run)) is None or state.offset < (run.path / "events.jsonl").stat().st_size:
        assert time.monotonic() < deadline, "the thread sent nothing"
        time.sleep(0.05)
    assert mlflow_run(store, run).info.status == "RUNNING"
    assert_exact(store, run)

    run.report(2)
    (run.path / "evaluation" / "metrics.json").write_text('{"verification/auc": 0.97}')
    (run.path / "model" / "model.json").write_text("{}")
    run.finish(verification__auc=0.97, train__loss=1 / 7)
    assert flusher.close()

    found = mlflow_run(store, run)
    assert (found.info.status, found.info.end_time) == ("FINISHED", int((CREATED + 60) * 1000))
    assert_exact(store, run)  # the final train/loss repeats the last event and is no second point
    assert store.history(mlflow_id(run), "verification/auc") == [(5, int((CREATED + 60) * 1000), 0.97)]
    assert found.data.params["objective.margin"] == "0.3"
    assert found.data.params["optimizer.betas"] == "[0.9, 0.999]"
    assert found.data.params["data.fold"] == "2"
    tags = {key.removeprefix("armillary."): value for key, value in found.data.tags.items()}
    wanted = {"objective": "arcface", "fold": "2", "seed": "4", "git_commit": "abc", "version.torch": "2.14.1"}
    wanted |= {"group": "study/margins", "variant": "small", "epochs": "5", "trial": "false", "status": "finished"}
    assert wanted.items() <= tags.items()
    files = [item.path for folder in ("", "evaluation", "model") for item in artifacts(store, run, folder)]
    assert {"job.yaml", "evaluation/metrics.json", "model/model.json"} <= set(files)
    assert Path(found.info.artifact_uri.removeprefix("file://")).is_relative_to(mlflow_store.artifact_root())


def artifacts(store: MlflowStore, run: RunDirectory, folder: str) -> list[Any]:
    return list(store._client.list_artifacts(mlflow_id(run), folder or None))


def test_sending_again_changes_nothing(store: MlflowStore, make_run: MakeRun) -> None:
    run = make_run(events=4)
    run.finish(verification__auc=0.9)
    assert track_finished(run)
    before = {name: store.history(mlflow_id(run), name) for name in ("train/loss", "train/lr", "verification/auc")}
    known = mlflow_id(run)
    # A kill between the send and the note of it leaves an old offset, or no file at all.
    state = load_state(run)
    assert state is not None
    (run.path / "tracking.json").write_text(state.model_copy(update={"offset": 0, "complete": ""}).model_dump_json())
    assert track_finished(run)
    (run.path / "tracking.json").unlink()
    assert track_finished(run)
    assert mlflow_id(run) == known
    assert {name: store.history(known, name) for name in before} == before
    assert [len(points) for points in before.values()] == [4, 4, 1]
    assert len(store.search()) == 1


def test_torn_lines_and_what_is_no_number(store: MlflowStore, make_run: MakeRun) -> None:
    run = make_run(events=1)
    path = run.path / "events.jsonl"
    with path.open("a") as file:
        file.write('{"step": 2, "time": 5, "metrics": {"train/loss": 0.1}')
    flusher = Flusher(run, None, "armillary")
    flusher.flush()
    assert [point[0] for point in store.history(mlflow_id(run), "train/loss")] == [1]
    with path.open("a") as file:
        # The next writer ends the torn line; the step comes again after the resume.
        file.write('\n{"step": 2, "time": 9, "metrics": {"train/loss": NaN, "train/acc@1": Infinity}}\n')
    flusher.flush()
    first, (step, moment, value) = store.history(mlflow_id(run), "train/loss")
    assert first[0] == 1
    assert (step, moment) == (2, 9)
    assert math.isnan(value)
    assert store.history(mlflow_id(run), "train/acc_1")[0][2] > 1e300


WORKER = """
import sys
from pathlib import Path
from armillary.tracking.spool import Flusher
from armillary.training.rundir import RunDirectory

run = RunDirectory(Path(sys.argv[1]))
flusher = Flusher(run, None, "armillary", interval=0.001)
flusher.start()
print("up", flush=True)
step = int(sys.argv[2])
while True:
    for _ in range(5):
        step += 1
        run.append_event(step, {"train/loss": 1 / (step + 2), "train/lr": 1e-3 * 0.9**step})
"""


@pytest.mark.slow
def test_killed_again_and_again_loses_nothing_and_repeats_nothing(store: MlflowStore, make_run: MakeRun) -> None:
    run = make_run(status="running")
    for life in range(2):
        reached = max((event["step"] for event in run.events()), default=0)
        begun = state.offset if (state := load_state(run)) else 0
        process = subprocess.Popen([sys.executable, "-c", WORKER, str(run.path), str(reached)], stdout=subprocess.PIPE)
        deadline = time.monotonic() + 90
        # Killed while it sends, at another moment each time.
        while ((state := load_state(run)) is None or state.offset <= begun) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05 + 0.13 * life)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.returncode == -signal.SIGKILL
        state = load_state(run)
        assert state is not None
        assert state.offset > begun, "nothing was sent before the kill"
    assert sync(all=True).running == ["run-1"]
    run.report(2)
    run.finish(verification__auc=0.9)
    report = sync()
    assert (report.sent, report.failed) == (["run-1"], {})
    assert_exact(store, run)
    assert len(store.search()) == 1


def test_two_at_once_make_one_run(store: MlflowStore, make_run: MakeRun) -> None:
    run = make_run(events=30)
    run.finish(verification__auc=0.9)
    threads = [threading.Thread(target=track_finished, args=(run,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.search()) == 1
    assert_exact(store, run)


def test_an_unreachable_server_holds_nothing_up(
    store: MlflowStore, make_run: MakeRun, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("TRACKING", f"http://ann:secret@127.0.0.1:{port}")
    run = make_run(events=3, settings={"tracking.uri": "${env:TRACKING}"}, status="running")
    flusher = Flusher(run, os.environ["TRACKING"], "armillary", interval=0.01)
    flusher.start()
    run.finish(verification__auc=0.9)
    with caplog.at_level(logging.WARNING, logger="armillary"):
        assert not flusher.close("finished", attempts=1)
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("armillary")]
    assert len(warnings) == 1
    assert "armillary track sync" in warnings[0]
    assert str(run.path) in warnings[0]
    assert "secret" not in caplog.text

    other = make_run("run-2", events=1, settings={"tracking.uri": "${env:TRACKING}"})
    report = sync()
    assert set(report.failed) == {run.run_id, other.run_id}
    assert not any("secret" in reason for reason in report.failed.values())
    # The address was wrong and is put right: everything arrives.
    monkeypatch.setenv("TRACKING", check_uri(None))
    assert sync().sent == ["run-1"]
    assert_exact(store, run)
    assert "secret" not in (run.path / "tracking.json").read_text()


def test_sync_sends_only_what_changed(store: MlflowStore, make_run: MakeRun) -> None:
    runs = [make_run(f"run-{index}", events=2) for index in range(3)]
    for run in runs[:2]:
        run.finish(verification__auc=0.9)
    report = sync()
    assert (report.sent, report.running) == (["run-0", "run-1"], ["run-2"])
    runs[2].finish(verification__auc=0.8)
    assert sync().sent == ["run-2"]
    assert sync() == type(report)()
    # Judged again: the new value is the last one.
    runs[0].update(metrics={"verification/auc": 0.95, "knn/top1": 0.5})
    assert sync().sent == ["run-0"]
    assert mlflow_run(store, runs[0]).data.metrics["knn/top1"] == 0.5


def test_sync_all_fills_a_lost_store(
    store: MlflowStore, make_run: MakeRun, armillary_home: Path, migrated: Path
) -> None:
    run = make_run(events=2)
    run.finish(verification__auc=0.9)
    assert sync().sent == ["run-1"]
    # The same store with the run gone for good, as after `mlflow gc`.
    old = mlflow_id(run)
    store._client.delete_run(old)
    assert sync(all=True).sent == []  # deleted on purpose: it does not come back
    import sqlite3

    with sqlite3.connect(armillary_home / "mlflow.db") as database:
        for table in ("metrics", "latest_metrics", "params", "tags", "runs"):
            database.execute(f"delete from {table}")
    assert sync().sent == []
    assert sync(all=True).sent == ["run-1"]
    assert mlflow_id(run) != old
    assert_exact(store, run)


def test_deleted_runs_stay_deleted(store: MlflowStore, make_run: MakeRun) -> None:
    run = make_run(events=1, status="running")
    Flusher(run, None, "armillary").flush()
    store._client.delete_run(mlflow_id(run))
    run.report(1)
    run.finish(verification__auc=0.9)
    assert track_finished(run)
    assert store.search() == []
    assert sync().failed == {}


def test_failed_and_stopped_runs_and_their_resume(store: MlflowStore, make_run: MakeRun) -> None:
    run = make_run(events=1, status="running")
    flusher = Flusher(run, None, "armillary")
    run.update(status="failed", error="out of memory", finished=CREATED + 5)
    assert flusher.close()
    found = mlflow_run(store, run)
    assert (found.info.status, found.data.tags["armillary.error"]) == ("FAILED", "out of memory")
    run.update(status="running", error=None, finished=None)
    again = Flusher(run, None, "armillary")
    # A resume may change the number of workers, and MLflow's parameters are written once.
    job = (run.path / "job.yaml").read_text()
    assert "workers: 1" in job
    (run.path / "job.yaml").write_text(job.replace("workers: 1", "workers: 2"))
    again.flush()
    assert mlflow_run(store, run).data.params["train.workers"] == "1"
    assert mlflow_run(store, run).data.tags["armillary.now.train.workers"] == "2"
    assert mlflow_run(store, run).info.status == "RUNNING"
    run.update(status="stopped", finished=CREATED + 9)
    assert again.close()
    assert mlflow_run(store, run).info.status == "KILLED"
    assert store.search() == []


def test_passwords_stay_out_of_the_store(store: MlflowStore, make_run: MakeRun) -> None:
    run = make_run(events=1, settings={"tracking.uri": "postgresql://ann:secret@db.invalid/mlflow"})
    run.finish(verification__auc=0.9)
    assert Flusher(run, None, "armillary").close()
    found = mlflow_run(store, run)
    assert found.data.params["tracking.uri"] == "postgresql://ann:***@db.invalid/mlflow"
    path = Path(found.info.artifact_uri.removeprefix("file://")) / "job.yaml"
    assert yaml.safe_load(path.read_text())["tracking"]["uri"].startswith("postgresql://ann:***@")


@pytest.mark.parametrize("uri", ["mlruns", "file:///tmp/mlruns", "http://", "ftp://host", "databricks"])
def test_wrong_uris_are_the_users_mistake(uri: str, make_run: MakeRun) -> None:
    with pytest.raises(UserError, match="no MLflow database or server"):
        Flusher(make_run(), uri, "armillary")


def test_a_missing_variable_is_named(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOT_SET_ANYWHERE", "http://127.0.0.1:1")
    run = make_run(settings={"tracking.uri": "${env:NOT_SET_ANYWHERE}"})
    monkeypatch.delenv("NOT_SET_ANYWHERE")
    with pytest.raises(UserError, match="NOT_SET_ANYWHERE"):
        target(run)
    assert "NOT_SET_ANYWHERE" in sync().failed["run-1"]


def test_redaction() -> None:
    assert redact("see mysql+pymysql://u:p%40ss@h:3306/db?ssl=1 now") == "see mysql+pymysql://u:***@h:3306/db?ssl=1 now"
    assert redact("postgresql:///db?user=a&password=b&x=1") == "postgresql:///db?user=a&password=***&x=1"
    assert redact("sqlite:////home/ann/mlflow.db") == "sqlite:////home/ann/mlflow.db"
    assert redact("http://127.0.0.1:5000/path") == "http://127.0.0.1:5000/path"


def test_a_broken_database_is_a_store_error(armillary_home: Path) -> None:
    armillary_home.mkdir(parents=True)
    (armillary_home / "mlflow.db").write_bytes(b"this is no database at all" * 100)
    with pytest.raises(StoreError, match="not a database"):
        mlflow_store.open_store()


def test_columns_and_pages_find_the_same_runs(store: MlflowStore, make_run: MakeRun) -> None:
    for index in range(4):
        run = make_run(
            f"run-{index}",
            events=index,
            group="sweep/a" if index % 2 else "study/it's",
            settings={"data.name": "digits" if index == 3 else "orl"},
        )
        if index != 2:
            run.finish(verification__auc=0.9 + index / 100)
    sync()
    experiments = [store.experiment("armillary")]
    for where in ({}, {"armillary.trial": "false"}, {"armillary.dataset": "digits"}, {"armillary.group": "study/it's"}):
        for finished in (True, False):
            columns = store._search_columns(experiments, where, finished, False, False)
            pages = store._search_pages(experiments, where, finished, False)
            assert {plain(run) for run in columns} == {plain(run) for run in pages}
            assert columns or (finished and where == {"armillary.group": "none"})
    assert store.known_runs() == {f"run-{index}" for index in range(4)}
    with pytest.raises(UserError, match="both kinds of quotes"):
        mlflow_store._quoted('it\'s "so"')


def plain(run: mlflow_store.StoredRun) -> str:
    return json.dumps([run.tags, run.metrics], sort_keys=True)


def test_tags_read_back_as_the_row(make_run: MakeRun) -> None:
    run = make_run(settings={"objective.margin": 0.4, "seed": 3, "data.fold": 1, "data.image_size": [56, 48]})
    job = TrainJob.model_validate(yaml.safe_load((run.path / "job.yaml").read_text()))
    row = row_of(tags_of(run.record(), job), {"verification/auc": 0.9})
    assert row is not None
    assert (row.objective, row.fold, row.seed, row.created) == ("arcface", 1, 3, CREATED)
    assert row.changes == {"data.image_size": [56, 48], "objective.margin": 0.4, "objective.name": "arcface"}
    other = TrainJob.model_validate(job.model_dump() | {"seed": 9, "name": "again"})
    assert tags_of(run.record(), other)["armillary.digest"] == row.digest
    assert row_of({"mlflow.user": "ann"}, {}) is None


def test_parameters_are_flat_and_short_enough() -> None:
    tree = {"a": {"b": 1, "empty": {}}, "list": [1, 2], "none": None, "text": "x" * 9000, "odd@key": True}
    params = params_of(tree)
    assert params["a.b"] == "1"
    assert (params["a.empty"], params["list"], params["none"], params["odd_key"]) == ("{}", "[1, 2]", "null", "true")
    assert len(params["text"]) == 6000


def test_mlflow_is_imported_only_when_used() -> None:
    code = (
        "import sys, armillary.tracking.run, armillary.tracking.query, armillary.tracking.format;"
        "import armillary.cli.leaderboard, armillary.cli.track;"
        "print(sorted({'mlflow', 'scipy', 'torch', 'ray', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
