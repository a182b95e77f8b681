"""A short training on one core: does an objective teach an encoder anything about images it has not seen?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from armillary.evaluation import suite
from armillary.objectives import Objective
from armillary.spec.jobs import TrainJob
from armillary.spec.loading import apply_overrides
from armillary.training.optimizers import make_optimizer, set_learning_rate
from armillary.training.preflight import Plan, plan
from armillary.training.schedules import learning_rate

# Small enough for a dozen seconds on one core; an objective overrides what does not suit it.
PRESET: dict[str, Any] = {
    "data": {"image_size": [32, 32]},
    "backbone": {"name": "small_convnet", "embedding_dim": 64, "width": 16},
    "optimizer": {"lr": 2e-3, "warmup_epochs": 1},
    "train": {"epochs": 12, "batch_size": 64, "threads": 1},
}
TOKEN_BACKBONE: dict[str, Any] = {"name": "small_vit", "embedding_dim": 64}
# What takes no images.
BACKBONES: dict[str, dict[str, Any]] = {
    "text": {"name": "text_transformer", "embedding_dim": 64, "width": 32, "depth": 1},
    "graph": {"name": "gin", "embedding_dim": 64},
    "interactions": {"name": "lightgcn", "embedding_dim": 64},
}


@dataclass(frozen=True)
class Learned:
    """What a short training did: the metric before and after, the mean loss of the first and the last epoch."""

    untrained: float
    trained: float
    first_loss: float
    last_loss: float

    @property
    def gain(self) -> float:
        """How much better the trained encoder is."""
        return self.trained - self.untrained


def preset_job(cls: type[Objective]) -> TrainJob:
    """The small job that an objective's ``convergence`` describes."""
    wish = cls.convergence
    values: dict[str, Any] = {key: dict(section) for key, section in PRESET.items()}
    values["data"]["name"] = wish.dataset
    if cls.needs.encoder == "tokens":
        values["backbone"] = TOKEN_BACKBONE
    values["backbone"] = BACKBONES.get(cls.needs.modality, values["backbone"])
    values["objective"] = {"name": cls.name}
    values["evaluate"] = {"protocols": [wish.metric.split("/")[0]]}
    return apply_overrides(TrainJob.model_validate(values), dict(wish.job))


def converge(cls: type[Objective]) -> Learned:
    """Trains the objective's small job in this process with a plain optimizer, and judges the encoder before and after.

    The judged images (people, for open-set metrics) are those that the job holds out; none of them is trained on.
    """
    ready = plan(preset_job(cls))
    torch.manual_seed(ready.job.seed)
    objective = ready.build()
    before = judge(objective, ready)
    losses = fit(objective, ready)
    return Learned(before, judge(objective, ready), losses[0], losses[-1])


def judge(objective: Objective, ready: Plan) -> float:
    """The metric of the objective's ``convergence`` on the held-out part."""
    spec = ready.job.evaluate
    results = suite.evaluate_encoder(objective.exported(), ready.data, spec.protocols, seed=ready.job.seed)
    return suite.metrics_of(results)[objective.convergence.metric]


def fit(objective: Objective, ready: Plan) -> list[float]:
    """Trains in place; returns each epoch's mean loss."""
    job = ready.job
    batches = ready.batches()
    optimizer = make_optimizer(objective, job.optimizer)
    steps, means = batches.steps_per_epoch, []
    for epoch in range(job.train.epochs):
        torch.manual_seed(job.seed + epoch)
        objective.train()
        objective.epoch = epoch
        objective.before_epoch(epoch, batches.samples)
        total = 0.0
        for step, batch in enumerate(batches.epoch(epoch)):
            objective.step = epoch * steps + step
            set_learning_rate(optimizer, learning_rate(job.optimizer, epoch + (step + 1) / steps, job.train.epochs))
            optimizer.zero_grad(set_to_none=True)
            loss = objective(batch).loss
            loss.backward()
            optimizer.step()
            objective.after_step(objective.step)
            total += float(loss.detach()) / steps
        means.append(total)
    return means
