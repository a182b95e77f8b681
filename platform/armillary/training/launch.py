"""One run on a Ray Train worker group of its own: fault-tolerant, checkpointed, resumable."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from armillary.spec.errors import UserError, WorkFailed
from armillary.spec.home import home
from armillary.spec.jobs import TrainJob
from armillary.spec.loading import dump_job, load_job
from armillary.training.api import OnReport
from armillary.training.loop import execute
from armillary.training.model import load_tokenizer
from armillary.training.preflight import Plan, check_capacity, plan, with_backbone
from armillary.training.records import create_run
from armillary.training.rundir import RunDirectory, RunRecord, write_atomically
from armillary.training.session import ray_session
from armillary.training.sharing import References, Shelf, remembering_prepare

CHECKPOINTS = "checkpoints"
_POLL_SECONDS = 0.2


def run_job(
    job: TrainJob,
    *,
    resume: RunDirectory | None = None,
    group: str | None = None,
    variant: str | None = None,
    on_start: Callable[[RunDirectory], None] | None = None,
    on_report: OnReport | None = None,
) -> RunRecord:
    """Trains a job to its end.

    Args:
        job: what to train.
        resume: a run to go on with from its last checkpoint; ``None`` starts a new one. The number of workers and the
            ZeRO stage may differ from when it was started.
        group: the sweep, study or regression the run belongs to.
        variant: its row there.
        on_start: called with the run's folder before training starts.
        on_report: called after every epoch.

    Raises:
        UserError: the job cannot run; nothing was started.
        WorkFailed: training broke off; what was checkpointed is kept.
    """
    job = with_backbone(job)
    if resume:
        check_same_model(job, resume)
    ready = plan(job)
    with ray_session(job.cluster.address) as capacity:
        check_capacity(job, capacity)
        run = resume or create_run(job, ready.data.fingerprint, group=group, variant=variant)
        shelf = Shelf()
        shelf.offer(ready.data)
        # The workers read the object store's copy; this process needs none of its own.
        del ready
        if resume:
            with run.claimed():
                write_atomically(run.path / "job.yaml", dump_job(job))
        if on_start:
            on_start(run)
        thread = _Fit(job, run, shelf.references)
        thread.start()
        try:
            _follow(run, thread, on_report)
        except KeyboardInterrupt:
            run.update(status="stopped", error="interrupted")
            raise
    record = run.record()
    if record.status == "finished":
        return record
    reason = record.error or thread.problem or "the workers ended without a result"
    run.update(status="failed", error=reason)
    raise WorkFailed(f"run {run.run_id} failed: {reason}\n  resume it with: armillary run --resume {run.run_id}")


class _Fit(threading.Thread):
    """Ray Train blocks while it trains; a thread keeps the main one free for progress and Ctrl-C."""

    def __init__(self, job: TrainJob, run: RunDirectory, pixels: References) -> None:
        super().__init__(name="ray-train", daemon=True)
        self.job, self.run_directory, self.pixels = job, run, pixels
        self.problem: str | None = None
        self._failure: Exception | None = None

    def run(self) -> None:
        from ray.train import CheckpointConfig, FailureConfig, RunConfig

        trainer = make_trainer(
            _work,
            {"run": str(self.run_directory.path), "job": self.job, "pixels": self.pixels},
            self.job,
            RunConfig(
                name=CHECKPOINTS,
                storage_path=str(self.run_directory.path),
                failure_config=FailureConfig(max_failures=2),
                checkpoint_config=CheckpointConfig(num_to_keep=self.job.train.keep_checkpoints),
            ),
        )
        try:
            trainer.fit()
        except Exception as error:  # noqa: BLE001 - the main thread tells the user; after Ctrl-C Ray itself is gone
            # Its frames hold Ray's handles. Let go while Ray shuts down, they would end the process at once.
            self._failure = error
            self.problem = innermost(error)


def make_trainer(
    function: Callable[[dict[str, Any]], None], config: dict[str, Any], job: TrainJob, run_config: Any
) -> Any:
    """A Ray Train trainer with the job's worker group."""
    from ray.train import ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    train = job.train
    gpu = train.gpus_per_worker > 0
    return TorchTrainer(
        function,
        train_loop_config={"home": str(home()), **config},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=train.workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": 1, **({"GPU": train.gpus_per_worker} if gpu else {})},
        ),
        run_config=run_config,
    )


def innermost(error: BaseException) -> str:
    """What really went wrong, without the layers Ray wraps around it; one entry a failed worker."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        return "; ".join(f"worker {rank}: {innermost(failure)}" for rank, failure in sorted(failures.items()))
    cause = getattr(error, "cause", None) or error.__cause__
    return innermost(cause) if cause is not None else f"{type(error).__name__}: {error}"


def _follow(run: RunDirectory, thread: threading.Thread, on_report: OnReport | None) -> None:
    seen = sum(1 for _ in run.events())
    while True:
        alive = thread.is_alive()
        for number, event in enumerate(run.events()):
            if number >= seen:
                seen = number + 1
                if on_report:
                    on_report(run.run_id, event["step"], event["metrics"])
        if not alive:
            return
        thread.join(_POLL_SECONDS)


def enter_worker(config: Mapping[str, Any], job: TrainJob) -> None:
    """Makes a worker process see the driver's state folder, and shares the node's cores among its workers."""
    os.environ["ARMILLARY_HOME"] = config["home"]
    torch.set_num_threads(job.train.threads or max(1, (os.cpu_count() or 1) // job.train.workers))


def _work(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    from ray import train

    job: TrainJob = config["job"]
    enter_worker(config, job)

    def report(step: int, metrics: Mapping[str, float], folder: Path | None) -> Literal["continue", "stop"]:
        checkpoint = train.Checkpoint.from_directory(str(folder)) if folder else None
        name = f"epoch-{step:06d}" if folder else None
        train.report(dict(metrics), checkpoint=checkpoint, checkpoint_dir_name=name)
        return "continue"

    stored = train.get_checkpoint()
    run = RunDirectory(Path(config["run"]))

    def load_plan() -> Plan:
        load = remembering_prepare(lambda: config["pixels"])
        # What checkpoints learned of are the tokens of the tokenizer that the run began with.
        return plan(job, prepared=load, capacity=_ENOUGH, tokenizer=load_tokenizer(run) if stored else "")

    if stored is None:
        execute(load_plan, run, report)
        return
    with stored.as_directory() as folder:
        execute(load_plan, run, report, Path(folder))


# The driver has checked the job against the cluster; a worker sees only its own node.
_ENOUGH = {"CPU": float("inf"), "GPU": float("inf")}


def check_same_model(job: TrainJob, run: RunDirectory) -> None:
    """Checks that a job asks for the model that a run's checkpoints hold.

    Raises:
        UserError: it does not; names the first key that differs.
    """
    stored = load_job(run.path / "job.yaml")
    assert isinstance(stored, TrainJob)
    for section in ("backbone", "objective", "data"):
        before, now = (getattr(item, section).model_dump(mode="json") for item in (stored, job))
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key):
                raise UserError(
                    f"the checkpoints of run {run.run_id} are of another model: it was started with "
                    f"{before.get(key)!r}, found {now.get(key)!r}",
                    key=f"{section}.{key}",
                    hint="start a new run to change it; workers, stage, precision and evaluation may change on resume",
                )


def find_resumable(run_id: str | None) -> RunDirectory:
    """The run to resume: the named one, or the last that did not finish.

    Raises:
        UserError: there is none, or it is finished.
    """
    from armillary.training.rundir import all_runs

    if run_id:
        run = RunDirectory.find(run_id)
    else:
        unfinished = [run for run in all_runs() if run.record().status != "finished" and run.record().group is None]
        if not unfinished:
            raise UserError("there is no unfinished run to resume")
        run = unfinished[-1]
    if run.record().status == "finished":
        raise UserError(f"run {run.run_id} is finished", hint="raise train.epochs in a new run to train longer")
    return run
