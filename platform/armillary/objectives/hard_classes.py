"""MV-Softmax, CurricularFace, sub-center ArcFace: heads that look at the classes a sample is mistaken for."""

from __future__ import annotations

from collections.abc import Mapping
from math import pi
from typing import ClassVar, Literal

from pydantic import Field

from armillary.losses.hard_classes import CurricularFace, DirectedArcFace, MVSoftmax, SubcenterArcFace
from armillary.objectives import base
from armillary.objectives.base import BuildContext, Citation, Convergence
from armillary.objectives.bases import ClassHeadObjective
from armillary.objectives.margin_softmax import MAX_SCALE, SMALL_DATA, AngularHyperparameters, ArcFaceHyperparameters
from armillary.objectives.registry import register


@register
class MVSoftmaxObjective(ClassHeadObjective):
    """MV-Softmax: wrong classes that beat the margined target weigh more."""

    name = "mv_softmax"
    catalog_id = "mv_softmax"
    citation = Citation(
        "Xiaobo Wang, Shifeng Zhang, Shuo Wang, Tianyu Fu, Hailin Shi, Tao Mei",
        "Mis-Classified Vector Guided Softmax Loss for Face Recognition",
        2020,
        "AAAI",
        "https://arxiv.org/abs/1912.00833",
    )
    loss_class = MVSoftmax
    convergence = Convergence(margin=0.1, job={"objective.scale": 16, "objective.margin": 0.2})

    class Hyperparameters(base.Hyperparameters):
        """Arguments of :class:`armillary.losses.hard_classes.MVSoftmax`."""

        margin: float = Field(0.35, ge=0, le=pi / 2, description="difference of cosines (am) or radians (arc, 0.5)")
        scale: float = Field(32.0, ge=0.01, le=MAX_SCALE, description="logit scale")
        emphasis: float = Field(0.2, ge=0, le=2, description="t, how much more hard classes weigh")
        mode: Literal["adaptive", "fixed"] = Field("adaptive", description="whether t grows with the cosine")
        base: Literal["am", "arc"] = Field("am", description="margin on the cosine or on the angle")
        easy_margin: bool = Field(True, description="margin only where the cosine is above 0, as the authors' code has")
        formulation: Literal["paper", "survey"] = Field("paper", description="survey: ArcFace with a correction")
        correction: float = Field(0.1, ge=0, le=10, description="survey: weight of the correction's length")

    def build(self, context: BuildContext) -> None:
        """Makes the loss with its head."""
        options, size = self.hyperparameters, (context.num_classes, context.embedding_dim)
        if options.formulation == "survey":
            self.loss = DirectedArcFace(*size, options.margin, options.scale, options.correction)
        else:
            chosen = options.model_dump(exclude={"formulation", "correction"})
            self.loss = MVSoftmax(*size, **chosen)


@register
class CurricularFaceObjective(ClassHeadObjective):
    """CurricularFace: wrong classes that beat the margined target weigh more as training goes on."""

    name = "curricularface"
    catalog_id = "curricularface"
    citation = Citation(
        "Yuge Huang, Yuhan Wang, Ying Tai, Xiaoming Liu, Pengcheng Shen, Shaoxin Li, Jilin Li, Feiyue Huang",
        "CurricularFace: Adaptive Curriculum Learning Loss for Deep Face Recognition",
        2020,
        "CVPR",
        "https://arxiv.org/abs/2004.00288",
    )
    loss_class = CurricularFace
    waivers: ClassVar[Mapping[str, str]] = {"gradcheck": "t and the survey's weights follow the batch without gradient"}
    convergence = Convergence(margin=0.12, job=SMALL_DATA)

    class Hyperparameters(AngularHyperparameters):
        """Arguments of :class:`armillary.losses.hard_classes.CurricularFace`."""

        momentum: float = Field(0.99, ge=0, le=1, description="alpha, share of the old t that is kept")
        formulation: Literal["paper", "survey"] = Field("paper", description="survey: sample weights on plain ArcFace")


@register
class SubcenterArcFaceObjective(ClassHeadObjective):
    """Sub-center ArcFace: several rows a class, of which the nearest counts, so that noise gathers apart."""

    name = "subcenter_arcface"
    catalog_id = "subcenter_arcface"
    citation = Citation(
        "Jiankang Deng, Jia Guo, Tongliang Liu, Mingming Gong, Stefanos Zafeiriou",
        "Sub-center ArcFace: Boosting Face Recognition by Large-scale Noisy Web Faces",
        2020,
        "ECCV",
        "https://www.ecva.net/papers/eccv_2020/papers_ECCV/papers/123560715.pdf",
    )
    loss_class = SubcenterArcFace
    convergence = Convergence(margin=0.12, job=SMALL_DATA)

    class Hyperparameters(ArcFaceHyperparameters):
        """Arguments of :class:`armillary.losses.hard_classes.SubcenterArcFace`."""

        subcenters: int = Field(3, ge=1, le=16, description="K, rows a class")
