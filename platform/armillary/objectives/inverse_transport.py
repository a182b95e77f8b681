"""Contrastive learning of views as inverse optimal transport."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from armillary.losses.transport import InverseTransport
from armillary.objectives import base
from armillary.objectives.base import Batch, BuildContext, Citation, Convergence, Output
from armillary.objectives.bases import ProjectedViewsObjective
from armillary.objectives.registry import register


@register
class IOTCL(ProjectedViewsObjective):
    """IOT-CL: the entropic transport plan between two views of a batch should match each image with itself.

    Equations: :class:`armillary.losses.transport.InverseTransport`. The three losses (U_1, U_a, U_ab) are the paper's;
    U_a is InfoNCE at a temperature of ``epsilon``. What exactly the uniformity penalty compares with is a
    reconstruction. A survey writes a difference of mean costs -log cos, which negative cosines leave undefined: it is
    not offered. No public package holds the method; the converged plan is that of POT.
    """

    name = "iot_cl"
    family = "contrastive_views"
    catalog_id = "iot_cl"
    citation = Citation(
        "Liangliang Shi, Gu Zhang, Haoyu Zhen, Jintao Fan, Junchi Yan",
        "Understanding and Generalizing Contrastive Learning from the Inverse Optimal Transport Perspective",
        2023,
        "ICML",
        "https://openreview.net/forum?id=DBlWCsOy94",
    )
    waivers: ClassVar[Mapping[str, str]] = {
        "gradcheck[iot_cl-grad=envelope]": "the gradient of a converged plan, not of five sweeps",
    }
    convergence = Convergence(margin=0.04, job={"objective.projection_dim": 64, "objective.projection_hidden": 128})

    class Hyperparameters(base.Hyperparameters):
        """The inner problem, and the projector's shape."""

        epsilon: float = Field(0.2, gt=0, le=10, description="weight of the plan's entropy, the temperature of U_a")
        constraint: Literal["U_1", "U_a", "U_ab"] = Field("U_ab", description="total mass; rows; rows and columns")
        sinkhorn_iters: int = Field(5, ge=1, le=200, description="sweeps for U_ab, each rows then columns")
        lam_uniform: float = Field(0.0, ge=0, le=100, description="weight of the uniformity penalty")
        grad: Literal["unroll", "envelope"] = Field("unroll", description="how to differentiate the plan")
        projection_dim: int = Field(128, ge=2, le=4096, description="width of the projection")
        projection_hidden: int = Field(512, ge=2, le=16384, description="width of the hidden layers")
        projection_layers: int = Field(2, ge=1, le=8, description="linear layers of the projector")

    def build(self, context: BuildContext) -> None:
        """Makes projector and loss."""
        super().build(context)
        options = self.hyperparameters
        self.loss = InverseTransport(
            options.epsilon, options.constraint, options.sinkhorn_iters, options.lam_uniform, options.grad
        )

    def forward(self, batch: Batch) -> Output:
        """The loss of the two views' projections."""
        metrics: dict[str, Tensor] = {}
        view1, view2 = self.project(batch.views).chunk(2)
        return Output(self.loss(view1, view2, metrics=metrics), metrics)
