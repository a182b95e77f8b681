"""A run's folder: the one place training writes to and tracking reads from.

::

    runs/<run_id>/
      job.yaml         the job as resolved
      run.json         RunRecord: status, fingerprint, versions, final metrics
      events.jsonl     one line a report: {"step", "time", "metrics"}; append-only, steps never repeat
      checkpoints/     Ray Train's storage
      model/           encoder.safetensors and model.json, what evaluation and export load
      evaluation/      <protocol>.npz with the curves, metrics.json
      tracking.json    written by armillary.tracking: MLflow run id and how far events.jsonl was flushed
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from armillary.spec.errors import UserError, unknown_name
from armillary.spec.home import runs_dir

Status = Literal["created", "running", "finished", "failed", "stopped"]


class RunRecord(BaseModel):
    """What is known of a run; stored as ``run.json``.

    ``group`` names the sweep, study or regression the run belongs to (``kind/name``), ``variant`` its row there.
    ``metrics`` holds the final values by name, e.g. ``verification/auc``. ``warnings`` say what is wrong with a run
    that finished, e.g. that its embedding collapsed.
    """

    # A diverged run's metrics may be NaN, which plain JSON would turn into null and refuse to read back.
    model_config = ConfigDict(ser_json_inf_nan="constants")

    run_id: str
    name: str
    status: Status = "created"
    created: float = Field(default_factory=time.time)
    finished: float | None = None
    group: str | None = None
    variant: str | None = None
    fingerprint: str = ""
    digest: str = ""
    git_commit: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    metrics: dict[str, float] = Field(default_factory=dict)
    seconds: float = 0.0
    error: str | None = None
    warnings: list[str] = Field(default_factory=list)


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file's content in one step, so that a killed process never leaves half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


@contextmanager
def claimed(folder: Path, taken: str, patience: float) -> Iterator[None]:
    """Holds a folder for this process through a lock on its file ``claim``, which goes with the process.

    Raises:
        UserError: ``taken``, when another process still holds it after ``patience`` seconds.
    """
    deadline = time.monotonic() + patience
    with (folder / "claim").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(taken) from None
                time.sleep(0.1)
        yield


class RunDirectory:
    """Reads and writes one run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    @property
    def run_id(self) -> str:
        """The folder's name."""
        return self.path.name

    @classmethod
    def create(cls, record: RunRecord, job_yaml: str) -> RunDirectory:
        """Makes the folder of a new run."""
        path = runs_dir() / record.run_id
        path.mkdir(parents=True)
        (path / "model").mkdir()
        (path / "evaluation").mkdir()
        write_atomically(path / "job.yaml", job_yaml)
        directory = cls(path)
        directory.save(record)
        return directory

    @classmethod
    def find(cls, run_id: str) -> RunDirectory:
        """The folder of a run by id, or by an unambiguous beginning of one.

        Raises:
            UserError: no run, or several, begin with ``run_id``.
        """
        known = sorted(path.name for path in runs_dir().glob("*") if (path / "run.json").is_file())
        matches = [name for name in known if name == run_id] or [name for name in known if name.startswith(run_id)]
        if len(matches) == 1:
            return cls(runs_dir() / matches[0])
        if matches:
            raise UserError(f"run {run_id!r} is ambiguous", allowed=", ".join(matches[:8]))
        if not known:
            raise UserError(f"there is no run {run_id!r}: no run is stored in {runs_dir()}")
        raise unknown_name("run", run_id, known[-20:])

    def record(self) -> RunRecord:
        """The stored record."""
        return RunRecord.model_validate_json((self.path / "run.json").read_text())

    def save(self, record: RunRecord) -> None:
        """Stores the record."""
        write_atomically(self.path / "run.json", record.model_dump_json(indent=2))

    def update(self, **changes: Any) -> RunRecord:
        """Changes some fields of the stored record and returns it."""
        record = self.record().model_copy(update=changes)
        self.save(record)
        return record

    @contextmanager
    def claimed(self, patience: float = 60.0) -> Iterator[None]:
        """Holds the run for this process; the claim goes with the process, however it ends.

        Workers outlive a killed driver by some seconds. Without a claim they would still be writing checkpoints and
        events while a resumed run does.

        Raises:
            UserError: another process still holds it after ``patience`` seconds.
        """
        with claimed(self.path, f"run {self.run_id} is still being trained by another process", patience):
            yield

    def events(self) -> Iterator[dict[str, Any]]:
        """The reports so far, oldest first; a line cut off by a kill is left out."""
        path = self.path / "events.jsonl"
        if not path.is_file():
            return
        with path.open() as lines:
            for line in lines:
                try:
                    event = json.loads(line)
                except ValueError:
                    continue  # torn by a kill; the next writer ended the line
                # A torn line may still be JSON, of something smaller than an event.
                if line.endswith("\n") and isinstance(event, dict) and "metrics" in event:
                    yield event

    def append_event(self, step: int, metrics: dict[str, float]) -> None:
        """Adds a report unless that step is already there, as after a resume that repeats an epoch."""
        path = self.path / "events.jsonl"
        if any(event["step"] >= step for event in self.events()):
            return
        line = json.dumps({"step": step, "time": int(time.time() * 1000), "metrics": metrics}) + "\n"
        torn = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        with path.open("a") as file:
            file.write(("\n" if torn else "") + line)


def all_runs() -> list[RunDirectory]:
    """Every stored run, oldest first."""
    runs = [RunDirectory(path.parent) for path in runs_dir().glob("*/run.json")]
    return sorted(runs, key=lambda run: run.record().created)
