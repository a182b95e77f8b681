"""Contrastive objectives that know the labels."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field
from torch import Tensor

from armillary import losses
from armillary.objectives import base
from armillary.objectives.base import Batch, BuildContext, Citation, Output
from armillary.objectives.bases import ProjectedViewsObjective
from armillary.objectives.registry import register


@register
class SupCon(ProjectedViewsObjective):
    """Supervised contrastive learning: two views, all samples of the label are positives."""

    name = "supcon"
    family = "contrastive_supervised"
    catalog_id = "supcon"
    citation = Citation(
        "Prannay Khosla, Piotr Teterwak, Chen Wang, Aaron Sarna, Yonglong Tian, Phillip Isola, Aaron Maschinot, "
        "Ce Liu, Dilip Krishnan",
        "Supervised Contrastive Learning",
        2020,
        "NeurIPS",
        "https://arxiv.org/abs/2004.11362",
    )
    needs = replace(ProjectedViewsObjective.needs, fields=("label",))
    # The paper's projection head has no batch norm.
    projector_norm = False

    class Hyperparameters(base.Hyperparameters):
        """Temperature and mode of the loss, shape of the projector."""

        temperature: float = Field(0.1, ge=0.005, le=10, description="divides the cosines")
        mode: Literal["out", "in"] = Field("out", description="mean over positives out of the logarithm, or in it")
        projection_dim: int = Field(128, ge=2, le=8192, description="width of the projection")
        projection_hidden: int = Field(2048, ge=2, le=65536, description="width of the hidden layers")
        projection_layers: int = Field(2, ge=1, le=8, description="linear layers of the projector")

    def build(self, context: BuildContext) -> None:
        """Makes projector and loss."""
        super().build(context)
        self.loss = losses.SupCon(self.hyperparameters.temperature, self.hyperparameters.mode)

    def forward(self, batch: Batch) -> Output:
        """The loss over both views as one batch of samples."""
        metrics: dict[str, Tensor] = {}
        loss = self.loss(self.project(batch.views), batch.label.repeat(len(batch.views)), metrics=metrics)
        return Output(loss, metrics)
