"""Sweeps: Optuna proposes, Ray Tune schedules, crews train. The only module that imports ray.tune and optuna.

A trial is an actor that holds no model: it hands its run to the crews' desk and passes their reports on to Tune, which
alone decides who goes on. The Optuna study lives in a database under a name of its own and outlives the process.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from armillary.spec.errors import UserError, unknown_name
from armillary.spec.home import home
from armillary.spec.jobs import SweepJob, TrainJob
from armillary.spec.loading import apply_overrides, dump_job, load_job
from armillary.spec.spaces import Range, load_space
from armillary.training.api import OnReport
from armillary.training.crew import CrewPool, crew_pool
from armillary.training.preflight import Plan, plan
from armillary.training.rundir import RunDirectory, write_atomically

_POLL_SECONDS = 0.1


class Trial(BaseModel):
    """One trial of a sweep: what was tried, and what came of it. ``epochs`` counts those trained."""

    run_id: str
    parameters: dict[str, Any]
    value: float | None = None
    epochs: int = 0
    status: str = "finished"


class SweepResult(BaseModel):
    """What a sweep found. ``best`` is the best trial that was trained to the end."""

    sweep_id: str
    study: str
    storage: str
    metric: str
    direction: str
    trials: list[Trial] = Field(default_factory=list)
    best: Trial | None = None
    finished: bool = False


def sweeps_dir() -> Path:
    """One folder per sweep."""
    return home() / "sweeps"


def run_sweep(
    job: SweepJob,
    *,
    resume: str | None = None,
    pool: CrewPool | None = None,
    on_start: Callable[[str], None] | None = None,
    on_report: OnReport | None = None,
    on_finish: Callable[[RunDirectory], object] | None = None,
) -> SweepResult:
    """Searches for the hyperparameters with the best metric.

    Args:
        job: base job, space and budget.
        resume: the id of a sweep to go on with until ``job.trials`` trials are told.
        pool: crews to train on; ``None`` starts ``job.concurrent`` of them.
        on_start: called with the sweep's id before the first trial.
        on_report: called after every epoch of every trial.
        on_finish: called with every trial's run once it ended.

    Raises:
        UserError: the base job cannot run or the space does not fit it; nothing was started.
    """
    base, space, ready = check_sweep(job)
    sweep_id = resume or f"{time.strftime('%Y%m%d-%H%M%S')}-{job.name}-{secrets.token_hex(2)}"
    folder = sweeps_dir() / sweep_id
    if resume:
        _settle_lost_runs(sweep_id)
    else:
        folder.mkdir(parents=True)
        write_atomically(folder / "sweep.yaml", dump_job(job))
    if on_start:
        on_start(sweep_id)
    if pool is None:
        with crew_pool(base, job.concurrent) as own:
            return _search(job, base, space, ready, sweep_id, own, on_report, on_finish)
    return _search(job, base, space, ready, sweep_id, pool, on_report, on_finish)


def find_sweep(sweep_id: str | None) -> tuple[str, SweepJob]:
    """The sweep to resume: the named one, or the last that did not finish, with its job.

    Raises:
        UserError: there is none, or it is finished.
    """
    known = sorted(path.parent.name for path in sweeps_dir().glob("*/sweep.yaml"))
    open_ones = [name for name in known if not read_result(name).finished]
    if sweep_id is None:
        if not open_ones:
            raise UserError("there is no unfinished sweep to resume")
        sweep_id = open_ones[-1]
    if sweep_id not in known:
        raise unknown_name("sweep", sweep_id, known) if known else UserError(f"there is no sweep {sweep_id!r}")
    if sweep_id not in open_ones:
        raise UserError(f"sweep {sweep_id} is finished")
    job = load_job(sweeps_dir() / sweep_id / "sweep.yaml", kind="sweep")
    assert isinstance(job, SweepJob)
    return sweep_id, job


def read_result(sweep_id: str) -> SweepResult:
    """What a sweep has found so far."""
    path = sweeps_dir() / sweep_id / "result.json"
    if path.is_file():
        return SweepResult.model_validate_json(path.read_text())
    return SweepResult(sweep_id=sweep_id, study=sweep_id, storage="", metric="", direction="max")


def check_sweep(job: SweepJob) -> tuple[TrainJob, dict[str, Range], Plan]:
    """Checks a sweep as a whole, the corners of its space included.

    Raises:
        UserError: what is wrong, before anything starts.
    """
    space = load_space(job.space)
    base = job.base
    if not base.train.epochs:
        raise UserError("a sweep of runs without training has nothing to find", key="base.train.epochs", allowed=">= 1")
    if job.scheduler == "asha" and not base.evaluate.every:
        # Early stopping needs the metric before the end: at least at the first rung.
        base = apply_overrides(base, {"evaluate.every": min(job.grace_epochs, base.train.epochs)})
    protocol = job.metric.split("/")[0]
    if protocol != "train" and protocol not in base.evaluate.protocols:
        raise UserError(
            f"no evaluation of the base job gives {job.metric!r}",
            key="metric",
            allowed=", ".join(f"{name}/..." for name in (*base.evaluate.protocols, "train")),
        )
    for corner in (0, -1):
        values = {key: spread.ends()[corner] for key, spread in space.items()}
        ready = plan(apply_overrides(base, values))
    return base, space, ready


def _distribution(spread: Range) -> Any:
    import optuna

    if spread.choices is not None:
        return optuna.distributions.CategoricalDistribution(spread.choices)
    assert spread.low is not None
    assert spread.high is not None
    if spread.integer:
        return optuna.distributions.IntDistribution(int(spread.low), int(spread.high), log=spread.log)
    return optuna.distributions.FloatDistribution(spread.low, spread.high, log=spread.log)


def _sampler(job: SweepJob, told: int) -> Any:
    import optuna

    # A resumed sampler must not draw the random trials of its first life again.
    seed = job.seed + told
    if job.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if job.sampler == "nsga2":
        # A genetic search: the next generation comes of the better half, crossed and mutated.
        return optuna.samplers.NSGAIISampler(seed=seed, population_size=job.population)
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=job.startup_trials, constant_liar=True)


def _open_study(job: SweepJob, sweep_id: str) -> tuple[Any, str, int]:
    """The Optuna storage, its URL, and how many trials the study was told; trials lost in a kill are closed."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url = job.storage or f"sqlite:///{home() / 'optuna.db'}"
    storage = optuna.storages.RDBStorage(url)
    direction = optuna.study.StudyDirection.MAXIMIZE if job.direction == "max" else optuna.study.StudyDirection.MINIMIZE
    study = optuna.create_study(study_name=sweep_id, storage=storage, direction=direction, load_if_exists=True)
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    told = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    return storage, url, len(told)


def _search(
    job: SweepJob,
    base: TrainJob,
    space: Mapping[str, Range],
    ready: Plan,
    sweep_id: str,
    pool: CrewPool,
    on_report: OnReport | None,
    on_finish: Callable[[RunDirectory], object] | None,
) -> SweepResult:
    storage, url, told = _open_study(job, sweep_id)
    result = SweepResult(sweep_id=sweep_id, study=sweep_id, storage=url, metric=job.metric, direction=job.direction)
    if told < job.trials:
        pool.share(ready.data)
        _tune(job, base, space, ready.data.fingerprint, sweep_id, pool, (storage, told), on_report)
    result = result.model_copy(update=_summary(job, base, sweep_id, on_finish))
    write_atomically(sweeps_dir() / sweep_id / "result.json", result.model_dump_json(indent=2))
    return result


def _tune(
    job: SweepJob,
    base: TrainJob,
    space: Mapping[str, Range],
    fingerprint: str,
    sweep_id: str,
    pool: CrewPool,
    study: tuple[Any, int],
    on_report: OnReport | None,
) -> None:
    # Ctrl-C must reach our own handler, which says how to resume.
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
    from ray.tune.search.optuna import OptunaSearch

    from armillary.sweeps.trial import CrewTrial, Progress

    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    storage, told = study
    epochs = base.train.epochs
    scheduler = FIFOScheduler()
    if job.scheduler == "asha":
        scheduler = ASHAScheduler(
            time_attr="epoch",
            max_t=epochs,
            grace_period=min(job.grace_epochs, epochs),
            reduction_factor=job.reduction,
        )
    searcher = OptunaSearch(
        {key: _distribution(spread) for key, spread in space.items()},
        metric="value",
        mode=job.direction,
        sampler=_sampler(job, told),
        study_name=sweep_id,
        storage=storage,
    )
    fixed = {
        "home": str(home()),
        "desk": pool.desk,
        "base": base,
        "metric": job.metric,
        "fingerprint": fingerprint,
        "group": f"sweep/{sweep_id}",
    }
    # Crews hold the CPUs. Tune wants a resource for every trial; a byte of memory is one that every node has.
    trainable = tune.with_resources(tune.with_parameters(CrewTrial, fixed=fixed), {"cpu": 0, "memory": 1})
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            metric="value",
            mode=job.direction,
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=job.trials - told,
            max_concurrent_trials=pool.crews,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(sweeps_dir() / sweep_id),
            verbose=0,
            callbacks=[Progress(on_report)] if on_report else [],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )
    tuner.fit()


def _runs_of(sweep_id: str) -> list[RunDirectory]:
    from armillary.training.rundir import all_runs

    return [run for run in all_runs() if run.record().group == f"sweep/{sweep_id}"]


def _settle_lost_runs(sweep_id: str) -> None:
    for run in _runs_of(sweep_id):
        if run.record().status in ("created", "running"):
            run.update(status="failed", error="lost when the sweep was interrupted")


def _summary(
    job: SweepJob, base: TrainJob, sweep_id: str, on_finish: Callable[[RunDirectory], object] | None
) -> dict[str, Any]:
    trials = []
    for run in _runs_of(sweep_id):
        record = _settled(run)
        parameters = json.loads((run.path / "trial.json").read_text())
        steps = [event["step"] for event in run.events()]
        value = record.metrics.get(job.metric)
        trials.append(
            Trial(
                run_id=run.run_id,
                parameters=parameters,
                value=value,
                epochs=max(steps, default=0),
                status=record.status,
            )
        )
        if on_finish:
            on_finish(run)
    sign = 1 if job.direction == "max" else -1
    whole = [trial for trial in trials if trial.value is not None and trial.epochs == base.train.epochs]
    best = max(whole, key=lambda trial: sign * (trial.value or 0.0), default=None)
    return {"trials": trials, "best": best, "finished": True}


def _settled(run: RunDirectory, patience: float = 60.0) -> Any:
    """The record of a run that Tune is done with, once its crew is too."""
    deadline = time.monotonic() + patience
    record = run.record()
    while record.status in ("created", "running") and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        record = run.record()
    return record
