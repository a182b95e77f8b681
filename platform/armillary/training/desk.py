"""The desk: where runs wait for a crew and crews report. Imports no torch, so that a sweep's trials start fast."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from armillary.spec.jobs import TrainJob
from armillary.training.rundir import RunDirectory, RunRecord

# Tune's trial actors live in a Ray namespace of their own; the desk is looked up in this one.
NAMESPACE = "armillary"


@dataclass
class _Task:
    run: str
    job: TrainJob
    reports: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    stop: bool = False
    done: bool = False
    error: str | None = None
    crew: int | None = None


class Desk:
    """Where runs wait, and where crews report. A plain class; the pool makes it a named Ray actor."""

    def __init__(self) -> None:
        self._tasks: OrderedDict[str, _Task] = OrderedDict()
        self._waiting: deque[str] = deque()
        self._open = True
        self._offered: dict[str, Any] = {}

    def offer(self, references: dict[str, Any]) -> None:
        """Tells crews of datasets in the object store, by content."""
        self._offered |= references

    def offered(self) -> dict[str, Any]:
        """The datasets that crews need not load themselves."""
        return self._offered

    def submit(self, run: str, job: TrainJob) -> str:
        """Queues a run (its folder's path); returns its run id."""
        run_id = Path(run).name
        self._tasks[run_id] = _Task(run, job)
        self._waiting.append(run_id)
        return run_id

    def next(self, crew: int) -> tuple[str, TrainJob] | Literal["wait", "close"]:
        """The next run for an idle crew."""
        if self._waiting:
            task = self._tasks[self._waiting.popleft()]
            task.crew = crew
            return task.run, task.job
        return "wait" if self._open else "close"

    def report(self, run_id: str, step: int, metrics: dict[str, float]) -> Literal["continue", "stop"]:
        """Takes an epoch's metrics and says whether to go on."""
        task = self._tasks[run_id]
        task.reports.append((step, metrics))
        return "stop" if task.stop else "continue"

    def finish(self, run_id: str, error: str | None) -> None:
        """Marks a run as ended; ``error`` when it raised."""
        task = self._tasks[run_id]
        task.done, task.error = True, error

    def poll(self, run_id: str, seen: int) -> tuple[list[tuple[int, dict[str, float]]], bool, str | None]:
        """The reports after the first ``seen``, whether the run has ended, and its error."""
        task = self._tasks[run_id]
        return task.reports[seen:], task.done, task.error

    def poll_all(self, seen: dict[str, int]) -> dict[str, tuple[list[tuple[int, dict[str, float]]], bool, str | None]]:
        """:meth:`poll` for many runs at once; those with nothing new are left out."""
        answers = {run_id: self.poll(run_id, count) for run_id, count in seen.items()}
        return {run_id: answer for run_id, answer in answers.items() if answer[0] or answer[1]}

    def stop(self, run_id: str) -> None:
        """Asks a run to stop at its next report; one still waiting never starts."""
        task = self._tasks[run_id]
        task.stop = True
        if run_id in self._waiting:
            self._waiting.remove(run_id)
            task.done = True

    def crew_lost(self, crew: int, reason: str) -> None:
        """Ends the runs a dead crew was working on."""
        for task in self._tasks.values():
            if task.crew == crew and not task.done:
                task.done, task.error = True, reason

    def close(self) -> None:
        """Sends crews home once nothing waits."""
        self._open = False


class TrialHandle:
    """One run at the desk, seen from whoever submitted it."""

    def __init__(self, desk: str, run: RunDirectory, job: TrainJob) -> None:
        import ray

        self._get: Any = ray.get
        self._desk: Any = ray.get_actor(desk, namespace=NAMESPACE)
        self.run, self._seen, self.done = run, 0, False
        self.error: str | None = None
        self._get(self._desk.submit.remote(str(run.path), job))

    def new_reports(self) -> list[tuple[int, dict[str, float]]]:
        """Reports that came since the last call; ``done`` turns true when the run has ended."""
        reports: list[tuple[int, dict[str, float]]]
        reports, self.done, self.error = self._get(self._desk.poll.remote(self.run.run_id, self._seen))
        self._seen += len(reports)
        return reports

    def stop(self) -> None:
        """Ends the run at its next report."""
        self._get(self._desk.stop.remote(self.run.run_id))

    def settle(self) -> RunRecord:
        """The record of the ended run; a crash is written into it."""
        return settle(self.run, self.error)


def settle(run: RunDirectory, error: str | None) -> RunRecord:
    """The record of a run whose crew is done with it; a crash, which could write none itself, is written into it."""
    record = run.record()
    if record.status in ("created", "running"):
        record = run.update(status="failed" if error else "stopped", error=error)
    return record
