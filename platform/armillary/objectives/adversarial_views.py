"""Contrast with views that were made to be hard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from armillary import collectives, losses
from armillary.components.second_norms import SecondNorms
from armillary.losses.instances import InvariantSpread
from armillary.objectives.base import Batch, BuildContext, Citation, Convergence, Output
from armillary.objectives.bases import ProjectedViewsObjective
from armillary.objectives.contrastive import ProjectionHyperparameters
from armillary.objectives.registry import register


@register
class CLAE(ProjectedViewsObjective):
    """CLAE: a contrastive method whose first view is also contrasted with an adversarial copy of itself.

    With L_con the contrastive loss of the whole batch, f encoder and projector, f' the same with batch norms of its
    own::

        delta = epsilon * sign( d/dx' L_con(f(x_1), f(x')) at x' = x_1 ),   x_adv = x_1 + delta, a constant
        L = L_con(f(x_1), f(x_2)) + alpha L_con(f(x_1), f'(x_adv))

    One step of the fast gradient sign method, from the view itself as in the released code; its gradient reaches no
    parameter. Epsilon counts brightness in [0, 1]; as there, x_adv is not cut to that range. ``base`` is the method:
    SimCLR (:class:`armillary.losses.NTXent`) or
    :class:`armillary.losses.instances.InvariantSpread`, both of which the paper tries. Metrics ``standard`` and
    ``adversarial`` are the two losses.
    """

    name = "clae"
    family = "contrastive_views"
    catalog_id = "clae"
    citation = Citation(
        "Chih-Hui Ho, Nuno Vasconcelos",
        "Contrastive Learning with Adversarial Examples",
        2020,
        "NeurIPS",
        "https://arxiv.org/abs/2010.12050",
    )
    needs = replace(ProjectedViewsObjective.needs, components=("projector", "second_norms"))
    waivers: ClassVar[Mapping[str, str]] = {
        "gradcheck": "the adversarial view moves with the view, but is a constant",
    }
    convergence = Convergence(
        margin=0.03,
        job={"objective.projection_dim": 64, "objective.projection_hidden": 256},
    )

    class Hyperparameters(ProjectionHyperparameters):
        """Attack, base method, shape of the projector."""

        epsilon: float = Field(0.03, ge=0, le=1, description="largest change of a pixel; images are in [0, 1]")
        alpha: float = Field(1.0, ge=0, le=100, description="weight of the adversarial term")
        temperature: float = Field(0.5, ge=0.005, le=10, description="divides the cosines")
        base: Literal["nt_xent", "invariant_spread"] = Field("nt_xent", description="the contrastive loss")
        adversarial_momentum: float = Field(
            0.01, ge=1e-4, le=1, description="momentum of the second batch norms' running statistics"
        )

    def build(self, context: BuildContext) -> None:
        """Makes projector, second norms and loss."""
        super().build(context)
        options = self.hyperparameters
        self.second = SecondNorms(self, ("encoder", "projector"), options.adversarial_momentum)
        self.loss: nn.Module = (
            losses.NTXent(options.temperature) if options.base == "nt_xent" else InvariantSpread(options.temperature)
        )

    def attacked(self, images: Tensor) -> Tensor:
        """The adversarial copies of ``images (batch, channels, height, width)``, without gradient."""
        changed = images.detach().clone().requires_grad_()
        with torch.enable_grad():
            projections = self.project((changed,))
            (gradient,) = torch.autograd.grad(self.loss(projections.detach(), projections), changed)
        attacked: Tensor = changed.detach() + self.hyperparameters.epsilon * gradient.sign()
        return attacked

    def _adversarial(self, images: Tensor, projections: Tensor) -> Tensor:
        hard = self.attacked(images)
        with self.second.used_by(self):
            loss: Tensor = self.loss(projections, self.project((hard,)))
        return loss

    def forward(self, batch: Batch) -> Output:
        """The loss of the two views, and of the first with its adversarial copy."""
        view1, view2 = self.project(batch.views).chunk(2)
        standard = self.loss(view1, view2)
        # One image alone has no negatives to attack by, and no variance to normalise by.
        alone = len(view1) * collectives.world_size() == 1
        adversarial = 0 * standard if alone else self._adversarial(batch.views[0], view1)
        metrics = {"standard": standard.detach(), "adversarial": adversarial.detach()}
        return Output(standard + self.hyperparameters.alpha * adversarial, metrics)
