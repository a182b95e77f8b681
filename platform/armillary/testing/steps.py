"""Training steps of tiny objectives, in one process and on the ranks of a pool."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from armillary.components.normalization import convert_batch_norm
from armillary.objectives import Batch, Needs, Objective
from armillary.testing import tiny

BATCH = 12


@dataclass
class Trace:
    """What steps left behind: each step's loss and metrics, the last gradients, all buffers at the end."""

    losses: list[float] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """An objective under some hyperparameters; what the suite is parametrised over."""

    cls: type[Objective]
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.cls.name, *(f"{key}={value}" for key, value in self.options.items())])

    def build(self, **arguments: Any) -> Objective:
        """The objective on a tiny encoder; arguments of :func:`armillary.testing.tiny.build`."""
        return tiny.build(self.cls, self.options, **arguments)

    def batch(self, size: int = BATCH, **arguments: Any) -> Batch:
        """A batch that fulfils its needs; arguments of :func:`armillary.testing.tiny.batch`."""
        return tiny.batch(self.needs, size, **arguments)

    @property
    def needs(self) -> Needs:
        """The objective's needs under these hyperparameters."""
        return self.cls.needs_for(tiny.hyperparameters(self.cls, self.options))


def gradients(objective: Objective) -> dict[str, Tensor]:
    """Copies of all gradients by parameter name."""
    return {name: p.grad.detach().clone() for name, p in objective.named_parameters() if p.grad is not None}


def train(objective: Objective, batches: list[Batch], lr: float = 0.01, average: bool = False) -> Trace:
    """Plain gradient steps with the objective's hooks.

    Args:
        objective: trained in place.
        batches: one a step.
        lr: step size.
        average: average gradients over the process group, as an engine does.
    """
    trace = Trace()
    objective.train()
    objective.before_epoch(0, lambda: iter(batches))
    for step, batch in enumerate(batches):
        objective.step = step
        objective.zero_grad(set_to_none=True)
        output = objective(batch)
        output.loss.backward()
        trace.losses.append(float(output.loss.detach()))
        trace.metrics.append({name: float(value) for name, value in output.metrics.items()})
        with torch.no_grad():
            for parameter in objective.parameters():
                if parameter.grad is None:
                    continue
                if average:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= dist.get_world_size()
                parameter.sub_(lr * parameter.grad)
        objective.after_step(step)
    trace.gradients = gradients(objective)
    trace.buffers = {name: buffer.clone() for name, buffer in objective.named_buffers()}
    return trace


def train_case(case: Case, steps: int, dtype: torch.dtype) -> Trace:
    """Steps of one process on whole batches."""
    batches = [case.batch(dtype=dtype, seed=seed) for seed in range(steps)]
    return train(case.build(dtype=dtype), batches)


def train_part(case: Case, steps: int, dtype: torch.dtype) -> Trace:
    """The same steps as a rank of a process group: its part of each batch, batch norm and gradients over all ranks."""
    objective = case.build(dtype=dtype)
    convert_batch_norm(objective)
    world_size, rank = dist.get_world_size(), dist.get_rank()
    batches = [tiny.part(case.batch(dtype=dtype, seed=seed), rank, world_size) for seed in range(steps)]
    return train(objective, batches, average=True)


def joined(parts: list[Trace]) -> Trace:
    """One process's view of the ranks' traces: losses and metrics averaged, gradients and buffers of rank 0."""
    steps = range(len(parts[0].losses))
    return Trace(
        losses=[sum(part.losses[step] for part in parts) / len(parts) for step in steps],
        metrics=[
            {name: sum(part.metrics[step][name] for part in parts) / len(parts) for name in parts[0].metrics[step]}
            for step in steps
        ],
        gradients=parts[0].gradients,
        buffers=parts[0].buffers,
    )
