"""Class-head losses that know how far a head is turned. Symbols: phi_i = max(|yaw_i|, |pitch_i|), in degrees."""

from __future__ import annotations

import torch
from torch import Tensor

from armillary.losses.class_head import Columns, Samples
from armillary.losses.hard_classes import CurricularFace
from armillary.losses.margin_softmax import ArcFace

RIGHT_ANGLE = 90.0


def turn(pose: Tensor) -> Tensor:
    """phi, ``(batch, 1)`` degrees, of ``pose (batch, 2)``: yaw and pitch in degrees."""
    return pose.abs().amax(dim=1, keepdim=True)


class PoseWeightedArcFace(ArcFace):
    """ArcFace whose samples weigh less the more a head is turned: ``w_i = sigmoid(alpha (phi_max - phi_i))``.

    The reading of HeadPose-Softmax in a survey, which prints a minus before a loss that is positive already.

    Args:
        num_classes: C.
        embedding_dim: width of x.
        margin: m in radians.
        scale: s.
        pose_slope: alpha, per degree, >= 0; 0 weighs all by half.
        pose_limit: phi_max in degrees.
        reduction: ``mean`` or ``none``.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        margin: float = 0.5,
        scale: float = 64.0,
        pose_slope: float = 0.05,
        pose_limit: float = 90.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__(num_classes, embedding_dim, margin, scale, reduction=reduction)
        self.pose_slope, self.pose_limit = pose_slope, pose_limit

    def sample_weight(self, samples: Samples) -> Tensor:
        """w; the column ``pose`` is ``(batch, 2)``."""
        phi = turn(samples.info["pose"]).to(samples.embeddings.dtype)
        return torch.sigmoid(self.pose_slope * (self.pose_limit - phi))


class PoseCurriculum(CurricularFace):
    """CurricularFace in which hard classes weigh more for turned heads: t becomes ``t (1 + min(1, phi_i / 90))``.

    ::

        N_ij = cos_ij                                              where cos(theta_iy + m) >= cos_ij
               cos_ij (t (1 + min(1, phi_i / 90)) + cos_ij)        elsewhere

    All else as in CurricularFace, which phi = 0 gives.

    Args:
        num_classes: C.
        embedding_dim: width of x.
        margin: m in radians.
        scale: s.
        momentum: share of the old t that is kept.
        reduction: ``mean`` or ``none``.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        margin: float = 0.5,
        scale: float = 64.0,
        momentum: float = 0.99,
        reduction: str = "mean",
    ) -> None:
        super().__init__(num_classes, embedding_dim, margin, scale, momentum, reduction=reduction)

    def columns(self, samples: Samples, target: Tensor) -> Columns:
        """The margined cosine, and t of each sample."""
        turned = (turn(samples.info["pose"]).to(target.dtype) / RIGHT_ANGLE).clamp_max(1)
        return {**super().columns(samples, target), "emphasis": self.t.to(target.dtype) * (1 + turned)}

    def non_target(self, cosine: Tensor, target: Tensor, columns: Columns) -> Tensor:
        """N."""
        return torch.where(cosine > columns["margined"], cosine * (columns["emphasis"] + cosine), cosine)
