"""A short training on one core: does an objective teach an encoder anything about images it has not seen?

``python -m armillary.testing.convergence NAME ... [--seeds 3] [KEY=VALUE ...]`` prints what the suite judges, a line a
seed: the metric before and after, what should have fallen, seconds of training, and what of that misses what it should.
Reasons in ``convergence`` quote it. Seconds are the processor's; a machine that does other things at once adds some.
Settings are chosen with ``data.fold=1`` (and ``data.fold=2`` ...); the suite judges on fold 0.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from armillary.components import collapse
from armillary.evaluation import suite
from armillary.evaluation.extract import extract
from armillary.losses.tensors import normalize
from armillary.objectives import Objective, registry
from armillary.spec.jobs import TrainJob
from armillary.spec.loading import apply_overrides, parse_override
from armillary.training.optimizers import make_optimizer, set_learning_rate
from armillary.training.preflight import Plan, plan
from armillary.training.schedules import learning_rate

# Small enough for LIMIT; an objective overrides what does not suit it.
PRESET: dict[str, Any] = {
    "data": {"image_size": [32, 32]},
    "backbone": {"name": "small_convnet", "embedding_dim": 64, "width": 16},
    "optimizer": {"lr": 2e-3, "warmup_epochs": 1},
    "train": {"epochs": 12, "batch_size": 64, "threads": 1},
}
# Seconds of one core that a short training should take at most. No test measures it, as it depends on the machine.
LIMIT = 12.0
TOKEN_BACKBONE: dict[str, Any] = {"name": "small_vit", "embedding_dim": 64}
# Closer to their mean than this, embeddings of unit length have a mean cosine above 0.9999.
_LEAST_HELD_OUT = 0.01
# What takes no images.
BACKBONES: dict[str, dict[str, Any]] = {
    "text": {"name": "text_transformer", "embedding_dim": 64, "width": 32, "depth": 1},
    "graph": {"name": "gin", "embedding_dim": 64},
    "interactions": {"name": "lightgcn", "embedding_dim": 64},
}


@dataclass(frozen=True)
class Learned:
    """What a short training did.

    ``untrained`` and ``trained`` are the metric before and after; ``first`` and ``last`` the means, over their epochs,
    of what the objective says must fall, or of the loss; ``collapsed`` says why the last epoch's embeddings or
    prototypes count as collapsed, by the objective's own monitor, or the trained encoder's embeddings of the held-out
    images; ``seconds`` is what the training took of one core.
    """

    untrained: float
    trained: float
    first: float
    last: float
    collapsed: str | None
    seconds: float

    @property
    def gain(self) -> float:
        """How much better the trained encoder is."""
        return self.trained - self.untrained


def preset_job(cls: type[Objective], changes: Mapping[str, Any] | None = None) -> TrainJob:
    """The small job that an objective's ``convergence`` describes, with further overrides."""
    wish = cls.convergence
    values: dict[str, Any] = {key: dict(section) for key, section in PRESET.items()}
    values["data"]["name"] = wish.dataset
    if cls.needs.encoder == "tokens":
        values["backbone"] = TOKEN_BACKBONE
    values["backbone"] = BACKBONES.get(cls.needs.modality, values["backbone"])
    values["objective"] = {"name": cls.name}
    values["evaluate"] = {"protocols": [wish.metric.split("/")[0]]}
    return apply_overrides(TrainJob.model_validate(values), {**wish.job, **(changes or {})})


def converge(cls: type[Objective], changes: Mapping[str, Any] | None = None) -> Learned:
    """Trains the objective's small job in this process with a plain optimizer, and judges the encoder before and after.

    The judged images (people, for open-set metrics) are those that the job holds out; none of them is trained on.

    Args:
        cls: the objective.
        changes: dotted overrides of the small job, e.g. ``{"seed": 1}``.
    """
    ready = plan(preset_job(cls, changes))
    torch.manual_seed(ready.job.seed)
    objective = ready.build()
    before, start = judge(objective, ready), time.process_time()
    epochs = fit(objective, ready)
    seconds = time.process_time() - start
    name = falling(cls) or "loss"
    falls = [epoch[name] for epoch in epochs if name in epoch]
    collapsed = collapse.verdict(epochs[-1], prefix="") or collapsed_on_held_out(objective, ready)
    return Learned(before, judge(objective, ready), falls[0], falls[-1], collapsed, seconds)


def judge(objective: Objective, ready: Plan) -> float:
    """The metric of the objective's ``convergence`` on the held-out part."""
    spec = ready.job.evaluate
    results = suite.evaluate_encoder(objective.exported(), ready.data, spec.protocols, seed=ready.job.seed)
    return suite.metrics_of(results)[objective.convergence.metric]


def falling(cls: type[Objective]) -> str:
    """What must fall over the short training: what the objective says, or the loss of a method without labels."""
    without_labels = cls.needs.modality == "image" and "label" not in cls.needs.fields
    return cls.convergence.falls or ("loss" if without_labels else "")


@torch.no_grad()
def collapsed_on_held_out(objective: Objective, ready: Plan) -> str | None:
    """Why the exported encoder's embeddings of the held-out images count as one point or one line.

    For methods that watch nothing themselves, too. Unlike their monitors this leaves aside what all embeddings have in
    common: methods on patches compare no embeddings, and a common part grows that nearest neighbours do not mind.
    """
    if objective.needs.modality not in ("image", "image_text"):
        return None
    rows = normalize(extract(objective.exported(), ready.data.evaluation.images).double())
    centred = rows - rows.mean(dim=0)
    spread = float(centred.square().sum(dim=1).mean().sqrt())
    rank, dim = float(collapse.effective_rank(centred.T @ centred)), rows.shape[1]
    if spread < _LEAST_HELD_OUT:
        return f"held-out images have nearly one embedding: they stand {spread:.3g} from their mean, of 1"
    if rank < 1 + 0.01 * (dim - 1):
        return f"held-out embeddings lie on a line: their effective rank is {rank:.3g} of {dim}"
    return None


def fit(objective: Objective, ready: Plan) -> list[dict[str, float]]:
    """Trains in place; returns each epoch's mean ``loss`` and metrics."""
    job = ready.job
    batches = ready.batches()
    optimizer = make_optimizer(objective, job.optimizer)
    steps, means = batches.steps_per_epoch, []
    for epoch in range(job.train.epochs):
        torch.manual_seed(job.seed + epoch)
        objective.train()
        objective.epoch = epoch
        objective.before_epoch(epoch, batches.samples)
        totals: dict[str, float] = defaultdict(float)
        for step, batch in enumerate(batches.epoch(epoch)):
            objective.step = epoch * steps + step
            set_learning_rate(optimizer, learning_rate(job.optimizer, epoch + (step + 1) / steps, job.train.epochs))
            optimizer.zero_grad(set_to_none=True)
            output = objective(batch)
            output.loss.backward()
            optimizer.step()
            objective.after_step(objective.step)
            for name, value in {"loss": output.loss, **output.metrics}.items():
                totals[name] += float(value.detach()) / steps
        means.append(dict(totals) | {name: float(value) for name, value in objective.epoch_metrics().items()})
    return means


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what the suite judges, for named objectives and several seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("given", nargs="+", metavar="NAME | KEY=VALUE", help="objectives, and changes to their jobs")
    parser.add_argument("--seeds", type=int, default=1, help="of each, counted from 0")
    options = parser.parse_intermixed_args(arguments)
    changes: dict[str, Any] = dict(parse_override(text) for text in options.given if "=" in text)
    torch.set_num_threads(1)
    for cls in (registry.get(name) for name in options.given if "=" not in name):
        wish = cls.convergence
        for seed in range(options.seeds):
            learned = converge(cls, {**changes, "seed": seed})
            fallen = f"{falling(cls) or 'loss'} {learned.first:.3f} to {learned.last:.3f}"
            below = " BELOW" if learned.gain < wish.margin else ""
            late = f" OVER {LIMIT:g} s" if learned.seconds > LIMIT else ""
            sys.stdout.write(
                f"{cls.name} seed {seed}: {wish.metric} {learned.untrained:.3f} to {learned.trained:.3f}, "
                f"gain {learned.gain:+.3f} (margin {wish.margin:g}){below}; {fallen}; {learned.seconds:.1f} s{late}; "
                f"{learned.collapsed or 'not collapsed'}\n"
            )
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
