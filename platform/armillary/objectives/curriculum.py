"""HeadPose-Softmax: how far a head is turned decides what its image teaches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from armillary.losses.pose_margins import PoseCurriculum, PoseWeightedArcFace
from armillary.objectives.base import BuildContext, Citation, Convergence, Needs
from armillary.objectives.bases import ClassHeadObjective
from armillary.objectives.margin_softmax import SMALL_DATA, AngularHyperparameters
from armillary.objectives.registry import register


@register
class HeadPoseSoftmax(ClassHeadObjective):
    """HeadPose-Softmax as a survey prints it: ArcFace, its samples weighed by how frontal they are.

    This is not the paper's loss, whose formula could not be found; its abstract says that hard samples are emphasised
    by their pose angle, the more the longer training lasts. ``formulation: curriculum`` is a reconstruction that keeps
    to the abstract: CurricularFace, whose emphasis of hard classes grows with the angle
    (:class:`armillary.losses.pose_margins.PoseCurriculum`). The default weighs the other way:
    :class:`armillary.losses.pose_margins.PoseWeightedArcFace`. Both read yaw and pitch in degrees.
    """

    name = "headpose_softmax"
    family = "curriculum"
    catalog_id = "headpose_softmax"
    citation = Citation(
        "Jifan Yang et al.",
        "HeadPose-Softmax: Head pose adaptive curriculum learning loss for deep face recognition",
        2023,
        "Pattern Recognition",
    )
    needs = Needs(recipe="faces", fields=("label", "pose"), components=("class_head",))
    waivers: ClassVar[Mapping[str, str]] = {
        "gradcheck[headpose_softmax-formulation=curriculum]": "t follows the batch without gradient"
    }
    convergence = Convergence(margin=0.14, job=SMALL_DATA)

    class Hyperparameters(AngularHyperparameters):
        """ArcFace's, and how pose enters."""

        formulation: Literal["survey", "curriculum"] = Field(
            "survey", description="weights, or emphasis of hard classes"
        )
        pose_slope: float = Field(0.05, ge=0, le=10, description="survey: alpha, a degree")
        pose_limit: float = Field(90.0, ge=0, le=180, description="survey: degrees at which a sample weighs a half")
        momentum: float = Field(0.99, ge=0, le=1, description="curriculum: share of the old emphasis that is kept")

    @classmethod
    def needs_for(cls, hyperparameters: Any) -> Needs:
        """The curriculum's emphasis follows the whole batch."""
        return Needs(
            recipe="faces",
            fields=cls.needs.fields,
            components=cls.needs.components,
            batch_coupled=hyperparameters.formulation == "curriculum",
        )

    def build(self, context: BuildContext) -> None:
        """Makes the loss with its head."""
        options, size = self.hyperparameters, (context.num_classes, context.embedding_dim)
        arcface = (options.margin, options.scale)
        if options.formulation == "survey":
            self.loss: Any = PoseWeightedArcFace(*size, *arcface, options.pose_slope, options.pose_limit)
        else:
            self.loss = PoseCurriculum(*size, *arcface, options.momentum)
