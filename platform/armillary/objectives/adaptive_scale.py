"""L2-softmax, AdaCos, P2SGrad: class heads that choose the logits' scale or do without one."""

from __future__ import annotations

from collections.abc import Mapping
from math import pi
from typing import ClassVar, Literal

from pydantic import Field

from armillary.losses.adaptive_scale import AdaCos, L2Softmax, P2SGrad, SigmoidWeightedArcFace
from armillary.objectives import base
from armillary.objectives.base import BuildContext, Citation, Convergence
from armillary.objectives.bases import ClassHeadObjective
from armillary.objectives.margin_softmax import MAX_SCALE
from armillary.objectives.registry import register


@register
class L2SoftmaxObjective(ClassHeadObjective):
    """L2-softmax: features of one length under a free linear classifier."""

    name = "l2_softmax"
    catalog_id = "l2_softmax"
    citation = Citation(
        "Rajeev Ranjan, Carlos D. Castillo, Rama Chellappa",
        "L2-constrained Softmax Loss for Discriminative Face Verification",
        2017,
        "arXiv",
        "https://arxiv.org/abs/1703.09507",
    )
    loss_class = L2Softmax
    convergence = Convergence(margin=0.12, job={"objective.radius": 16})

    class Hyperparameters(base.Hyperparameters):
        """Arguments of :class:`armillary.losses.adaptive_scale.L2Softmax`."""

        radius: float = Field(40.0, ge=0.01, le=MAX_SCALE, description="alpha, length of the features, or its start")
        learn_radius: bool = Field(False, description="train the length")


@register
class AdaCosObjective(ClassHeadObjective):
    """AdaCos: cosine softmax whose scale follows the angles of the batch."""

    name = "adacos"
    catalog_id = "adacos"
    citation = Citation(
        "Xiao Zhang, Rui Zhao, Yu Qiao, Xiaogang Wang, Hongsheng Li",
        "AdaCos: Adaptively Scaling Cosine Logits for Effectively Learning Deep Face Representations",
        2019,
        "CVPR",
        "https://arxiv.org/abs/1905.00292",
    )
    loss_class = AdaCos
    waivers: ClassVar[Mapping[str, str]] = {
        "gradcheck[adacos]": "the scale follows the batch without gradient",
        "gradcheck[adacos-mode=survey]": "the scale follows the batch without gradient",
    }

    class Hyperparameters(base.Hyperparameters):
        """Arguments of :class:`armillary.losses.adaptive_scale.AdaCos`."""

        mode: Literal["dynamic", "fixed", "survey"] = Field("dynamic", description="rule of the scale")
        angle_cap: float = Field(0.25, gt=0, le=0.5, description="cap on the median angle, as a share of pi")


@register
class P2SGradObjective(ClassHeadObjective):
    """P2SGrad: the cosine error of every class is the gradient; no softmax, no scale, no margin."""

    name = "p2sgrad"
    waivers: ClassVar[Mapping[str, str]] = {
        "gradcheck[p2sgrad-formulation=survey]": "the survey's weights have no gradient"
    }
    catalog_id = "p2sgrad"
    convergence = Convergence(
        margin=0.1, job={"train.epochs": 24, "optimizer.lr": 4e-3}, reason="it is slow: no softmax singles out classes"
    )
    citation = Citation(
        "Xiao Zhang, Rui Zhao, Junjie Yan, Mengya Gao, Yu Qiao, Xiaogang Wang, Hongsheng Li",
        "P2SGrad: Refined Gradients for Optimizing Deep Face Models",
        2019,
        "CVPR",
        "https://arxiv.org/abs/1905.02479",
    )

    class Hyperparameters(base.Hyperparameters):
        """Arguments of :class:`armillary.losses.adaptive_scale.P2SGrad`; margin to kappa are the survey's."""

        multiplier: float = Field(1.0, gt=0, le=1000, description="factor on the loss")
        per_class: bool = Field(False, description="mean over classes instead of their sum")
        formulation: Literal["paper", "survey"] = Field("paper", description="survey: ArcFace with sigmoid weights")
        margin: float = Field(0.5, ge=0, le=pi / 2, description="survey: additive margin in radians")
        scale: float = Field(64.0, ge=0.01, le=MAX_SCALE, description="survey: logit scale")
        kappa: float = Field(1.0, ge=0, le=100, description="survey: steepness of the weight's fall with the cosine")

    def build(self, context: BuildContext) -> None:
        """Makes the loss with its head."""
        options, size = self.hyperparameters, (context.num_classes, context.embedding_dim)
        if options.formulation == "survey":
            self.loss = SigmoidWeightedArcFace(*size, options.margin, options.scale, options.kappa)
        else:
            self.loss = P2SGrad(*size, options.multiplier, options.per_class)
