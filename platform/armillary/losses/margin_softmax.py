"""Softmax over identities, plain and with margins on the hypersphere.

Symbols: x_i embedding, W_j class row, cos_ij = W_j . x_i / (|W_j| |x_i|), y_i label, s scale, m margin.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from armillary.losses.class_head import ClassHeadLoss, LinearHeadLoss, Samples

# Smallest 1 - cos^2 under the root: its slope is infinite at 0.
SINE_FLOOR = 1e-12
LEAST_SCALE = 0.01
# Cosines this near to +-1 have no angle in float32.
ANGLE_EPS = 1e-6


def shifted_cosine(cosine: Tensor, margin: Tensor) -> Tensor:
    """cos(theta + m) = cos(theta) cos(m) - sin(theta) sin(m), from cos(theta) and m in radians."""
    sine = (1 - cosine.square()).clamp_min(SINE_FLOOR).sqrt()
    return cosine * margin.cos() - sine * margin.sin()


def lowest_scale(num_classes: int, probability: float) -> float:
    """The smallest s at which each of C class centers can have this probability under softmax over cosines.

    ``(C - 1) / C log((C - 1) p / (1 - p))``, Wang et al., "CosFace", CVPR 2018, eq. 6; C at least 2, p in (0, 1).
    """
    others = num_classes - 1
    return others / num_classes * math.log(others * probability / (1 - probability))


class Softmax(LinearHeadLoss):
    """Cross-entropy over a linear head.

    ``L = mean_i -log( exp(z_iy) / sum_j exp(z_ij) ),  z_ij = W_j . x_i + b_j``

    Args:
        num_classes: C.
        embedding_dim: width of x.
        bias: whether the head has b.
        reduction: ``mean`` or ``none``.
    """

    def __init__(self, num_classes: int, embedding_dim: int, bias: bool = True, reduction: str = "mean") -> None:
        super().__init__(num_classes, embedding_dim, bias=bias, reduction=reduction)


class NormFace(ClassHeadLoss):
    """Softmax over scaled cosines, the scale trained. Wang et al., "NormFace", ACM Multimedia 2017, arXiv 1704.06369.

    ``L = mean_i -log( exp(s cos_iy) / sum_j exp(s cos_ij) )``

    Args:
        num_classes: C.
        embedding_dim: width of x.
        scale: s, or its starting value when it is learned; > 0.
        learn_scale: train s, kept at 0.01 or above; weight decay should leave it alone.
        reduction: ``mean`` or ``none``.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        scale: float = 16.0,
        learn_scale: bool = True,
        reduction: str = "mean",
    ) -> None:
        super().__init__(num_classes, embedding_dim, scale=scale, reduction=reduction)
        self.learned_scale = nn.Parameter(torch.full((1,), scale)) if learn_scale else None

    def logit_scale(self, samples: Samples) -> Tensor:
        """s, learned or fixed."""
        if self.learned_scale is None:
            return super().logit_scale(samples)
        return self.learned_scale.to(samples.embeddings.dtype).clamp_min(LEAST_SCALE)


class CosFace(ClassHeadLoss):
    """Additive cosine margin. Wang et al., "CosFace", CVPR 2018, arXiv 1801.09414.

    ``L = mean_i -log( exp(s (cos_iy - m)) / (exp(s (cos_iy - m)) + sum_{j != y} exp(s cos_ij)) )``

    Args:
        num_classes: C.
        embedding_dim: width of x.
        margin: m, a difference of cosines; 0 to C / (C - 1).
        scale: s.
        reduction: ``mean`` or ``none``.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        margin: float = 0.35,
        scale: float = 64.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__(num_classes, embedding_dim, margin, scale, reduction)

    def target(self, cosine: Tensor, margin: Tensor) -> Tensor:
        """T = cos - m."""
        return cosine - margin


class ArcFace(ClassHeadLoss):
    """Additive angular margin. Deng et al., "ArcFace", CVPR 2019, arXiv 1801.07698.

    ``L = mean_i -log( exp(s T_i) / (exp(s T_i) + sum_{j != y} exp(s cos_ij)) ),  T_i = cos(theta_iy + m)``

    cos(theta + m) rises again beyond theta = pi - m. The authors' code replaces it there by ``cos(theta) - m sin(m)``,
    which falls throughout but jumps at pi - m (``extension``).

    Args:
        num_classes: C.
        embedding_dim: width of x.
        margin: m in radians, 0 to pi / 2.
        scale: s.
        easy_margin: the margin only where cos > 0, plain cosine elsewhere; takes the place of the extension.
        extension: the authors' falling branch beyond pi - m.
        reduction: ``mean`` or ``none``.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        margin: float = 0.5,
        scale: float = 64.0,
        easy_margin: bool = False,
        extension: bool = True,
        reduction: str = "mean",
    ) -> None:
        super().__init__(num_classes, embedding_dim, margin, scale, reduction)
        self.easy_margin, self.extension = easy_margin, extension

    def target(self, cosine: Tensor, margin: Tensor) -> Tensor:
        """T = cos(theta + m)."""
        shifted = shifted_cosine(cosine, margin)
        if self.easy_margin:
            return torch.where(cosine > 0, shifted, cosine)
        if self.extension:
            return torch.where(cosine > -margin.cos(), shifted, cosine - margin * margin.sin())
        return shifted


class CombinedMargin(ClassHeadLoss):
    """Multiplied, added and subtracted margins at once. Deng et al., "ArcFace", CVPR 2019, section 2.2.

    ``L = mean_i -log( exp(s T_i) / (exp(s T_i) + sum_{j != y} exp(s cos_ij)) ),  T_i = cos(m1 theta_iy + m2) - m3``

    (1, m, 0) is ArcFace without its extension, (1, 0, m) CosFace; the paper's mixtures are (1, 0.3, 0.2) and
    (0.9, 0.4, 0.15). T rises again where m1 theta + m2 passes pi.

    Args:
        num_classes: C.
        embedding_dim: width of x.
        multiplier: m1 > 0.
        margin: m2 in radians, 0 to pi / 2.
        offset: m3, a difference of cosines, at least 0.
        scale: s.
        reduction: ``mean`` or ``none``.

    Raises:
        ValueError: m1 is not above 0.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        multiplier: float = 1.0,
        margin: float = 0.3,
        offset: float = 0.2,
        scale: float = 64.0,
        reduction: str = "mean",
    ) -> None:
        if not multiplier > 0:
            raise ValueError(f"multiplier must be above 0, found {multiplier}")
        super().__init__(num_classes, embedding_dim, margin, scale, reduction)
        self.multiplier, self.offset = multiplier, offset

    def target(self, cosine: Tensor, margin: Tensor) -> Tensor:
        """T = cos(m1 theta + m2) - m3; no angle is computed where m1 is 1."""
        if self.multiplier == 1:
            return shifted_cosine(cosine, margin) - self.offset
        theta = cosine.clamp(-1 + ANGLE_EPS, 1 - ANGLE_EPS).acos()
        return (self.multiplier * theta + margin).cos() - self.offset
