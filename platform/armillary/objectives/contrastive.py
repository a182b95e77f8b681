"""Contrastive objectives over views, without labels."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from armillary import losses
from armillary.objectives import base
from armillary.objectives.base import Batch, BuildContext, Citation, Output
from armillary.objectives.bases import ProjectedViewsObjective
from armillary.objectives.registry import register


@register
class SimCLR(ProjectedViewsObjective):
    """SimCLR: two views of an image attract each other against all other images of the batch."""

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

    class Hyperparameters(base.Hyperparameters):
        """Temperature of the loss, shape of the projector."""

        temperature: float = Field(0.1, ge=0.005, le=10, description="divides the cosines; 0.5 suits small images")
        projection_dim: int = Field(128, ge=2, le=8192, description="width of the projection")
        projection_hidden: int = Field(2048, ge=2, le=65536, description="width of the hidden layers")
        projection_layers: int = Field(2, ge=1, le=8, description="linear layers of the projector")

    def build(self, context: BuildContext) -> None:
        """Makes projector and loss."""
        super().build(context)
        self.loss = losses.NTXent(self.hyperparameters.temperature)

    def forward(self, batch: Batch) -> Output:
        """The loss of the two views' projections."""
        metrics: dict[str, Tensor] = {}
        view1, view2 = self.project(batch.views).chunk(2)
        return Output(self.loss(view1, view2, metrics=metrics), metrics)
