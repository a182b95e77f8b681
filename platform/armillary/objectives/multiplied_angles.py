"""L-Softmax and SphereFace: margins that multiply the angle, eased in by the optimizer step."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from armillary.losses.multiplied_angles import LSoftmax, SphereFace
from armillary.objectives import base
from armillary.objectives.base import Batch, Citation, Convergence, Output
from armillary.objectives.bases import ClassHeadObjective
from armillary.objectives.margin_softmax import MAX_SCALE
from armillary.objectives.registry import register


class AnnealedHyperparameters(base.Hyperparameters):
    """The weight of the logit without margin: ``max(floor, start (1 + speed t)^-power)`` at optimizer step t."""

    annealing_start: float = Field(1000.0, ge=0, le=1e6, description="lambda_0, weight of the plain logit at step 0")
    annealing_floor: float = Field(5.0, ge=0, le=1000, description="lambda_min, the least weight")
    formulation: Literal["paper", "survey"] = Field(
        "paper", description="the paper's loss, or the survey's print of it"
    )


class AnnealedObjective(ClassHeadObjective):
    """Tells the loss the optimizer step, so that accumulated micro-batches do not count."""

    loss: LSoftmax | SphereFace

    def forward(self, batch: Batch) -> Output:
        """The loss of the first view's embeddings."""
        self.loss.iteration.fill_(self.step)
        return super().forward(batch)


@register
class LSoftmaxObjective(AnnealedObjective):
    """L-Softmax: the angle to the own class is multiplied, norms of rows and features stay free."""

    name = "l_softmax"
    catalog_id = "l_softmax"
    citation = Citation(
        "Weiyang Liu, Yandong Wen, Zhiding Yu, Meng Yang",
        "Large-Margin Softmax Loss for Convolutional Neural Networks",
        2016,
        "ICML",
        "https://arxiv.org/abs/1612.02295",
    )
    loss_class = LSoftmax
    convergence = Convergence(margin=0.12, job={"objective.annealing_start": 5.0})

    class Hyperparameters(AnnealedHyperparameters):
        """Arguments of :class:`armillary.losses.multiplied_angles.LSoftmax`."""

        margin: int = Field(4, ge=1, le=8, description="m, multiplies the angle")
        scale: float = Field(64.0, ge=0.01, le=MAX_SCALE, description="logit scale of the survey's formulation")
        annealing_speed: float = Field(2.5e-5, ge=0, le=10, description="gamma, how fast the plain logit fades")
        annealing_power: float = Field(35.0, ge=0, le=100, description="exponent of the fading")


@register
class SphereFaceObjective(AnnealedObjective):
    """SphereFace: unit class rows, the angle to the own class multiplied, the feature's length as the scale.

    ``formulation: survey``, whose logit rises again beyond pi / m, wants a ``margin`` below 2, e.g. 1.5: with 4 it is
    largest at right angles, where untrained features are, and nothing is learned.
    """

    name = "sphereface"
    catalog_id = "sphereface"
    citation = Citation(
        "Weiyang Liu, Yandong Wen, Zhiding Yu, Ming Li, Bhiksha Raj, Le Song",
        "SphereFace: Deep Hypersphere Embedding for Face Recognition",
        2017,
        "CVPR",
        "https://arxiv.org/abs/1704.08063",
    )
    loss_class = SphereFace
    convergence = Convergence(margin=0.12, job={"objective.annealing_start": 5.0})

    class Hyperparameters(AnnealedHyperparameters):
        """Arguments of :class:`armillary.losses.multiplied_angles.SphereFace`."""

        margin: float = Field(4.0, ge=1, le=8, description="m, multiplies the angle; 1.5 to 1.7 suits normalized")
        scale: float = Field(30.0, ge=0.01, le=MAX_SCALE, description="logit scale where lengths are not used")
        normalized: bool = Field(False, description="scale instead of the feature's length")
        annealing_speed: float = Field(0.12, ge=0, le=10, description="gamma, how fast the plain logit fades")
        annealing_power: float = Field(1.0, ge=0, le=100, description="exponent of the fading")
