"""The rows of class heads, split over workers and trained beside the engine.

DeepSpeed averages what it holds over workers. A row's gradient is complete on the worker that owns the row, so that the
rows are taken out of the module before DeepSpeed sees it: they, their optimizer state and their gradients stay where
they are. With one worker the one part holds all rows; nothing else differs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from armillary import collectives
from armillary.components import counter
from armillary.losses.class_head import ClassHeadLoss
from armillary.objectives import Objective
from armillary.spec.jobs import TrainJob
from armillary.training.optimizers import optimizer_over, set_learning_rate
from armillary.training.shards import ShardReader

Slices = dict[tuple[str, str, int], Tensor]


class ClassSampler:
    """Partial FC: all classes of the batch, and random others up to a share of the worker's rows.

    An et al., "Partial FC: Training 10 Million Identities on a Single Machine", ICCV Workshops 2021, arXiv 2010.05222.
    The others of a step are those with the smallest hash of (seed, step, class).

    Args:
        rate: the share, in (0, 1].
        first: the class of the worker's first row.
        rows: how many rows it has.
        objective: says which step it is.
        seed: the run's.
    """

    def __init__(self, rate: float, first: int, rows: int, objective: Objective, seed: int) -> None:
        self._count, self._objective, self._seed = math.ceil(rate * rows), objective, seed
        self._classes = torch.arange(first, first + rows)

    def __call__(self, positives: Tensor) -> Tensor:
        """Sorted positions of the rows that take part; ``positives`` are those of the batch's classes."""
        keys = counter.sample_keys(counter.key(self._seed, self._objective.step), self._classes.to(positives.device))
        keys[positives] = torch.iinfo(torch.int64).min
        count = min(len(keys), max(self._count, len(positives)))
        return keys.topk(count, largest=False).indices.sort().values


class HeadRows:
    """All class rows of an objective that this worker owns.

    Args:
        objective: its heads' rows are split, in place; it must be on its device.
        job: the optimizer, clipping and sampling are the job's.
    """

    def __init__(self, objective: Objective, job: TrainJob) -> None:
        self._clip = float(job.train.deepspeed.get("gradient_clipping", job.train.clip_norm))
        self._heads = {name: head for name, head in objective.named_modules() if isinstance(head, ClassHeadLoss)}
        self._joint_norm: Tensor | None = None
        self._collected: list[tuple[Tensor, Tensor | None, Tensor]] | None = None
        self._places: dict[str, int] = {}  # flattened position of this worker's first element, by full name
        self.rows: dict[str, Tensor] = {}
        self._trained: list[tuple[ClassHeadLoss, str, Tensor]] = []
        self._kinds: dict[str, str] = {}  # how checkpoints name it, by full name: param or buffer
        for prefix, head in self._heads.items():
            parameters = dict(head.named_parameters(recurse=False))
            split = head.split_rows(collectives.rank(), collectives.world_size())
            if job.train.sample_rate < 1:
                head.row_sampler = ClassSampler(job.train.sample_rate, split.first, split.count, objective, job.seed)
            for name, row in head.rows().items():
                full = f"{prefix}.{name}" if prefix else name
                self.rows[full] = row
                self._places[full] = split.first * math.prod(row.shape[1:])
                self._kinds[full] = "param" if name in parameters else "buffer"
                if row.requires_grad:
                    self._trained.append((head, name, row))
        trained = [row for _, _, row in self._trained]
        self._optimizer = optimizer_over(trained, job.optimizer) if trained else None

    def __bool__(self) -> bool:
        return self._optimizer is not None

    @torch.no_grad()
    def whole(self) -> dict[str, Tensor]:
        """All workers' rows put together, by name."""
        found = {}
        for head_name, head in self._heads.items():
            for name, row in head.rows().items():
                # Workers at the end may have fewer rows, or none.
                most = collectives.all_reduce_max(torch.tensor(len(row), device=row.device))
                padded = row.new_zeros(int(most), *row.shape[1:])
                padded[: len(row)] = row
                full = f"{head_name}.{name}" if head_name else name
                found[full] = collectives.gather_no_grad(padded)[: head.num_classes]
        return found

    # One step ----------------------------------------------------------------------------------------------------

    def join_norms(self, engine: Any) -> None:
        """Makes DeepSpeed clip by the norm of backbone and rows together, at whatever stage it works."""
        if not self or self._clip == 0:
            return
        optimizer = engine.optimizer
        if hasattr(optimizer, "_get_norm_groups"):  # stage 3
            groups = optimizer._get_norm_groups
            optimizer._get_norm_groups = lambda: [self._joint(torch.stack([*map(torch.as_tensor, groups())]).norm())]
        elif hasattr(optimizer, "scaled_global_norm"):  # stages 1 and 2
            scaled = optimizer.scaled_global_norm
            optimizer.scaled_global_norm = lambda norm_type=2: self._joint(scaled(norm_type))
        else:
            engine.clip_fp32_gradients = lambda: self._clip_replicated(engine.module)

    def _joint(self, backbone: Tensor) -> Tensor:
        self._joint_norm = torch.hypot(backbone.float(), self.gradient_norm())
        return self._joint_norm

    def _clip_replicated(self, module: torch.nn.Module) -> None:
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        joint = self._joint(torch.nn.utils.get_total_norm(gradients))
        torch.nn.utils.clip_grads_with_norm_(module.parameters(), self._clip, joint)

    def gradient_norm(self) -> Tensor:
        """The 2-norm of the gradients of all workers' rows, once a step's micro-batches are through."""
        squares = [gradient.square().sum() for _, _, gradient in self._gradients()]
        total = torch.stack(squares).sum() if squares else torch.zeros((), device=self._trained[0][2].device)
        return collectives.all_reduce_sum(total).sqrt()

    def _gradients(self) -> list[tuple[Tensor, Tensor | None, Tensor]]:
        """(row tensor, rows that took part or ``None`` for all, their gradient)."""
        if self._collected is None:
            self._collected = []
            for head, name, row in self._trained:
                if head.sampled_rows:
                    self._collected += [(row, *found) for found in _sampled_gradient(head, name)]
                elif row.grad is not None:
                    self._collected.append((row, None, row.grad))
        return self._collected

    @torch.no_grad()
    def step(self, lr: float, applied: bool) -> None:
        """One optimizer step on the collected gradients, which are then forgotten.

        Args:
            lr: the learning rate.
            applied: whether the engine made its step; it leaves out those whose gradients are not finite.
        """
        if self._optimizer is None:
            return
        if applied:
            set_learning_rate(self._optimizer, lr)
            parts = self._gradients()
            if self._joint_norm is not None:
                factor = (self._clip / (self._joint_norm + 1e-6)).clamp_max(1.0)
                for _, _, gradient in parts:
                    gradient.mul_(factor)
            with _compact(self._optimizer, parts):
                self._optimizer.step()
        self._joint_norm = self._collected = None
        self._optimizer.zero_grad(set_to_none=True)
        for head in self._heads.values():
            head.sampled_rows.clear()

    # Checkpoints -------------------------------------------------------------------------------------------------

    def slices(self) -> Slices:
        """What this worker's checkpoint file holds: rows by class, with optimizer state."""
        slices: Slices = {}
        for name, row in self.rows.items():
            if not row.numel():
                continue
            start = self._places[name]
            slices[self._kinds[name], name, start] = row.detach().reshape(-1)
            for key, value in self._state(row).items():
                slices[key, name, start] = value.reshape(-1) if value.ndim else value
        return slices

    @torch.no_grad()
    def load(self, reader: ShardReader) -> None:
        """Takes this worker's rows, and their optimizer state, out of a checkpoint of any number of workers."""
        for name, row in self.rows.items():
            for kind in reader.kinds(name):
                stored = reader.length(kind, name)
                value = (
                    reader.whole(kind, name).clone()
                    if stored is None
                    else reader.cut(kind, name, self._places[name], row.numel()).view(row.shape).to(row.device)
                )
                if kind in {"param", "buffer"}:
                    row.copy_(value)
                elif self._optimizer is not None:
                    self._optimizer.state[row][kind] = value

    def _state(self, row: Tensor) -> dict[str, Tensor]:
        return dict(self._optimizer.state[row]) if self._optimizer is not None and row.requires_grad else {}


def _sampled_gradient(head: ClassHeadLoss, name: str) -> list[tuple[Tensor, Tensor]]:
    """(rows that took part, gradient) summed over the micro-batches; empty when no backward pass reached them."""
    found = [(ids, rows[name].grad) for ids, rows in head.sampled_rows]
    pieces = [(ids, gradient) for ids, gradient in found if gradient is not None]
    if len(pieces) < 2:
        return pieces
    union = torch.cat([ids for ids, _ in pieces]).unique()
    total = pieces[0][1].new_zeros(len(union), *pieces[0][1].shape[1:])
    for ids, gradient in pieces:
        total.index_add_(0, torch.searchsorted(union, ids), gradient)
    return [(union, total)]


@contextmanager
def _compact(optimizer: torch.optim.Optimizer, parts: list[tuple[Tensor, Tensor | None, Tensor]]) -> Iterator[None]:
    """Inside, a sampled tensor is replaced by those of its rows that took part, with their state."""
    swapped: list[tuple[Tensor, Tensor, Tensor]] = []
    whole = [list(group["params"]) for group in optimizer.param_groups]
    for row, ids, gradient in parts:
        if ids is None:
            continue
        part = row[ids].requires_grad_()
        part.grad = gradient
        if row in optimizer.state:
            optimizer.state[part] = {
                key: value[ids] if value.shape == row.shape else value for key, value in optimizer.state[row].items()
            }
        for group in optimizer.param_groups:
            group["params"] = [part if tensor is row else tensor for tensor in group["params"]]
        swapped.append((row, ids, part))
    yield
    for row, ids, part in swapped:
        row[ids] = part.detach()
        for key, value in optimizer.state.pop(part, {}).items():
            if value.shape == part.shape:
                state = optimizer.state[row].setdefault(key, torch.zeros_like(row))
                state[ids] = value
            else:
                optimizer.state[row][key] = value
    for group, tensors in zip(optimizer.param_groups, whole, strict=True):
        group["params"] = tensors
