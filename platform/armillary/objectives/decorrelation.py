"""Objectives that decorrelate the channels of two views' projections: no negatives, no teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from armillary.components.bank import MemoryBank
from armillary.components.counter import key, sample_keys
from armillary.losses.decorrelation import AlignWithBase, BarlowTwins, VICReg
from armillary.losses.tensors import float32_math, normalize
from armillary.objectives import base
from armillary.objectives.base import Batch, BuildContext, Citation, Convergence, Needs, Output, Samples
from armillary.objectives.bases import ProjectedViewsObjective
from armillary.objectives.registry import register

_CHANNEL_ORDER = 61
_NEEDS = Needs(views=2, recipe="byol", components=("projector",), batch_coupled=True)


class ExpanderHyperparameters(base.Hyperparameters):
    """The projector of these methods is wide, and linear without bias in its last layer."""

    projection_dim: int = Field(8192, ge=2, le=16384, description="width of the projection; 512 suits small data")
    projection_hidden: int = Field(8192, ge=2, le=65536, description="width of the hidden layers")
    projection_layers: int = Field(3, ge=1, le=8, description="linear layers of the projector")


_SMALL_EXPANDER = {"objective.projection_dim": 256, "objective.projection_hidden": 256}


@register
class VICRegObjective(ProjectedViewsObjective):
    """VICReg: views agree while every channel keeps its variance and no two channels covary."""

    name = "vicreg"
    family = "decorrelation"
    catalog_id = "vicreg"
    citation = Citation(
        "Adrien Bardes, Jean Ponce, Yann LeCun",
        "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning",
        2022,
        "ICLR",
        "https://arxiv.org/abs/2105.04906",
    )
    needs = _NEEDS
    projector_last_norm = False
    convergence = Convergence(margin=0.04, job=_SMALL_EXPANDER)

    class Hyperparameters(ExpanderHyperparameters):
        """Arguments of :class:`armillary.losses.decorrelation.VICReg`, and the projector's shape."""

        invariance: float = Field(25.0, ge=0, le=1000, description="lambda, weight of the views' distance")
        variance: float = Field(25.0, ge=0, le=1000, description="mu, weight of the variance hinge")
        covariance: float = Field(1.0, ge=0, le=1000, description="nu, weight of the covariances")
        gamma: float = Field(1.0, gt=0, le=10, description="standard deviation that every channel should reach")
        eps: float = Field(1e-4, gt=0, le=0.1, description="added to the variance under the root")
        variant: Literal["code", "pseudo", "paper"] = Field("code", description="which of three normalisations")

    def build(self, context: BuildContext) -> None:
        """Makes projector and loss."""
        super().build(context)
        options = self.hyperparameters.model_dump(include={"invariance", "variance", "covariance", "gamma", "eps"})
        self.loss = VICReg(**options, variant=self.hyperparameters.variant)

    def forward(self, batch: Batch) -> Output:
        """The loss of the two views' projections."""
        metrics: dict[str, Tensor] = {}
        view1, view2 = self.project(batch.views).chunk(2)
        return Output(self.loss(view1, view2, metrics=metrics), metrics)


@register
class BarlowTwinsObjective(ProjectedViewsObjective):
    """Barlow Twins: the cross-correlation of two views' channels becomes the identity matrix."""

    name = "barlow_twins"
    family = "decorrelation"
    catalog_id = "barlow_twins"
    citation = Citation(
        "Jure Zbontar, Li Jing, Ishan Misra, Yann LeCun, Stéphane Deny",
        "Barlow Twins: Self-Supervised Learning via Redundancy Reduction",
        2021,
        "ICML",
        "https://arxiv.org/abs/2103.03230",
    )
    needs = _NEEDS
    projector_last_norm = False
    convergence = Convergence(margin=0.04, job=_SMALL_EXPANDER)

    class Hyperparameters(ExpanderHyperparameters):
        """Arguments of :class:`armillary.losses.decorrelation.BarlowTwins`, and the projector's shape."""

        redundancy: float = Field(0.005, ge=0, le=10, description="lambda, weight of the off-diagonal correlations")
        loss_scale: float = Field(1.0, gt=0, le=10, description="factor on the whole loss")

    def build(self, context: BuildContext) -> None:
        """Makes projector and loss."""
        super().build(context)
        self.loss = BarlowTwins(self.hyperparameters.redundancy, scale=self.hyperparameters.loss_scale)

    def forward(self, batch: Batch) -> Output:
        """The loss of the two views' projections."""
        metrics: dict[str, Tensor] = {}
        view1, view2 = self.project(batch.views).chunk(2)
        return Output(self.loss(view1, view2, metrics=metrics), metrics)


@register
class ARB(ProjectedViewsObjective):
    """ARB: every view's channels align with the nearest orthonormal base of the other view.

    ``formulation: survey`` is another method under this name: an image's projection is pulled to the one it had an
    epoch ago, ``|z / |z| - b / |b||^2``, with b kept in a bank by index, the mean of both views. An image that the bank
    does not know yet is compared with its other view. Nothing but batch norm keeps it from collapsing.
    """

    name = "arb"
    family = "decorrelation"
    catalog_id = "arb"
    citation = Citation(
        "Shaofeng Zhang, Lyn Qiu, Feng Zhu, Junchi Yan, Hengrui Zhang, Rui Zhao, Hongyang Li, Xiaokang Yang",
        "Align Representations with Base: A New Approach to Self-Supervised Learning",
        2022,
        "CVPR",
    )
    needs = _NEEDS
    projector_last_norm = False
    waivers: ClassVar[Mapping[str, str]] = {"gradcheck": "the bases are targets: no gradient passes through them"}
    convergence = Convergence(job={"objective.projection_dim": 32, "objective.projection_hidden": 256})

    class Hyperparameters(ExpanderHyperparameters):
        """Arguments of :class:`armillary.losses.decorrelation.AlignWithBase`, and the projector's shape."""

        groups: int = Field(1, ge=1, le=64, description="G, blocks of channels with a base each; divides the width")
        shuffle: bool = Field(True, description="deal the channels into groups anew every step")
        shrink: float = Field(1e-4, ge=0, le=1, description="weight of the identity in the covariance; small data 0.01")
        formulation: Literal["paper", "survey"] = Field("paper", description="survey: align with last epoch's bank")
        bank_host: bool = Field(False, description="survey: keep the banks in main memory; costs a copy a step")

    def build(self, context: BuildContext) -> None:
        """Makes projector and loss; for the survey's reading two banks, last epoch's and this epoch's."""
        super().build(context)
        options = self.hyperparameters
        if options.projection_dim % options.groups:
            raise ValueError(f"projection_dim {options.projection_dim} is not a multiple of groups {options.groups}")
        self.seed = context.seed
        self.loss = AlignWithBase(options.groups, options.shrink)
        if options.formulation == "survey":
            self.last_epoch, self.this_epoch = (
                MemoryBank(context.dataset_size, (options.projection_dim,), start="zeros", host=options.bank_host)
                for _ in range(2)
            )

    def before_epoch(self, epoch: int, samples: Samples) -> None:
        """What was written during the last epoch is what this one aligns with."""
        if self.hyperparameters.formulation == "survey":
            self.last_epoch.refresh(self.this_epoch.rows, self.this_epoch.written)

    def after_step(self, step: int) -> None:
        """Writes the step's projections into this epoch's bank."""
        if self.hyperparameters.formulation == "survey":
            self.this_epoch.write()

    def forward(self, batch: Batch) -> Output:
        """The loss of the two views' projections."""
        metrics: dict[str, Tensor] = {}
        view1, view2 = self.project(batch.views).chunk(2)
        if self.hyperparameters.formulation == "survey":
            return self._align_with_bank(batch.index, view1, view2)
        order = self._channel_order(view1) if self.hyperparameters.shuffle and self.loss.groups > 1 else None
        return Output(self.loss(view1, view2, order=order, metrics=metrics), metrics)

    @float32_math
    def _bank_distance(self, view: Tensor, other: Tensor, index: Tensor) -> Tensor:
        known = self.last_epoch.known(index)[:, None]
        base = torch.where(known, self.last_epoch.lookup(index).to(view.dtype), normalize(other.detach()))
        return (normalize(view) - base).square().sum(dim=1).mean()

    def _align_with_bank(self, index: Tensor, view1: Tensor, view2: Tensor) -> Output:
        loss = (self._bank_distance(view1, view2, index) + self._bank_distance(view2, view1, index)) / 2
        self.this_epoch.hold(self.step, index, normalize(view1) + normalize(view2))
        return Output(loss, {"bank_cosine": 1 - loss.detach() / 2})

    def _channel_order(self, view: Tensor) -> Tensor:
        channels = torch.arange(view.shape[1], device=view.device)
        return torch.argsort(sample_keys(key(_CHANNEL_ORDER, self.seed, self.step), channels))
