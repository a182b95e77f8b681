"""Objectives that compare distances inside pairs and triplets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from armillary import losses
from armillary.objectives import base
from armillary.objectives.base import Batch, BuildContext, Citation, Needs, Objective, Output
from armillary.objectives.registry import register


@register
class Triplet(Objective):
    """Triplet loss: a sample lies nearer to its own class than to another, by a margin; four ways of mining."""

    name = "triplet"
    family = "tuple"
    catalog_id = "triplet"
    citation = Citation(
        "Florian Schroff, Dmitry Kalenichenko, James Philbin",
        "FaceNet: A Unified Embedding for Face Recognition and Clustering",
        2015,
        "CVPR",
        "https://arxiv.org/abs/1503.03832",
    )
    needs = Needs(recipe="faces", fields=("label",), sampler="class_balanced", samples_per_class=4, batch_coupled=True)

    class Hyperparameters(base.Hyperparameters):
        """Arguments of :class:`armillary.losses.Triplet`, and the K of its P x K batches."""

        margin: float = Field(0.2, ge=0, le=4, description="distance between unit vectors (squared if squared)")
        mining: Literal["semi_hard", "batch_hard", "hard_negative", "all"] = Field(
            "semi_hard", description="which triplets of the batch count"
        )
        squared: bool = Field(True, description="squared distances")
        soft: bool = Field(False, description="softplus without a margin in place of the hinge")
        reduction: Literal["mean_active", "mean_all", "sum"] = Field(
            "mean_active", description="over triplets with a loss, over all chosen ones, or their sum"
        )
        samples_per_class: int = Field(4, ge=2, le=1024, description="images of each class in a batch")

    @classmethod
    def needs_for(cls, hyperparameters: Any) -> Needs:
        """Class-balanced batches with the wanted number of images per class."""
        return replace(cls.needs, samples_per_class=hyperparameters.samples_per_class)

    def build(self, context: BuildContext) -> None:
        """Makes the loss, which has no parameters."""
        self.loss = losses.Triplet(**self.hyperparameters.model_dump(exclude={"samples_per_class"}))

    def forward(self, batch: Batch) -> Output:
        """The loss of the first view's embeddings."""
        metrics: dict[str, Tensor] = {}
        loss = self.loss(self.encoder(batch.views[0]), batch.label, metrics=metrics)
        return Output(loss, metrics)
