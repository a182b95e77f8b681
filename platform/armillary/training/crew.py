"""Crews: warm Ray Train worker groups that take one run after another from a desk.

Starting a worker group costs many seconds (processes, imports, rendezvous); a crew pays once. Each run starts from a
clean slate: fresh seeds, modules and engine; data is loaded once by the driver and shared through the object store.

::

    driver or Tune trial  --submit, poll, stop-->  Desk (named actor)  <--next, report, finish--  crew (Ray Train)
"""

from __future__ import annotations

import gc
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from armillary import collectives
from armillary.data.splits import PreparedData
from armillary.spec.home import home
from armillary.spec.jobs import TrainJob
from armillary.training.api import OnReport, Submission
from armillary.training.desk import NAMESPACE, Desk, settle
from armillary.training.launch import enter_worker, innermost, make_trainer
from armillary.training.loop import execute
from armillary.training.preflight import check_capacity, local_capacity, plan
from armillary.training.records import create_run
from armillary.training.rundir import RunDirectory, RunRecord
from armillary.training.session import ray_session
from armillary.training.sharing import Prepare, Shelf, remembering_prepare

_IDLE_SECONDS = 0.1


class CrewPool:
    """Warm crews, started once and used for any number of runs whose jobs ask for the same worker group.

    Made by :func:`crew_pool`. ``desk`` is the actor's name, through which Tune trials reach the crews.
    """

    def __init__(self, desk: str, crews: int) -> None:
        self.desk, self.crews = desk, crews
        self._shelf = Shelf()

    def share(self, data: PreparedData) -> None:
        """Offers a dataset to the crews through the object store, so that none of them has to load it."""
        import ray

        self._shelf.offer(data)
        desk: Any = ray.get_actor(self.desk, namespace=NAMESPACE)
        ray.get(desk.offer.remote(self._shelf.references))

    def run_all(
        self,
        submissions: Sequence[Submission],
        on_report: OnReport | None = None,
        on_finish: Callable[[int, RunDirectory], None] | None = None,
    ) -> list[RunRecord]:
        """Trains every submission; the records come in the same order, those of failed runs included.

        Raises:
            UserError: one of the jobs cannot run; nothing was started.
        """
        import ray

        runs = self._checked(submissions)
        desk: Any = ray.get_actor(self.desk, namespace=NAMESPACE)
        positions = {
            ray.get(desk.submit.remote(str(run.path), item.job)): at
            for at, (run, item) in enumerate(zip(runs, submissions, strict=True))
        }
        seen = dict.fromkeys(positions, 0)
        try:
            while seen:
                for run_id, (reports, done, error) in ray.get(desk.poll_all.remote(seen)).items():
                    seen[run_id] += len(reports)
                    for step, metrics in reports:
                        if on_report:
                            on_report(run_id, step, metrics)
                    if done:
                        del seen[run_id]
                        settle(runs[positions[run_id]], error)
                        if on_finish:
                            on_finish(positions[run_id], runs[positions[run_id]])
                time.sleep(_IDLE_SECONDS)
        except KeyboardInterrupt:
            for run_id in seen:
                runs[positions[run_id]].update(status="stopped", error="interrupted")
            raise
        return [run.record() for run in runs]

    def _checked(self, submissions: Sequence[Submission]) -> list[RunDirectory]:
        """Run folders for jobs that can all run; their data is with the crews, and no longer in this process."""
        load = remembering_prepare()
        plans = [plan(item.job, prepared=load) for item in submissions]
        runs = [
            create_run(ready.job, ready.data.fingerprint, group=item.group, variant=item.variant)
            for ready, item in zip(plans, submissions, strict=True)
        ]
        for ready in plans:
            self.share(ready.data)
        return runs


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
        desk: Any = ray.remote(num_cpus=0)(Desk).options(name=name, namespace=NAMESPACE).remote()
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
        self.home = home()
        self._failure: Exception | None = None

    def run(self) -> None:
        import ray
        from ray.train import RunConfig

        train = self.template.train
        share = max(1, int(local_capacity()["CPU"]) // (self.crews * train.workers))
        template = self.template.model_copy(
            update={"train": train.model_copy(update={"threads": train.threads or share})}
        )
        config = {"home": str(self.home), "desk": self.desk, "crew": self.number, "template": template}
        trainer = make_trainer(
            _serve,
            config,
            template,
            RunConfig(name=f"{self.desk}-{self.number}", storage_path=str(self.home / "crews")),
        )
        try:
            trainer.fit()
        except Exception as error:  # noqa: BLE001 - whatever ended the crew, its runs must not wait for ever
            # Its frames hold Ray's handles. Let go while Ray shuts down, they would end the process at once.
            self._failure = error
            if not ray.is_initialized():
                return  # Ctrl-C took Ray down first; there is nobody left to tell
            desk: Any = ray.get_actor(self.desk, namespace=NAMESPACE)
            ray.get(desk.crew_lost.remote(self.number, f"the crew was lost: {innermost(error)}"))


def _serve(config: dict[str, Any]) -> None:
    """What each worker of a crew runs: rank 0 fetches runs from the desk, all train them."""
    import ray

    desk = ray.get_actor(config["desk"], namespace=NAMESPACE)
    enter_worker(config, config["template"])
    get: Any = ray.get
    load = remembering_prepare(lambda: get(desk.offered.remote()))
    leads = collectives.rank() == 0
    while True:
        order: Any = collectives.broadcast_object(ray.get(desk.next.remote(config["crew"])) if leads else None)
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


def _one(desk: Any, run: RunDirectory, job: TrainJob, load: Prepare) -> str | None:
    import ray

    def report(step: int, metrics: Mapping[str, float], _: Path | None) -> Literal["continue", "stop"]:
        leads = collectives.rank() == 0
        answer = ray.get(desk.report.remote(run.run_id, step, dict(metrics))) if leads else None
        return "stop" if collectives.broadcast_object(answer) == "stop" else "continue"

    try:
        execute(lambda: plan(job, prepared=load, capacity={"CPU": float("inf"), "GPU": float("inf")}), run, report)
    except Exception as error:  # noqa: BLE001 - a crew outlives a run that fails in any way; the desk is told
        return f"{type(error).__name__}: {error}"
    return None
