"""BroadFace and QGFace: class heads beside a queue of past samples, corrected for the rows' movement."""

from __future__ import annotations

from collections.abc import Mapping
from math import pi
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from armillary.components.queue import Queue
from armillary.losses import ArcFace
from armillary.losses.queued import BroadFace, Past, QGFace, QueuedCenters, global_batch_of, queue_contrast
from armillary.objectives import base
from armillary.objectives.base import Batch, BuildContext, Citation, Convergence, Needs, Output
from armillary.objectives.bases import ClassHeadObjective
from armillary.objectives.margin_softmax import MAX_SCALE
from armillary.objectives.registry import register

_HELD_CONSTANT = "the second term reads the embeddings without gradient"


def past_of(queue: Queue, dim: int) -> Past:
    """What a queue of embeddings with their class rows side by side holds."""
    filled = queue.rows[: len(queue)]
    return Past(filled[:, :dim], queue.column("label")[: len(queue)], filled[:, dim:])


@register
class BroadFaceObjective(ClassHeadObjective):
    """BroadFace: a queue of thousands of past embeddings trains the classifier, the batch trains the encoder.

    Formula: :class:`armillary.losses.queued.BroadFace`. Embeddings are queued raw, with their labels and the class rows
    that the step has used. ``formulation: survey`` queues class rows instead, as negatives of a softmax without margin:
    :class:`armillary.losses.queued.QueuedCenters`; its queue starts with random directions.
    """

    name = "broadface"
    family = "queue_augmented"
    catalog_id = "broadface"
    citation = Citation(
        "Yonghyun Kim, Wonpyo Park, Jongju Shin",
        "BroadFace: Looking at Tens of Thousands of People at Once for Face Recognition",
        2020,
        "ECCV",
        "https://arxiv.org/abs/2008.06674",
    )
    needs = Needs(recipe="faces", fields=("label",), components=("class_head", "queue"))
    waivers: ClassVar[Mapping[str, str]] = {
        "gradcheck[broadface]": _HELD_CONSTANT,
        "gradcheck[broadface-compensate=False]": _HELD_CONSTANT,
    }
    convergence = Convergence(
        margin=0.14, job={"objective.scale": 16, "objective.margin": 0.3, "objective.queue_size": 256}
    )

    class Hyperparameters(base.Hyperparameters):
        """ArcFace's, and the queue's."""

        margin: float = Field(0.5, ge=0, le=pi / 2, description="additive margin in radians; the survey's has none")
        scale: float = Field(64.0, ge=0.01, le=MAX_SCALE, description="logit scale")
        queue_size: int = Field(32_000, ge=1, le=10**6, description="past embeddings, or past rows")
        compensate: bool = Field(True, description="correct past embeddings for the movement of their class rows")
        start_epoch: int = Field(0, ge=0, le=1000, description="epoch from which on the queue is filled")
        formulation: Literal["paper", "survey"] = Field("paper", description="survey: queue of negative class rows")

    def build(self, context: BuildContext) -> None:
        """Makes head and queue."""
        options, dim = self.hyperparameters, context.embedding_dim
        self.dim = dim
        if options.formulation == "survey":
            self.loss: Any = QueuedCenters(context.num_classes, dim, options.scale)
            self.queue = Queue(options.queue_size, (dim,), columns=("label",))
            return
        self.loss = BroadFace(context.num_classes, dim, options.margin, options.scale, options.compensate)
        self.queue = Queue(options.queue_size, (2 * dim,), start="zeros", columns=("label",))

    def forward(self, batch: Batch) -> Output:
        """The loss against the queue as earlier steps have left it."""
        metrics: dict[str, Tensor] = {}
        kept: tuple[Tensor, ...] = ()
        embeddings = self.encoder(batch.views[0])
        if self.hyperparameters.formulation == "survey":
            centers = {"centers": self.queue.rows, "center_labels": self.queue.column("label")}
            loss = self.loss(embeddings, batch.label, metrics=metrics, **centers)
        else:
            loss = self.loss(embeddings, batch.label, metrics=metrics, past=past_of(self.queue, self.dim))
            kept = (embeddings.detach().to(self.queue.rows.dtype),)
        if self.training and self.epoch >= self.hyperparameters.start_epoch:
            snapshot = self.loss.snapshot.to(self.queue.rows.dtype)
            self.queue.hold(self.step, torch.cat([*kept, snapshot], dim=1), label=batch.label)
        return Output(loss, metrics)

    def after_step(self, step: int) -> None:
        """Writes the step's samples into the queue."""
        self.queue.write()


@register
class QGFaceObjective(ClassHeadObjective):
    """QGFace: clear images train the classifier, poor ones are contrasted with a queue; the feature's length decides.

    Formula: :class:`armillary.losses.queued.QGFace`. Both views' embeddings are queued raw, where the authors' code
    queues unit ones; only their direction is compared. The contrast joins after ``start_share`` of training, theirs
    after the learning rate's first fall. Threshold, weight and queue size are not theirs: their configurations are not
    public. ``formulation: survey`` weighs two losses by a given quality Q instead, ``mean_i (1 - Q_i) contrast_i + Q_i
    arcface_i``, the contrast (InfoNCE of the two views) against the batch.
    """

    name = "qgface"
    family = "adaptive_margin"
    catalog_id = "qgface"
    citation = Citation(
        "Youzhe Song, Feng Wang",
        "QGFace: Quality-Guided Joint Training For Mixed-Quality Face Recognition",
        2023,
        "arXiv",
        "https://arxiv.org/abs/2312.17494",
    )
    needs = Needs(
        views=2,
        recipe="faces",
        fields=("label",),
        components=("class_head", "norm_statistics", "queue"),
        batch_coupled=True,
    )
    waivers: ClassVar[Mapping[str, str]] = {
        "gradcheck[qgface]": "the statistics of the lengths have no gradient",
        "gradcheck[qgface-formulation=survey]": "the queue, which is the batch, has no gradient",
    }
    convergence = Convergence(
        margin=0.1,
        job={"objective.scale": 16, "objective.margin": 0.2, "objective.start_share": 0.25, "objective.norm_rate": 0.1},
        reason="images judged poor do not train the classifier; three seeds gained 0.16 to 0.22",
    )

    class Hyperparameters(base.Hyperparameters):
        """Arguments of :class:`armillary.losses.queued.QGFace`, the queue's, and the survey's."""

        margin: float = Field(0.4, ge=0, le=1, description="AdaFace's margin; survey: ArcFace's, radians")
        scale: float = Field(64.0, ge=0.01, le=MAX_SCALE, description="logit scale")
        concentration: float = Field(0.333, ge=0, le=10, description="h, how far lengths move margin and quality")
        threshold: float = Field(0.5, gt=0, lt=1, description="tau, quality under which an image is poor")
        weight: float = Field(1.0, ge=0, le=100, description="w, weight of the contrast")
        queue_size: int = Field(8192, ge=1, le=10**6, description="past embeddings, two an image")
        start_share: float = Field(0.5, ge=0, le=1, description="share of training before poor images are contrasted")
        norm_rate: float = Field(0.01, gt=0, le=1, description="share of the batch in the statistics of lengths")
        formulation: Literal["paper", "survey"] = Field("paper", description="survey: given quality weighs two losses")

    @classmethod
    def needs_for(cls, hyperparameters: Any) -> Needs:
        """The survey's reads the images' quality."""
        if hyperparameters.formulation == "paper":
            return cls.needs
        return Needs(
            views=2, recipe="faces", fields=("label", "quality"), components=("class_head",), batch_coupled=True
        )

    def build(self, context: BuildContext) -> None:
        """Makes head and queue."""
        options, size = self.hyperparameters, (context.num_classes, context.embedding_dim)
        self.dim = context.embedding_dim
        self.contrast_from = round(options.start_share * context.epochs * context.steps_per_epoch)
        if options.formulation == "survey":
            self.loss: Any = ArcFace(*size, options.margin, options.scale, reduction="none")
            return
        own = {"margin", "scale", "concentration", "threshold", "norm_rate"}
        self.loss = QGFace(*size, **options.model_dump(include=own))
        self.queue = Queue(options.queue_size, (2 * self.dim,), start="zeros", columns=("label",))

    def forward(self, batch: Batch) -> Output:
        """The loss of both views, which pass through the encoder as one batch."""
        metrics: dict[str, Tensor] = {}
        options = self.hyperparameters
        both = self.encoder(torch.cat(batch.views))
        view1, view2 = both.chunk(2)
        if options.formulation == "survey":
            return self._weighed(view1, view2, batch, metrics)
        weight = options.weight if self.step >= self.contrast_from else 0.0
        past = past_of(self.queue, self.dim)
        loss = self.loss(view1, view2, batch.label, metrics=metrics, past=past, weight=weight)
        if self.training:
            rows = torch.cat([both.detach().to(self.queue.rows.dtype), self.loss.snapshot.to(self.queue.rows.dtype)], 1)
            # Image by image, so that the order does not depend on the number of workers.
            pairs = rows.view(2, len(view1), -1).transpose(0, 1).reshape(2 * len(view1), -1)
            self.queue.hold(self.step, pairs, label=batch.label.repeat_interleave(2))
        return Output(loss, metrics)

    def _weighed(self, view1: Tensor, view2: Tensor, batch: Batch, metrics: dict[str, Tensor]) -> Output:
        recognition = (self.loss(view1, batch.label, metrics=metrics) + self.loss(view2, batch.label)) / 2
        queue = global_batch_of(torch.cat([view1, view2]))
        scale = torch.full_like(recognition, self.hyperparameters.scale)[:, None]
        contrast = queue_contrast(view1, view2, queue, scale).squeeze(1)
        quality = batch.fields["quality"].to(recognition.dtype)
        metrics.update(recognition=recognition.detach().mean(), contrast=contrast.detach().mean())
        return Output(((1 - quality) * contrast + quality * recognition).mean(), metrics)

    def after_step(self, step: int) -> None:
        """Writes the step's samples into the queue."""
        if self.hyperparameters.formulation == "paper":
            self.queue.write()
