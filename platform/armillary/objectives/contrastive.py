"""Contrastive objectives over two views of a batch, without labels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from armillary import collectives, losses
from armillary.components.heads import Projector
from armillary.components.queue import Queue
from armillary.components.schedules import Schedule
from armillary.components.teacher import Teacher
from armillary.losses.decoupled import DecoupledContrastive
from armillary.losses.instances import InvariantSpread
from armillary.losses.key_contrast import QueuedNTXent
from armillary.losses.support_set import SupportSet
from armillary.losses.tensors import normalize, widen
from armillary.objectives import base
from armillary.objectives.base import Batch, BuildContext, Citation, Convergence, Needs, Objective, Output
from armillary.objectives.bases import ProjectedViewsObjective
from armillary.objectives.registry import register

# What rounding does in the smallest of networks.
_SMALL = {"objective.temperature": 0.5, "objective.projection_dim": 64, "objective.projection_hidden": 256}


class ProjectionHyperparameters(base.Hyperparameters):
    """The shape of SimCLR's projector."""

    projection_dim: int = Field(128, ge=2, le=8192, description="width of the projection")
    projection_hidden: int = Field(2048, ge=2, le=65536, description="width of the hidden layers")
    projection_layers: int = Field(2, ge=1, le=8, description="linear layers of the projector")


@register
class SimCLR(ProjectedViewsObjective):
    """SimCLR: two views of an image attract each other against all other images of the batch.

    Equation and shapes: :class:`armillary.losses.NTXent`. One encoder sees both views, gradient flows through both, and
    the mean runs over both directions.
    """

    name = "simclr"
    family = "contrastive_views"
    catalog_id = "simclr"
    citation = Citation(
        "Ting Chen, Simon Kornblith, Mohammad Norouzi, Geoffrey Hinton",
        "A Simple Framework for Contrastive Learning of Visual Representations",
        2020,
        "ICML",
        "https://arxiv.org/abs/2002.05709",
    )
    convergence = Convergence(margin=0.06, job=_SMALL)

    class Hyperparameters(ProjectionHyperparameters):
        """Temperature of the loss, shape of the projector."""

        temperature: float = Field(0.1, ge=0.005, le=10, description="divides the cosines; 0.5 suits small images")

    def build(self, context: BuildContext) -> None:
        """Makes projector and loss."""
        super().build(context)
        self.loss = losses.NTXent(self.hyperparameters.temperature)

    def forward(self, batch: Batch) -> Output:
        """The loss of the two views' projections."""
        metrics: dict[str, Tensor] = {}
        view1, view2 = self.project(batch.views).chunk(2)
        loss = self.loss(view1, view2, metrics=metrics)
        # log K - L bounds the views' mutual information from below, in nats; K candidates (Tian et al. 2020, InfoMin).
        candidates = 2 * len(view1) * collectives.world_size() - 1
        metrics["mutual_information"] = math.log(max(candidates, 1)) - loss.detach()
        return Output(loss, metrics)


@register
class SimCLRv2(ProjectedViewsObjective):
    """SimCLR v2: SimCLR with a deeper projector and, if wanted, a queue of a momentum encoder's keys as negatives.

    Equation and shapes: :class:`armillary.losses.key_contrast.QueuedNTXent`; without memory it is SimCLR's. The paper
    says that it adds MoCo's memory and no more: that the queue takes the teacher's projection of the second view, once
    an image, is our reading. What later stages keep of the projector are its first layers, ``projector.linear1`` on.
    """

    name = "simclr_v2"
    family = "contrastive_views"
    catalog_id = "simclr_v2"
    citation = Citation(
        "Ting Chen, Simon Kornblith, Kevin Swersky, Mohammad Norouzi, Geoffrey Hinton",
        "Big Self-Supervised Models are Strong Semi-Supervised Learners",
        2020,
        "NeurIPS",
        "https://arxiv.org/abs/2006.10029",
    )
    needs = replace(ProjectedViewsObjective.needs, components=("projector", "teacher", "queue"))
    convergence = Convergence(margin=0.06, job=_SMALL)

    class Hyperparameters(ProjectionHyperparameters):
        """SimCLR's, one layer deeper, and the memory."""

        temperature: float = Field(0.1, ge=0.005, le=10, description="divides the cosines; 0.5 suits small images")
        projection_layers: int = Field(3, ge=1, le=8, description="linear layers of the projector")
        memory_size: int = Field(0, ge=0, le=1_048_576, description="keys in the queue; 0 for none, 65536 in the paper")
        momentum: float = Field(0.999, ge=0, le=1, description="share of the old key encoder that a step keeps")

    def build(self, context: BuildContext) -> None:
        """Makes projector and loss, with a memory also key encoder and queue."""
        super().build(context)
        options = self.hyperparameters
        self.loss = QueuedNTXent(options.temperature)
        if options.memory_size:
            momentum = Schedule(options.momentum, options.momentum, 0, "constant")
            self.teacher = Teacher(self, ("encoder", "projector"), momentum)
            self.queue = Queue(options.memory_size, (options.projection_dim,), start="zeros")

    def forward(self, batch: Batch) -> Output:
        """The loss of the two views' projections, against what earlier steps put into the queue."""
        metrics: dict[str, Tensor] = {}
        projections = self.project(batch.views)
        view1, view2 = projections.chunk(2)
        negatives = projections.detach()[:0]
        if self.hyperparameters.memory_size:
            self.queue.hold(self.step, normalize(widen(self.teacher(batch.views[1]))))
            negatives = self.queue.rows[: len(self.queue)]
        return Output(self.loss(view1, view2, negatives, metrics=metrics), metrics)

    def after_step(self, step: int) -> None:
        """Moves the key encoder, fills the queue."""
        if self.hyperparameters.memory_size:
            self.teacher.update(self, step)
            self.queue.write()


@register
class DCL(ProjectedViewsObjective):
    """DCL: SimCLR without the positive in the denominator, which suits small batches; ``weighted`` makes it DCLW.

    Equation and shapes: :class:`armillary.losses.decoupled.DecoupledContrastive`.
    """

    name = "dcl"
    family = "contrastive_views"
    catalog_id = "dcl"
    citation = Citation(
        "Chun-Hsiao Yeh, Cheng-Yao Hong, Yen-Chi Hsu, Tyng-Luh Liu, Yubei Chen, Yann LeCun",
        "Decoupled Contrastive Learning",
        2022,
        "ECCV",
        "https://arxiv.org/abs/2110.06848",
    )
    waivers: ClassVar[Mapping[str, str]] = {
        "gradcheck[dcl-weighted=True]": "no gradient passes through the weights",
    }
    convergence = Convergence(margin=0.04, job={**_SMALL, "objective.temperature": 0.2})

    class Hyperparameters(ProjectionHyperparameters):
        """Arguments of the loss, shape of the projector."""

        temperature: float = Field(0.1, ge=0.005, le=10, description="divides the cosines; 0.2 suits small images")
        sigma: float = Field(0.5, ge=0.02, le=10, description="temperature of DCLW's weights")
        weighted: bool = Field(False, description="DCLW: pairs that are close already weigh less")

    def build(self, context: BuildContext) -> None:
        """Makes projector and loss."""
        super().build(context)
        options = self.hyperparameters
        self.loss = DecoupledContrastive(options.temperature, options.sigma, options.weighted)

    def forward(self, batch: Batch) -> Output:
        """The loss of the two views' projections."""
        metrics: dict[str, Tensor] = {}
        view1, view2 = self.project(batch.views).chunk(2)
        return Output(self.loss(view1, view2, metrics=metrics), metrics)


@register
class InvaSpread(Objective):
    """Invariant and spreading instance features: an augmented copy is its image's, no other image of the batch is.

    Equation and shapes: :class:`armillary.losses.instances.InvariantSpread`, whose ``variant: code`` is the loss of the
    authors' code. As in that code both views are augmented; in the paper's text one is the image itself. There is no
    ``formulation: survey``: its spreading term ``-sum sim(z_i, z_j)`` has the wrong sign and pulls images together.
    """

    name = "invaspread"
    family = "contrastive_views"
    catalog_id = "invaspread"
    citation = Citation(
        "Mang Ye, Xu Zhang, Pong C. Yuen, Shih-Fu Chang",
        "Unsupervised Embedding Learning via Invariant and Spreading Instance Feature",
        2019,
        "CVPR",
        "https://arxiv.org/abs/1904.03436",
    )
    needs = Needs(views=2, recipe="moco_v1", components=("projector",), batch_coupled=True)
    waivers: ClassVar[Mapping[str, str]] = {
        "gradcheck[invaspread-variant=code]": "everything but the anchor is a constant"
    }
    convergence = Convergence(margin=0.07)

    class Hyperparameters(base.Hyperparameters):
        """Arguments of the loss, width of the linear head."""

        temperature: float = Field(0.1, ge=0.005, le=10, description="divides the cosines")
        negative_weight: float = Field(1.0, ge=0, le=100, description="weight of the spreading part; 1 in the paper")
        variant: Literal["paper", "code"] = Field("paper", description="the paper's equations, or the authors' code")
        projection_dim: int = Field(128, ge=2, le=8192, description="width of the feature")

    def build(self, context: BuildContext) -> None:
        """Makes the linear head and the loss."""
        options = self.hyperparameters
        self.projector = Projector(context.embedding_dim, 0, options.projection_dim, 1, norm=False)
        self.loss = InvariantSpread(options.temperature, options.negative_weight, options.variant)

    def forward(self, batch: Batch) -> Output:
        """The loss of the two views' features."""
        metrics: dict[str, Tensor] = {}
        view1, view2 = (self.projector(self.encoder(view)) for view in batch.views)
        return Output(self.loss(view1, view2, metrics=metrics), metrics)


@register
class SupportSetBottleneck(ProjectedViewsObjective):
    """Support-set bottleneck: an image must also be told from a mixture of other images like it. A surrogate.

    Equation, shapes and how it departs from the paper, which has videos and captions for what are two views here:
    :class:`armillary.losses.support_set.SupportSet`.
    """

    name = "support_set"
    family = "cross_modal"
    catalog_id = "support_set"
    citation = Citation(
        "Mandela Patrick, Po-Yao Huang, Yuki Asano, Florian Metze, Alexander Hauptmann, João Henriques, Andrea Vedaldi",
        "Support-set bottlenecks for video-text representation learning",
        2021,
        "ICLR",
        "https://arxiv.org/abs/2010.02824",
    )
    needs = replace(ProjectedViewsObjective.needs, components=("projector", "predictor"))
    waivers: ClassVar[Mapping[str, str]] = {"gradcheck": "what is predicted is a constant"}
    convergence = Convergence(
        margin=0.03, job={**_SMALL, "objective.temperature": 0.2, "objective.support_weight": 1.0}
    )

    class Hyperparameters(ProjectionHyperparameters):
        """Arguments of the loss, shape of projector and predictor."""

        temperature: float = Field(0.1, ge=0.005, le=10, description="T of mixture and contrast")
        support_weight: float = Field(10.0, ge=0, le=1000, description="lambda; 1 suits small data")
        exclude_self: bool = Field(True, description="leave the image itself out of its mixture")
        target: Literal["regression", "contrast"] = Field("regression", description="how the mixture is judged")

    def build(self, context: BuildContext) -> None:
        """Makes projector, predictor and loss."""
        super().build(context)
        options = self.hyperparameters
        width = options.projection_dim
        self.predictor = Projector(width, options.projection_hidden, width, 2, norm=False)
        self.loss = SupportSet(options.temperature, options.support_weight, options.exclude_self, options.target)

    def forward(self, batch: Batch) -> Output:
        """The loss of the two views' projections."""
        metrics: dict[str, Tensor] = {}
        view1, view2 = self.project(batch.views).chunk(2)
        predicted = self.predictor(self.loss.mixture(view1, view2))
        return Output(self.loss(view1, view2, predicted, metrics=metrics), metrics)
