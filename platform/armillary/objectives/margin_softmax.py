"""Classification over identities, with and without margins on the hypersphere."""

from __future__ import annotations

from math import pi

from pydantic import Field

from armillary import losses
from armillary.objectives import base
from armillary.objectives.base import Citation, Convergence
from armillary.objectives.bases import ClassHeadObjective
from armillary.objectives.registry import register

MAX_SCALE = 1000.0
# What suits a few dozen classes and a dozen epochs: the papers' scale of 64 is for tens of thousands of classes.
SMALL_DATA = {"objective.scale": 16, "objective.margin": 0.3}


class AngularHyperparameters(base.Hyperparameters):
    """What every additive angular margin has: its size and the logits' scale."""

    margin: float = Field(0.5, ge=0, le=pi / 2, description="additive margin in radians")
    scale: float = Field(64.0, ge=0.01, le=MAX_SCALE, description="logit scale")


class ArcFaceHyperparameters(AngularHyperparameters):
    """Arguments of :class:`armillary.losses.ArcFace`."""

    easy_margin: bool = Field(False, description="margin only where the cosine is above 0, plain cosine elsewhere")
    extension: bool = Field(True, description="the authors' falling branch beyond pi - margin")


@register
class Softmax(ClassHeadObjective):
    """Softmax cross-entropy over identities, with a linear head and a bias: the baseline."""

    name = "softmax"
    family = "softmax"
    catalog_id = "softmax"
    citation = Citation("(standard)", "Multinomial logistic regression")
    loss_class = losses.Softmax


@register
class NormFace(ClassHeadObjective):
    """NormFace: softmax over cosines, with a learned scale and no margin.

    :class:`armillary.losses.NormFace`. The survey's fixed scale is ``learn_scale: false, scale: 64``.
    """

    name = "normface"
    catalog_id = "normface"
    citation = Citation(
        "Feng Wang, Xiang Xiang, Jian Cheng, Alan L. Yuille",
        "NormFace: L2 Hypersphere Embedding for Face Verification",
        2017,
        "ACM Multimedia",
        "https://arxiv.org/abs/1704.06369",
    )
    loss_class = losses.NormFace
    convergence = Convergence(margin=0.12)

    class Hyperparameters(base.Hyperparameters):
        """Arguments of :class:`armillary.losses.NormFace`."""

        scale: float = Field(16.0, ge=0.01, le=MAX_SCALE, description="logit scale, or its start when learned")
        learn_scale: bool = Field(True, description="train the scale")


@register
class CosFace(ClassHeadObjective):
    """CosFace: an additive margin on the cosine to the own class."""

    name = "cosface"
    catalog_id = "cosface"
    citation = Citation(
        "Hao Wang, Yitong Wang, Zheng Zhou, Xing Ji, Dihong Gong, Jingchao Zhou, Zhifeng Li, Wei Liu",
        "CosFace: Large Margin Cosine Loss for Deep Face Recognition",
        2018,
        "CVPR",
        "https://arxiv.org/abs/1801.09414",
    )
    loss_class = losses.CosFace
    convergence = Convergence(margin=0.12, job=SMALL_DATA)

    class Hyperparameters(base.Hyperparameters):
        """Arguments of :class:`armillary.losses.CosFace`."""

        margin: float = Field(0.35, ge=0, le=1, description="additive margin, a difference of cosines")
        scale: float = Field(64.0, ge=0.01, le=MAX_SCALE, description="logit scale")


@register
class ArcFace(ClassHeadObjective):
    """ArcFace: an additive margin on the angle to the own class."""

    name = "arcface"
    catalog_id = "arcface"
    citation = Citation(
        "Jiankang Deng, Jia Guo, Niannan Xue, Stefanos Zafeiriou",
        "ArcFace: Additive Angular Margin Loss for Deep Face Recognition",
        2019,
        "CVPR",
        "https://arxiv.org/abs/1801.07698",
    )
    loss_class = losses.ArcFace
    convergence = Convergence(margin=0.12, job=SMALL_DATA)

    Hyperparameters = ArcFaceHyperparameters
