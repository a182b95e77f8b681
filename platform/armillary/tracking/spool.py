"""Run folders to MLflow, without loss and without repetition.

The run folder is the spool: training appends to ``events.jsonl`` and never waits for a server. A :class:`Flusher`
follows that file, sends what is new with the events' own steps and times, and then stores in ``tracking.json`` how far
it came. A process killed between the two sends the last batch again; MLflow keys a point by (run, name, step, time,
value), so that the repetition changes nothing.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel

from armillary.spec.errors import UserError
from armillary.spec.home import runs_dir
from armillary.spec.jobs import TrainJob
from armillary.spec.loading import load_job
from armillary.tracking.mlflow_store import Ending, MetricPoint, MlflowStore, StoreError, check_uri, open_store, redact
from armillary.tracking.records import clean_key, params_of, tags_of
from armillary.training.rundir import RunDirectory, RunRecord, Status, write_atomically

log = logging.getLogger(__name__)

ENDINGS: dict[Status, Ending] = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}

# Seconds between two looks at the run folder, and the longest wait after failures.
INTERVAL, LONGEST_WAIT = 2.0, 60.0

# A model folder above this stays on disk only: 64 MB.
MAX_MODEL_BYTES = 64 * 2**20


class TrackingState(BaseModel):
    """``tracking.json``: where the run is in MLflow and what of it is there.

    ``offset`` counts the bytes of ``events.jsonl`` that are sent; ``complete`` is :func:`stamp` of the folder when all
    of it had been sent, empty before that.
    """

    uri: str
    experiment: str
    mlflow_run_id: str | None = None
    offset: int = 0
    complete: str = ""


def stamp(run: RunDirectory) -> str:
    """Changes whenever the run's record or events change; costs two ``stat`` calls."""
    parts = []
    for name in ("run.json", "events.jsonl"):
        path = run.path / name
        status = path.stat() if path.exists() else None
        parts.append(f"{status.st_mtime_ns}:{status.st_size}" if status else "-")
    return "/".join(parts)


def load_state(run: RunDirectory) -> TrackingState | None:
    """The stored state, ``None`` when the run was never tracked."""
    path = run.path / "tracking.json"
    return TrackingState.model_validate_json(path.read_text()) if path.is_file() else None


class Flusher:
    """Keeps one run's MLflow record up to date with its folder.

    Args:
        run: the folder.
        uri: MLflow database or server; ``None`` for SQLite in the Armillary home.
        experiment: MLflow experiment, made on first use.
        interval: seconds between two looks at the folder.

    Raises:
        UserError: a URI that cannot be one; nothing is contacted yet.
    """

    def __init__(self, run: RunDirectory, uri: str | None, experiment: str, *, interval: float = INTERVAL) -> None:
        self._run, self._uri, self._experiment = run, check_uri(uri), experiment
        self._interval = interval
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        self._opened: tuple[MlflowStore, str | None] | None = None
        self._warned = False

    def start(self) -> None:
        """Follows the folder in a background thread, which never holds training up and never dies of a dead server."""
        self._thread = threading.Thread(target=self._follow, name=f"tracking {self._run.run_id}", daemon=True)
        self._thread.start()

    def flush(self) -> None:
        """Sends what is new.

        Raises:
            StoreError: the store does not answer; everything stays in the folder.
        """
        with self._lock, _alone(self._run):
            self._send_events()

    def close(self, status: Status | None = None, *, attempts: int = 3) -> bool:
        """Stops the thread and sends the rest: final metrics, tags, artifacts, status.

        Args:
            status: how the run ended; by default what its record says. A run that has not ended is left running.
            attempts: tries before giving up on a store that does not answer.

        Returns:
            Whether the store has everything. If not, a warning said how to send it later.
        """
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        for attempt in range(attempts):
            try:
                with self._lock, _alone(self._run):
                    self._complete(status)
            except StoreError as error:
                if attempt + 1 == attempts:
                    self._warn(error)
                else:
                    time.sleep(2**attempt)
            else:
                return True
        return False

    def _follow(self) -> None:
        wait = self._interval
        while not self._ended.wait(wait):
            try:
                self.flush()
                wait = self._interval
            except StoreError as error:
                self._warn(error)
                wait = min(2 * wait, LONGEST_WAIT)

    def _warn(self, error: StoreError) -> None:
        if not self._warned:
            log.warning(
                "MLflow does not take the record of %s (%s). Nothing is lost: it stays in %s, and "
                "'armillary track sync' sends it later.",
                self._run.run_id,
                error,
                self._run.path,
            )
        self._warned = True

    def _state(self) -> TrackingState:
        fresh = TrackingState(uri=redact(self._uri), experiment=self._experiment)
        state = load_state(self._run)
        return state if state and (state.uri, state.experiment) == (fresh.uri, fresh.experiment) else fresh

    def _save(self, state: TrackingState) -> None:
        write_atomically(self._run.path / "tracking.json", state.model_dump_json(indent=2))

    def _open(self, state: TrackingState) -> tuple[MlflowStore, str | None]:
        """The store and MLflow's run id, ``None`` for a run deleted there; makes the run when it is not there yet."""
        if self._opened is None:
            record = self._run.record()
            store = open_store(self._uri)
            known = state.mlflow_run_id
            found = store.open_run(self._experiment, record.run_id, record.name, record.created, known)
            if found != known:
                # Another run than remembered, or the first one: whatever was sent went elsewhere.
                state.mlflow_run_id, state.offset, state.complete = found, 0, ""
                self._save(state)
            if found is not None:
                job, params = _job(self._run)
                store.log(found, params=params, tags=tags_of(record, job))
                if record.status not in ENDINGS:
                    store.set_running(found)
            self._opened = store, found
        return self._opened

    def _send_events(self) -> TrackingState:
        state = self._state()
        store, mlflow_id = self._open(state)
        if mlflow_id is None:
            return state
        points, offset = _read_points(self._run.path / "events.jsonl", state.offset)
        if offset != state.offset:
            store.log(mlflow_id, points)
            state.offset = offset
            self._save(state)
        return state

    def _complete(self, status: Status | None) -> None:
        seen = stamp(self._run)
        state = self._send_events()
        record = self._run.record()
        status = status or record.status
        store, mlflow_id = self._open(state)
        if mlflow_id is not None and status in ENDINGS:
            job, params = _job(self._run)
            store.log(mlflow_id, _final_points(self._run, record), params, tags_of(record, job))
            _log_artifacts(store, mlflow_id, self._run)
            store.end(mlflow_id, ENDINGS[status], record.finished)
        if mlflow_id is None or status in ENDINGS:
            # Stamped as it was before reading, so that a change made meanwhile is sent next time.
            state.complete = seen
            self._save(state)


@dataclass
class SyncReport:
    """What a sync did: run ids sent, still running, and the reason by run id where it failed."""

    sent: list[str] = field(default_factory=list)
    running: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def sync(*, all: bool = False, on_run: Callable[[str], None] | None = None) -> SyncReport:
    """Sends every run folder that is not complete in MLflow.

    Args:
        all: ask the stores too, so that runs are sent again whose store was lost or replaced; otherwise
            ``tracking.json`` is believed, which costs some 0.1 ms a run.
        on_run: called with the id of each run before it is sent.
    """
    report = SyncReport()
    dead: dict[str, str] = {}
    stored: dict[str, set[str]] = {}
    for path in sorted(runs_dir().glob("*/run.json")):
        run, uri = RunDirectory(path.parent), ""
        try:
            state = load_state(run)
            complete = state is not None and state.complete == stamp(run)
            if complete and not all:
                continue
            uri, experiment = target(run)
            if uri in dead:
                raise StoreError(dead[uri])
            if complete:
                if uri not in stored:
                    stored[uri] = open_store(uri).known_runs()
                if run.run_id in stored[uri]:
                    continue
            if on_run is not None:
                on_run(run.run_id)
            _send(run, uri, experiment, report)
        except StoreError as error:
            dead.setdefault(uri, str(error))
            report.failed[run.run_id] = str(error)
        except (UserError, OSError, ValueError) as error:
            report.failed[run.run_id] = str(error)
    return report


def _send(run: RunDirectory, uri: str, experiment: str, report: SyncReport) -> None:
    flusher = Flusher(run, uri, experiment)
    with flusher._lock, _alone(run):
        flusher._complete(None)
    if run.record().status in ENDINGS:
        report.sent.append(run.run_id)
    else:
        report.running.append(run.run_id)


def target(run: RunDirectory) -> tuple[str, str]:
    """Where a run's job wants it recorded: MLflow URI, with secrets filled in, and experiment.

    Raises:
        UserError: an environment variable the URI needs is not set, or it is no URI.
    """
    job, _ = _job(run)
    return check_uri(job.tracking.uri, where=str(run.path / "job.yaml")), job.tracking.experiment


def _job(run: RunDirectory) -> tuple[TrainJob, dict[str, str]]:
    """The job as stored and as parameters; references to secrets stay references."""
    path = run.path / "job.yaml"
    job = cast(TrainJob, load_job(path, kind="train"))
    tree = yaml.safe_load(path.read_text())
    return job, {key: redact(value) for key, value in params_of(tree).items()}


def _read_points(path: Path, offset: int) -> tuple[list[MetricPoint], int]:
    """The metric points of the whole lines from a byte offset on, and the offset behind the last of them."""
    if not path.is_file():
        return [], offset
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read()
    whole = data[: data.rfind(b"\n") + 1]
    points: list[MetricPoint] = []
    for line in whole.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            # A line torn by a kill; the step is reported again after the resume.
            continue
        points += [(clean_key(name), value, event["time"], event["step"]) for name, value in event["metrics"].items()]
    return points, offset + len(whole)


def _final_points(run: RunDirectory, record: RunRecord) -> list[MetricPoint]:
    """Final metrics that the events do not already hold at the last step."""
    points, _ = _read_points(run.path / "events.jsonl", 0)
    step = max((point[3] for point in points), default=0)
    reported = {point[0]: point[1] for point in points if point[3] == step}
    moment = int((record.finished or record.created) * 1000)
    final = ((clean_key(name), value) for name, value in record.metrics.items())
    return [(name, value, moment, step) for name, value in final if not _same(reported.get(name), value)]


def _same(a: float | None, b: float) -> bool:
    return a is not None and (a == b or (math.isnan(a) and math.isnan(b)))


def _log_artifacts(store: MlflowStore, mlflow_id: str, run: RunDirectory) -> None:
    store.log_text(mlflow_id, redact((run.path / "job.yaml").read_text()), "job.yaml")
    for path in _files(run.path / "evaluation"):
        store.log_artifact(mlflow_id, path, _folder(run, path))
    model = list(_files(run.path / "model"))
    if sum(path.stat().st_size for path in model) <= MAX_MODEL_BYTES:
        for path in model:
            store.log_artifact(mlflow_id, path, _folder(run, path))


def _files(folder: Path) -> Iterator[Path]:
    # Names that begin with a dot are half-written.
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("."))


def _folder(run: RunDirectory, path: Path) -> str:
    return path.parent.relative_to(run.path).as_posix()


@contextmanager
def _alone(run: RunDirectory) -> Iterator[Any]:
    """Holds the run's tracking against other processes, e.g. a sync beside the run itself."""
    with (run.path / ".tracking.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock
