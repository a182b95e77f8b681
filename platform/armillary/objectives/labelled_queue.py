"""Supervised contrast against a labelled queue: k drawn positives, fixed targets on the sphere."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from armillary.collectives import gather_no_grad
from armillary.components.counter import key, sample_keys, uniforms
from armillary.components.held import Held
from armillary.components.queue import Queue
from armillary.losses.k_positives import KPositives, assign_targets, uniform_targets
from armillary.losses.tensors import normalize, widen
from armillary.objectives.base import Batch, BuildContext, Citation, Convergence, Output
from armillary.objectives.queue_contrastive import MoCoV2
from armillary.objectives.registry import register

_DRAWN = 91
_SMALL = {
    "objective.queue_size": 256,
    "objective.momentum": 0.99,
    "objective.projection_dim": 64,
    "objective.projection_hidden": 256,
    "objective.temperature": 0.1,
    "views.blur": 0.0,
}


def draw_of_class(label: Tensor, columns: Tensor, order: Tensor, start: Tensor, k: int) -> Tensor:
    """``k`` columns of each row's class, without replacement: ``(batch, k)`` int64, -1 where there are fewer.

    All columns stand in one drawn order, new in every step; a row takes k of its class in a row, from a place of its
    own. So each column is as likely as any other, without a draw for every pair.

    Args:
        label: ``(batch,)``, each row's class.
        columns: ``(K,)``, each column's class.
        order: ``(K,)`` int64, the drawn order.
        start: ``(batch,)`` in [0, 1), where in its class a row begins.
        k: columns wanted.
    """
    by_class = order[columns[order].argsort(stable=True)]
    ascending = columns[by_class]
    first, last = (torch.searchsorted(ascending, label, right=right)[:, None] for right in (False, True))
    count, turn = last - first, torch.arange(k, device=label.device)
    begin = (start.double()[:, None] * count).long()
    place = first + (begin + turn) % count.clamp_min(1)
    return torch.where(turn < count, by_class[place.clamp_max(len(columns) - 1)], -1)


@register
class KCL(MoCoV2):
    """KCL: k keys of the own class, drawn from a labelled queue, are positives beside the other view.

    Equation and shapes: :class:`armillary.losses.k_positives.KPositives`. With a fixed number of positives frequent
    classes pull no harder than rare ones. The positives are drawn anew for every sample and step; slots that were not
    written yet are negatives.
    """

    name = "kcl"
    family = "contrastive_supervised"
    catalog_id = "kcl"
    citation = Citation(
        "Bingyi Kang, Yu Li, Saining Xie, Zehuan Yuan, Jiashi Feng",
        "Exploring Balanced Feature Spaces for Representation Learning",
        2021,
        "ICLR",
        "https://openreview.net/forum?id=OqtLIabPTit",
    )
    needs = replace(MoCoV2.needs, fields=("label",))
    convergence = Convergence(job=_SMALL)

    class Hyperparameters(MoCoV2.Hyperparameters):
        """Positives, and the options of MoCo v2."""

        temperature: float = Field(0.07, ge=0.005, le=10, description="divides the cosines")
        k: int = Field(6, ge=0, le=1024, description="positives drawn beside the other view")
        unused_positives: Literal["keep", "drop"] = Field(
            "keep", description="keys of the class that were not drawn: negatives, as in the paper, or left out"
        )

    def build(self, context: BuildContext) -> None:
        """Makes projector, key encoder, labelled queue and loss."""
        super().build(context)
        options = self.hyperparameters
        self.seed = context.seed
        self.queue = Queue(options.queue_size, (options.projection_dim,), columns=("label",), host=options.queue_host)
        self.positives = KPositives(options.temperature, options.unused_positives)

    def forward(self, batch: Batch) -> Output:
        """The loss of the first view's queries with the second view's keys."""
        metrics: dict[str, Tensor] = {}
        queries, keys = self.query_and_key(batch)
        drawn = self._drawn(batch)
        loss = self.contrast(batch, queries, keys, drawn, metrics)
        self.queue.hold(self.step, keys, label=batch.label)
        return Output(loss, metrics)

    def contrast(
        self, batch: Batch, queries: Tensor, keys: Tensor, drawn: Tensor, metrics: dict[str, Tensor]
    ) -> Tensor:
        """The loss of queries, keys and the queue, given its positives."""
        return self.against_queue(batch, queries, keys, drawn, metrics=metrics)

    def against_queue(self, batch: Batch, queries: Tensor, keys: Tensor, drawn: Tensor, **further: Any) -> Tensor:
        """The loss, with targets if they are given."""
        drop = self.hyperparameters.unused_positives == "drop"
        same = batch.label[:, None] == self.queue.column("label")[None, :] if drop else None
        loss: Tensor = self.positives(queries, keys, self.queue.rows, drawn, same=same, **further)
        return loss

    def _drawn(self, batch: Batch) -> Tensor:
        label = self.queue.column("label")
        slots = torch.arange(len(label), device=label.device)
        order = sample_keys(key(_DRAWN, self.seed, self.step), slots).argsort(stable=True)
        start = uniforms(sample_keys(key(_DRAWN, self.seed, self.step, 1), batch.index), 1)[:, 0]
        return draw_of_class(batch.label, label, order, start, self.hyperparameters.k)


@register
class TSC(KCL):
    """TSC: KCL, and every class is drawn to a target of its own; targets lie evenly on the sphere and never move.

    Equation and shapes: :class:`armillary.losses.k_positives.KPositives`. Targets are optimised once, when the
    objective is made (:func:`armillary.losses.k_positives.uniform_targets`). Which class takes which target follows
    from the moving means of the classes' queries over all workers. The first ``start_share`` of the epochs are KCL,
    half of them in the paper, which then starts with a fresh optimizer; here the optimizer goes on.
    """

    name = "tsc"
    catalog_id = "tsc"
    citation = Citation(
        "Tianhong Li, Peng Cao, Yuan Yuan, Lijie Fan, Yuzhe Yang, Rogerio Feris, Piotr Indyk, Dina Katabi",
        "Targeted Supervised Contrastive Learning for Long-Tailed Recognition",
        2022,
        "CVPR",
        "https://arxiv.org/abs/2111.13998",
    )
    convergence = Convergence(job=_SMALL | {"objective.start_share": 0.25})

    targets: Tensor
    means: Tensor
    assignment: Tensor

    class Hyperparameters(KCL.Hyperparameters):
        """Targets, and the options of KCL."""

        target_weight: float = Field(1.0, ge=0, le=100, description="lambda, weight of the targets")
        target_temperature: float = Field(0.07, ge=0.005, le=10, description="of the targets' own problem")
        centroid_momentum: float = Field(0.9, ge=0, lt=1, description="share of the old class mean a step keeps")
        start_share: float = Field(0.5, ge=0, le=1, description="share of the epochs before targets join")
        assign_every: int = Field(10, ge=1, le=100_000, description="steps between assignments of targets to classes")
        form: Literal["paper", "released_code"] = Field("paper", description="how the two parts are normalised")

    def build(self, context: BuildContext) -> None:
        """Makes what KCL has, targets, class means and the assignment."""
        super().build(context)
        options, classes = self.hyperparameters, context.num_classes
        self.first_epoch = options.start_share * context.epochs
        self.positives = KPositives(options.temperature, options.unused_positives, options.target_weight, options.form)
        fixed = uniform_targets(classes, options.projection_dim, options.target_temperature, context.seed)
        self.register_buffer("targets", fixed)
        self.register_buffer("means", normalize(torch.randn(classes, options.projection_dim)))
        self.register_buffer("assignment", torch.arange(classes))
        self._held = Held()

    def contrast(
        self, batch: Batch, queries: Tensor, keys: Tensor, drawn: Tensor, metrics: dict[str, Tensor]
    ) -> Tensor:
        """The loss of queries, keys, the queue and, in the second phase, the targets."""
        known = (batch.label >= 0) & (batch.label < len(self.assignment))
        self._held.add(self.step, rows=normalize(widen(queries.detach()))[known], label=batch.label[known])
        if self.epoch < self.first_epoch:
            return super().contrast(batch, queries, keys, drawn, metrics)
        target = torch.where(known, self.assignment[batch.label.where(known, 0)], -1)
        loss = self.against_queue(batch, queries, keys, drawn, targets=self.targets, target=target, metrics=metrics)
        reached = normalize(widen(queries.detach())) * self.targets.to(queries.dtype)[target.clamp_min(0)]
        metrics["target_cosine"] = reached.sum(dim=1).mean()
        return loss

    def after_step(self, step: int) -> None:
        """Moves key encoder, queue and class means; assigns targets anew every so often."""
        super().after_step(step)
        held = self._held.take()
        if held:
            self._move_means(gather_no_grad(held["rows"]), gather_no_grad(held["label"]))
        if step % self.hyperparameters.assign_every == 0:
            self.assignment.copy_(assign_targets(self.targets, self.means))

    @torch.no_grad()
    def _move_means(self, rows: Tensor, label: Tensor) -> None:
        rows = rows.to(self.means.dtype)
        total = torch.zeros_like(self.means).index_add_(0, label, rows)
        seen = torch.bincount(label, minlength=len(self.means)) > 0
        moved = normalize(torch.lerp(normalize(total), self.means, self.hyperparameters.centroid_momentum))
        self.means.copy_(torch.where(seen[:, None], moved, self.means))
