"""What a worker does with a plan: train, report, checkpoint, evaluate. The same for a run of its own and for a crew."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from armillary import collectives
from armillary.components import collapse
from armillary.components.normalization import convert_batch_norm
from armillary.data.loader import Batches
from armillary.evaluation import suite
from armillary.evaluation.grids import save_grid
from armillary.evaluation.result import ProtocolResult
from armillary.objectives import Batch, Objective, registry
from armillary.spec.errors import UserError
from armillary.spec.loading import digest
from armillary.training.engine import Engine
from armillary.training.model import TOKENIZER, save_encoder, save_head, save_projector
from armillary.training.preflight import Plan
from armillary.training.rundir import RunDirectory, RunRecord, write_atomically
from armillary.training.scarcity import is_scarce, mostly_empty
from armillary.training.schedules import learning_rate
from armillary.training.shards import read_meta, write_meta

logger = logging.getLogger(__name__)

# Held-out images that an objective's pictures are made of.
PICTURES = 8

# (step, metrics, checkpoint folder or None) -> go on or stop. Every worker calls it, with the same step.
Report = Callable[[int, Mapping[str, float], Path | None], Literal["continue", "stop"]]


@dataclass(frozen=True)
class Outcome:
    """How a run ended: the final metrics, and whether it was told to stop early."""

    metrics: dict[str, float]
    stopped: bool


def train_run(plan: Plan, run: RunDirectory, report: Report, resume_from: Path | None = None) -> Outcome:
    """Trains and evaluates one run on this worker.

    Args:
        plan: the checked job with its data.
        run: where rank 0 writes events, model and evaluation.
        report: called once an epoch on every worker.
        resume_from: a checkpoint folder to go on from.

    Returns:
        The same outcome on every worker.

    Raises:
        UserError: the checkpoint is of another model.
        FloatingPointError: the loss is no longer finite; the last checkpoint is kept.
    """
    job = plan.job
    if collectives.rank() == 0 and plan.data.tokenizer:
        # Before the first checkpoint, so that a resumed run reads the same tokens.
        write_atomically(run.path / "model" / TOKENIZER, plan.data.tokenizer)
    if job.train.epochs == 0:
        torch.manual_seed(job.seed)
        return Outcome(_conclude(plan, run, plan.build().exported()), stopped=False)
    device = worker_device()
    torch.manual_seed(job.seed)
    objective = plan.build()
    convert_batch_norm(objective)
    torch.manual_seed(job.seed)
    replica = convert_batch_norm(plan.build().exported())  # filled with the trained weights whenever they are evaluated
    batches = plan.batches(collectives.rank(), collectives.world_size(), device)
    engine = Engine(objective, job, device)
    try:
        first = _resume(engine, resume_from, plan) if resume_from else 0
        # A run killed after its last epoch has only the evaluation left; its training metrics stand in the events.
        metrics: dict[str, float] = next((event["metrics"] for event in run.events() if event["step"] == first), {})
        stopped = scarce = False
        for epoch in range(first, job.train.epochs):
            metrics = _train_epoch(engine, batches, plan, epoch)
            last = epoch + 1 == job.train.epochs
            if not last and job.evaluate.every and (epoch + 1) % job.evaluate.every == 0:
                metrics |= _evaluate(plan, engine.encoder_copy(replica))[0]
            due = last or (job.train.checkpoint_every and (epoch + 1) % job.train.checkpoint_every == 0)
            with _checkpoint(engine, plan, epoch + 1) if due else _nothing() as folder:
                if collectives.rank() == 0:
                    run.append_event(epoch + 1, metrics)
                    if is_scarce(metrics) and not scarce:
                        scarce = True
                        _tell_scarce(plan, run, epoch + 1)
                stopped = report(epoch + 1, metrics, folder) == "stop"
            if stopped:
                break
        _keep_head(run, engine)
        _keep_projector(run, engine)
        _keep_pictures(plan, run, engine)
        final = _conclude(plan, run, engine.encoder_copy(replica))
    finally:
        engine.close()
    return Outcome({**metrics, **final}, stopped)


def execute(
    load_plan: Callable[[], Plan], run: RunDirectory, report: Report, resume_from: Path | None = None
) -> RunRecord:
    """Trains a run and keeps its record: what every worker of a run or a crew calls.

    A mistake of the user's or a diverged loss is recorded, not raised: training again would only repeat it.
    """
    if collectives.rank() > 0:
        return _execute(load_plan, run, report, resume_from)
    with run.claimed():
        return _execute(load_plan, run, report, resume_from)


def _execute(load_plan: Callable[[], Plan], run: RunDirectory, report: Report, resume_from: Path | None) -> RunRecord:
    started, writes = time.monotonic(), collectives.rank() == 0
    before = run.record()
    if writes:
        run.update(status="running", error=None, warnings=[])
    changes: dict[str, object]
    try:
        plan = load_plan()
        outcome = train_run(plan, run, report, resume_from)
        changes = {"status": "stopped" if outcome.stopped else "finished", "metrics": outcome.metrics}
        changes["warnings"] = _warnings(plan, run, outcome.metrics)
    except (UserError, FloatingPointError) as error:
        changes = {"status": "failed", "error": str(error)}
    changes |= {"finished": time.time(), "seconds": before.seconds + time.monotonic() - started}
    return run.update(**changes) if writes else before


def _warnings(plan: Plan, run: RunDirectory, metrics: Mapping[str, float]) -> list[str]:
    """What is wrong with a run that ended well, by its epochs and its evaluation; rank 0 logs what it did not yet."""
    reason = collapse.verdict(metrics)
    warnings = [f"collapsed: {reason}"] if reason else []
    judged = run.path / "evaluation" / suite.WARNINGS
    if judged.is_file():
        warnings += judged.read_text().splitlines()
    for warning in warnings if collectives.rank() == 0 else []:
        logger.warning("run %s: %s", run.run_id, warning)
    # Was logged when it was first seen.
    found = _scarce(plan, run)
    return [*warnings, found[1]] if found else warnings


def _scarce(plan: Plan, run: RunDirectory) -> tuple[int, str] | None:
    spec = plan.job.objective
    return mostly_empty(plan.job, registry.hyperparameters(spec.name, spec.options), run.events())


def _tell_scarce(plan: Plan, run: RunDirectory, epoch: int) -> None:
    """Logs it in the first such epoch; a run that goes on has said it before."""
    found = _scarce(plan, run)
    if found and found[0] == epoch:
        logger.warning("run %s: %s", run.run_id, found[1])


def worker_device() -> torch.device:
    """The device of this worker: its GPU when Ray gave it one, else the CPU."""
    if torch.cuda.is_available():
        from ray.train.torch import get_device

        device: torch.device = get_device()
        return device
    return torch.device("cpu")


def _train_epoch(engine: Engine, batches: Batches, plan: Plan, epoch: int) -> dict[str, float]:
    job, started = plan.job, time.monotonic()
    # Dropout and the like draw from here; seeding by epoch makes a resumed run draw what an uninterrupted one does.
    torch.manual_seed((job.seed * 1_000_003 + epoch) * 65_537 + collectives.rank())
    engine.objective.train()
    engine.objective.epoch = epoch
    if type(engine.objective).before_epoch is not Objective.before_epoch:
        with engine.whole_parameters():
            engine.objective.before_epoch(epoch, batches.samples)
    totals: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=engine.device))
    steps = batches.steps_per_epoch
    lr = 0.0
    for step, batch in enumerate(batches.epoch(epoch)):
        engine.objective.step = epoch * steps + step
        lr = learning_rate(job.optimizer, epoch + (step + 1) / steps, job.train.epochs)
        for name, value in engine.step(split(batch, job.train.accumulate), lr).items():
            totals[name] += value / steps
        engine.objective.after_step(epoch * steps + step)
    metrics = _mean_over_workers({**totals, **engine.objective.epoch_metrics()})
    if not np.isfinite(metrics["train/loss"]):
        raise FloatingPointError(
            f"the loss became {metrics['train/loss']} in epoch {epoch + 1}; lower optimizer.lr or set train.clip_norm"
        )
    seconds = time.monotonic() - started
    return {**metrics, "train/lr": lr, "train/images_per_second": steps * batches.batch_size / seconds}


def split(batch: Batch, parts: int) -> list[Batch]:
    """Cuts a batch into equal micro-batches, in order."""
    if parts == 1:
        return [batch]
    size = len(batch.index) // parts
    return [batch.rows(slice(part * size, (part + 1) * size)) for part in range(parts)]


def _mean_over_workers(totals: Mapping[str, Tensor]) -> dict[str, float]:
    names = sorted(totals)
    values = torch.stack([totals[name].reshape(()) for name in names])
    values = collectives.all_reduce_sum(values) / collectives.world_size()
    return {f"train/{name}": value for name, value in zip(names, values.tolist(), strict=True)}


@contextmanager
def _nothing() -> Iterator[None]:
    yield None


@contextmanager
def _checkpoint(engine: Engine, plan: Plan, epoch: int) -> Iterator[Path]:
    """This worker's part of a checkpoint, in a temporary folder that lives until it was reported."""
    folder = Path(tempfile.mkdtemp(prefix="armillary-checkpoint-"))
    try:
        engine.save(folder)
        if collectives.rank() == 0:
            write_meta(folder, {"epoch": epoch, "workers": collectives.world_size(), "digest": digest(plan.job)})
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _resume(engine: Engine, folder: Path, plan: Plan) -> int:
    epoch = int(read_meta(folder)["epoch"])
    if epoch > plan.job.train.epochs:
        raise UserError(
            f"the checkpoint is of epoch {epoch}, the job ends at {plan.job.train.epochs}", key="train.epochs"
        )
    engine.load(folder)
    return epoch


def _evaluate(plan: Plan, encoder: nn.Module) -> tuple[dict[str, float], dict[str, ProtocolResult]]:
    """Metrics on every worker; whole results on rank 0, which alone computes them."""
    metrics: dict[str, float] = {}
    results: dict[str, ProtocolResult] = {}
    if collectives.rank() == 0:
        spec, device = plan.job.evaluate, worker_device()
        results = suite.evaluate_encoder(
            encoder.to(device),
            plan.data,
            spec.protocols,
            batch_size=spec.batch_size,
            flip=spec.flip,
            device=device,
            seed=plan.job.seed,
        )
        metrics = suite.metrics_of(results)
    return collectives.broadcast_object(metrics), results


def _keep_head(run: RunDirectory, engine: Engine) -> None:
    """Every worker gives its rows of class heads, rank 0 writes them."""
    rows = engine.class_rows()
    if collectives.rank() == 0:
        save_head(run.path / "model", rows)


def _keep_projector(run: RunDirectory, engine: Engine) -> None:
    """Every worker takes part, as parameters may be sharded; rank 0 writes."""
    with engine.whole_parameters():
        if collectives.rank() == 0:
            save_projector(run.path / "model", engine.objective)


def _keep_pictures(plan: Plan, run: RunDirectory, engine: Engine) -> None:
    """Every worker takes part, as parameters may be sharded; rank 0 writes."""
    if type(engine.objective).pictures is Objective.pictures:
        return
    images = plan.data.evaluation.images[torch.arange(min(PICTURES, len(plan.data.evaluation)))]
    engine.objective.eval()
    with engine.whole_parameters(), torch.no_grad():
        found = engine.objective.pictures(images.to(engine.device).float() / 255.0)
    if collectives.rank() == 0:
        for name, grid in found.items():
            save_grid(grid, run.path / "evaluation" / f"{name}.png")


def _conclude(plan: Plan, run: RunDirectory, encoder: nn.Module) -> dict[str, float]:
    """Final evaluation; rank 0 writes the model, the curves and the metrics."""
    metrics, results = _evaluate(plan, encoder)
    if collectives.rank() == 0:
        images = plan.data.train.images
        save_encoder(run.path / "model", encoder, plan.job, images.shape[1], (images.shape[2], images.shape[3]))
        suite.save_curves(results, run.path / "evaluation")
        write_atomically(run.path / "evaluation" / "metrics.json", json.dumps(metrics, indent=2))
    return metrics
