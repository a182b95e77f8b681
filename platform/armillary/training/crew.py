"""Crews: warm Ray Train worker groups that take one run after another from a desk.

Starting a worker group costs many seconds (processes, imports, rendezvous); a crew pays once. Each run starts from a
clean slate: fresh seeds, modules and engine; data is loaded once a process and kept.

::

    driver or Tune trial  --submit, poll, stop-->  Desk (named actor)  <--next, report, finish--  crew (Ray Train)
"""

from __future__ import annotations

import functools
import gc
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from armillary import collectives
from armillary.data.splits import PreparedData, prepare
from armillary.spec.jobs import DataSpec, TrainJob
from armillary.training.api import OnReport, Submission
from armillary.training.launch import make_trainer, set_threads
from armillary.training.loop import execute
from armillary.training.preflight import check_capacity, local_capacity, plan
from armillary.training.records import create_run
from armillary.training.rundir import RunDirectory, RunRecord
from armillary.training.session import ray_session

_IDLE_SECONDS = 0.05


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


class CrewPool:
    """Warm crews, started once and used for any number of runs whose jobs ask for the same worker group.

    Made by :func:`crew_pool`. ``desk`` is the actor's name, through which Tune trials reach the crews.
    """

    def __init__(self, desk: str, crews: int) -> None:
        self.desk, self.crews = desk, crews

    def run_all(
        self,
        submissions: Sequence[Submission],
        on_report: OnReport | None = None,
        on_start: Callable[[RunDirectory], None] | None = None,
        on_finish: Callable[[RunDirectory], None] | None = None,
    ) -> list[RunRecord]:
        """Trains every submission and returns the records in the same order; a failed run is a record, not an exception.

        Raises:
            UserError: one of the jobs cannot run; nothing was started.
        """
        load = _remembering_prepare()
        plans = [plan(item.job, prepared=load) for item in submissions]
        runs = [create_run(ready, item.group, item.variant) for ready, item in zip(plans, submissions, strict=True)]
        handles = [TrialHandle(self.desk, run, item.job) for run, item in zip(runs, submissions, strict=True)]
        if on_start:
            for run in runs:
                on_start(run)
        pending = list(handles)
        try:
            while pending:
                for handle in list(pending):
                    for step, metrics in handle.new_reports():
                        if on_report:
                            on_report(handle.run.run_id, step, metrics)
                    if handle.done:
                        pending.remove(handle)
                        handle.settle()
                        if on_finish:
                            on_finish(handle.run)
                time.sleep(_IDLE_SECONDS)
        except KeyboardInterrupt:
            for handle in pending:
                handle.run.update(status="stopped", error="interrupted")
            raise
        return [run.record() for run in runs]


class TrialHandle:
    """One run at the desk, seen from whoever submitted it."""

    def __init__(self, desk: str, run: RunDirectory, job: TrainJob) -> None:
        import ray

        self._get = ray.get
        self._desk = ray.get_actor(desk)
        self.run, self._seen, self.done, self.error = run, 0, False, None
        self._get(self._desk.submit.remote(str(run.path), job))

    def new_reports(self) -> list[tuple[int, dict[str, float]]]:
        """Reports that came since the last call; ``done`` turns true when the run has ended."""
        reports, self.done, self.error = self._get(self._desk.poll.remote(self.run.run_id, self._seen))
        self._seen += len(reports)
        return reports  # type: ignore[no-any-return]

    def stop(self) -> None:
        """Ends the run at its next report."""
        self._get(self._desk.stop.remote(self.run.run_id))

    def settle(self) -> RunRecord:
        """The record of an ended run; a crash is written into it."""
        record = self.run.record()
        if record.status in ("created", "running"):
            record = self.run.update(status="failed" if self.error else "stopped", error=self.error)
        return record


@contextmanager
def crew_pool(template: TrainJob, crews: int) -> Iterator[CrewPool]:
    """Starts crews with the template's worker group, and sends them home at the end.

    Args:
        template: a job whose ``train.workers``, ``gpus_per_worker`` and ``threads`` every crew has.
        crews: how many; fewer are started when the cluster is smaller.
    """
    import ray

    with ray_session(template.cluster.address) as capacity:
        check_capacity(template, capacity)
        most = max(1, int(capacity.get("CPU", 1) // template.train.workers))
        count = min(crews, most)
        name = f"desk-{secrets.token_hex(4)}"
        desk = ray.remote(num_cpus=0, max_concurrency=1)(Desk).options(name=name).remote()
        threads = [_Crew(number, name, template, count) for number in range(count)]
        for thread in threads:
            thread.start()
        try:
            yield CrewPool(name, count)
        finally:
            ray.get(desk.close.remote())
            for thread in threads:
                thread.join(timeout=20)
            ray.kill(desk)


class _Crew(threading.Thread):
    def __init__(self, number: int, desk: str, template: TrainJob, crews: int) -> None:
        super().__init__(name=f"crew-{number}", daemon=True)
        self.number, self.desk, self.template, self.crews = number, desk, template, crews

    def run(self) -> None:
        import ray
        from ray.train import RunConfig, TrainingFailedError

        from armillary.spec.home import home
        from armillary.training.launch import _innermost

        train = self.template.train
        share = max(1, int(local_capacity()["CPU"]) // (self.crews * train.workers))
        template = self.template.model_copy(
            update={"train": train.model_copy(update={"threads": train.threads or share})}
        )
        config = {"desk": self.desk, "crew": self.number, "template": template}
        storage = home() / "crews"
        trainer = make_trainer(
            _serve, config, template, RunConfig(name=f"{self.desk}-{self.number}", storage_path=str(storage))
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            desk = ray.get_actor(self.desk)
            ray.get(desk.crew_lost.remote(self.number, f"the crew was lost: {_innermost(error)}"))


def _remembering_prepare() -> Callable[..., PreparedData]:
    """A ``prepare`` that loads the same data once; seeds matter only under label noise."""

    @functools.lru_cache(maxsize=8)
    def cached(spec: DataSpec, seed: int) -> PreparedData:
        return prepare(spec, seed=seed)

    return lambda spec, *, seed: cached(spec, seed if spec.label_noise else 0)


def _serve(config: dict[str, Any]) -> None:
    """What each worker of a crew runs: rank 0 fetches runs from the desk, all train them."""
    import ray

    desk = ray.get_actor(config["desk"], namespace="armillary")
    set_threads(config["template"])
    load = _remembering_prepare()
    leads = collectives.rank() == 0
    while True:
        order = ray.get(desk.next.remote(config["crew"])) if leads else None
        order = collectives.broadcast_object(order)
        if order == "close":
            return
        if order == "wait":
            time.sleep(_IDLE_SECONDS)
            continue
        path, job = order
        run = RunDirectory(Path(path))
        error = _one(desk, run, job, load)
        if leads:
            ray.get(desk.finish.remote(run.run_id, error))
        gc.collect()


def _one(desk: Any, run: RunDirectory, job: TrainJob, load: Callable[..., PreparedData]) -> str | None:
    import ray

    def report(step: int, metrics: Mapping[str, float], folder: Path | None) -> Literal["continue", "stop"]:
        answer = None
        if collectives.rank() == 0:
            answer = ray.get(desk.report.remote(run.run_id, step, dict(metrics)))
        return collectives.broadcast_object(answer)  # type: ignore[no-any-return]

    try:
        execute(lambda: plan(job, prepared=load, capacity={"CPU": float("inf"), "GPU": float("inf")}), run, report)
    except Exception as error:  # noqa: BLE001 - a crew outlives a run that fails in any way; the desk is told
        return f"{type(error).__name__}: {error}"
    return None
