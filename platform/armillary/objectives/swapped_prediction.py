"""Clusters that are learned by gradient while codes stay balanced: SwAV."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from armillary.components.collapse import CollapseMonitor
from armillary.components.heads import Projector, Prototypes
from armillary.components.queue import Queue
from armillary.components.sinkhorn import sinkhorn
from armillary.losses.cluster_contrast import SwappedPrediction
from armillary.losses.tensors import normalize, widen
from armillary.objectives import base
from armillary.objectives.base import Batch, BuildContext, Citation, Convergence, Needs, Objective, Output
from armillary.objectives.registry import register


@register
class SwAV(Objective):
    """SwAV: every crop predicts the soft cluster of the large ones; clusters are learned and equally filled.

    Loss: :class:`armillary.losses.cluster_contrast.SwappedPrediction`. Codes come from Sinkhorn's equal partition of
    the global batch, beside which past projections may stand (one queue a large view, used once full). Prototypes have
    unit length, learn by gradient and stand still in the first steps. The survey calls them centres of an online
    k-means, which they are not; its loss is this one.
    """

    name = "swav"
    family = "clustering"
    catalog_id = "swav"
    citation = Citation(
        "Mathilde Caron, Ishan Misra, Julien Mairal, Priya Goyal, Piotr Bojanowski, Armand Joulin",
        "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments",
        2020,
        "NeurIPS",
        "https://arxiv.org/abs/2006.09882",
    )
    needs = Needs(views=8, recipe="multicrop", components=("projector", "prototypes", "queue"), batch_coupled=True)
    waivers: ClassVar[Mapping[str, str]] = {"gradcheck": "codes are targets: no gradient passes through Sinkhorn"}
    convergence = Convergence(
        margin=0.015,
        reason="a few hundred steps; three seeds gained 0.02 to 0.05",
        job={
            "views.name": "multicrop_small",
            "views.local_crops": 2,
            "backbone.pool": "mean",
            "objective.local_crops": 2,
            "objective.prototypes": 60,
            "objective.projection_dim": 64,
            "objective.projection_hidden": 256,
            "objective.frozen_steps": 20,
            # At the paper's 0.05 codes stay nearly even over so few steps.
            "objective.epsilon": 0.02,
            "optimizer.lr": 1e-2,
        },
    )

    class Hyperparameters(base.Hyperparameters):
        """Crops, prototypes, codes, queue, projector."""

        local_crops: int = Field(6, ge=0, le=32, description="small crops beside the two large ones")
        prototypes: int = Field(3000, ge=2, le=1_000_000, description="K; about three times the classes, or more")
        temperature: float = Field(0.1, ge=0.005, le=10, description="tau, of the predictions")
        epsilon: float = Field(0.05, ge=0.001, le=10, description="Sinkhorn's temperature, of the codes")
        iterations: int = Field(3, ge=1, le=100, description="passes of Sinkhorn")
        queue_size: int = Field(0, ge=0, le=1_048_576, description="past projections per large view; 0: none")
        queue_host: bool = Field(False, description="keep the queues in main memory; costs copies a step")
        queue_start: int = Field(15, ge=0, le=10_000, description="epoch from which the queue is used")
        frozen_steps: int = Field(313, ge=0, le=1_000_000, description="first steps without a gradient to prototypes")
        projection_dim: int = Field(128, ge=2, le=8192, description="width of the projection")
        projection_hidden: int = Field(2048, ge=2, le=65536, description="width of the hidden layer")

    @classmethod
    def needs_for(cls, hyperparameters: Any) -> Needs:
        """Two large crops and the wanted number of small ones."""
        crops = hyperparameters.local_crops
        return replace(cls.needs, views=2 + crops, recipe_options={"local_crops": crops})

    def build(self, context: BuildContext) -> None:
        """Makes projector, prototypes, queues and loss."""
        options = self.hyperparameters
        self.projector = Projector(context.embedding_dim, options.projection_hidden, options.projection_dim, 2)
        self.prototypes = Prototypes(options.projection_dim, options.prototypes)
        size, shape = options.queue_size, (options.projection_dim,)
        host = options.queue_host
        self.queues = nn.ModuleList(Queue(size, shape, start="zeros", host=host) for _ in range(2 if size else 0))
        self.loss, self.collapse = SwappedPrediction(options.temperature), CollapseMonitor()

    def forward(self, batch: Batch) -> Output:
        """The loss of all crops."""
        frozen = self.step < self.hyperparameters.frozen_steps
        embeddings = self.encoder(torch.cat(batch.views[:2]))
        large = self.projector(embeddings)
        self.collapse.update(embeddings, large)
        projections = [*large.chunk(2)]
        if len(batch.views) > 2:
            small = self.projector(self.encoder(torch.cat(batch.views[2:])))
            projections += small.chunk(len(batch.views) - 2)
        scores = torch.stack([self.prototypes(projection, frozen) for projection in projections])
        codes = torch.stack([self._codes(view, scores[view].detach()) for view in range(2)])
        for view in range(len(self.queues)):
            self._queue(view).hold(self.step, normalize(widen(projections[view])))
        self.collapse.update_assignments(codes.flatten(0, 1))
        loss = self.loss(scores, codes)
        return Output(loss, {"code_confidence": codes.amax(dim=2).mean()})

    def _codes(self, view: int, scores: Tensor) -> Tensor:
        options = self.hyperparameters
        shared = None
        if self.queues and self.epoch >= options.queue_start and len(self._queue(view)) == options.queue_size:
            shared = self.prototypes(self._queue(view).rows).detach()
        return sinkhorn(scores, options.epsilon, options.iterations, shared)

    def _queue(self, view: int) -> Queue:
        return cast(Queue, self.queues[view])

    def after_step(self, step: int) -> None:
        """Puts the step's projections into the queues."""
        for view in range(len(self.queues)):
            self._queue(view).write()

    def epoch_metrics(self) -> dict[str, Tensor]:
        """Collapse, and the use of the prototypes."""
        return self.collapse.metrics()
