"""Angular margins that each sample has to itself: from its length, its image's quality, its class or its probability.

Symbols: x_i embedding, n_i = |x_i|, theta_i angle to the own class row, s scale, T_i what stands for cos(theta_i) in
``L = mean_i -log( exp(s T_i) / (exp(s T_i) + sum_{j != y_i} exp(s cos_ij)) )``.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from armillary import collectives
from armillary.losses.class_chunks import Rows
from armillary.losses.class_head import ClassHeadLoss, Columns, HeadTerms, Samples, softmax_head_loss
from armillary.losses.hard_classes import global_mean
from armillary.losses.margin_softmax import ArcFace
from armillary.losses.tensors import check_choice

# Cosines and angles are kept this far from where the arc cosine has no slope, as AdaFace's authors do.
ANGLE_EPS = 1e-3


class AdaFace(ClassHeadLoss):
    """Margins that follow the feature's length. Kim, Jain, Liu, "AdaFace", CVPR 2022, arXiv 2204.00964, eqs. 15-20.

    ::

        T_i = cos( clip(theta_i - m z_i, eps, pi - eps) ) - (m z_i + m)
        z_i = clip( h (n_i - mu) / (sigma + eps), -1, 1 ),  n_i = clip(|x_i|, eps, norm_max),  eps = 1e-3
        mu <- r mean(n) + (1 - r) mu,  sigma <- r std(n) + (1 - r) sigma,  from mu = 20, sigma = 100

    z has no gradient. Mean and (unbiased) deviation are those of the global batch and move before they are used, in
    every training pass; a batch of one sample keeps sigma. The printed equation scales only the cosine by s; the
    authors' code, and this, scales the whole of T. The code clamps every cosine to 1 - eps, this only the own class's,
    which alone passes through an arc cosine.

    ``formulation: survey`` has one angular margin that grows with the raw length: ``T_i = cos(theta_i + m + k (n_i -
    mu))``, clipped alike; n without gradient, with which the loss would shorten features to escape the margin.

    Args:
        num_classes: C.
        embedding_dim: width of x.
        margin: m >= 0; radians and a difference of cosines at once.
        scale: s.
        concentration: h >= 0; 0 gives CosFace.
        norm_rate: r, in (0, 1]; 1 uses the batch alone.
        norm_max: largest n.
        slope: k, radians per unit of length, of the survey's formulation.
        formulation: ``paper`` or ``survey``.
        reduction: ``mean`` or ``none``.
    """

    mean_norm: Tensor
    norm_deviation: Tensor

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        margin: float = 0.4,
        scale: float = 64.0,
        concentration: float = 0.333,
        norm_rate: float = 0.01,
        norm_max: float = 100.0,
        slope: float = 0.01,
        formulation: str = "paper",
        reduction: str = "mean",
    ) -> None:
        check_choice("formulation", formulation, ("paper", "survey"))
        if not 0 < norm_rate <= 1:
            raise ValueError(f"norm_rate must be above 0 and at most 1, found {norm_rate}")
        super().__init__(num_classes, embedding_dim, margin, scale, reduction)
        self.concentration, self.norm_rate, self.norm_max = concentration, norm_rate, norm_max
        self.slope, self.formulation = slope, formulation
        self.register_buffer("mean_norm", torch.tensor(20.0))
        self.register_buffer("norm_deviation", torch.tensor(100.0))

    def lengths(self, samples: Samples) -> Tensor:
        """n, ``(batch, 1)``, without gradient."""
        return samples.norms.detach().clamp(ANGLE_EPS, self.norm_max)

    def observe(self, samples: Samples) -> None:
        """Moves mu and sigma towards those of the global batch."""
        lengths = collectives.gather_no_grad(self.lengths(samples)).to(self.mean_norm.dtype)
        self.mean_norm.lerp_(lengths.mean(), self.norm_rate)
        if len(lengths) > 1:
            self.norm_deviation.lerp_(lengths.std(), self.norm_rate)

    def standardized(self, samples: Samples) -> Tensor:
        """z, ``(batch, 1)``, in [-1, 1]."""
        lengths = self.lengths(samples)
        mean, deviation = self.mean_norm.to(lengths.dtype), self.norm_deviation.to(lengths.dtype)
        return (self.concentration * (lengths - mean) / (deviation + ANGLE_EPS)).clamp(-1, 1)

    def target_of(self, samples: Samples) -> Tensor:
        """T."""
        if self.formulation == "survey":
            lengths = self.lengths(samples)
            return moved(samples.similarity, self.margin + self.slope * (lengths - self.mean_norm.to(lengths.dtype)))
        z = self.standardized(samples)
        return moved(samples.similarity, -self.margin * z) - (self.margin * z + self.margin)


def moved(cosine: Tensor, angle: Tensor) -> Tensor:
    """cos(theta + angle) for an angle of any sign, theta + angle kept between 0 and pi."""
    theta = cosine.clamp(-1 + ANGLE_EPS, 1 - ANGLE_EPS).acos()
    return (theta + angle).clamp(ANGLE_EPS, math.pi - ANGLE_EPS).cos()


class MagFace(ArcFace):
    """Margins that grow with the feature's length. Meng et al., "MagFace", CVPR 2021, arXiv 2103.06627, eqs. 4-6.

    ::

        L = mean_i [ arcface_i with margin m(a_i)  +  lambda g(a_i) ],    a_i = clamp(|x_i|, l_a, u_a)
        m(a) = l_m + (u_m - l_m) (a - l_a) / (u_a - l_a),                 g(a) = 1 / a + a / u_a^2

    Gradient flows through a in both; none where |x_i| is outside [l_a, u_a]. A unique best length exists from
    ``lambda = s K u_a^2 l_a^2 / (u_a^2 - l_a^2)`` on, K the slope of m (:meth:`least_regularizer`). At evaluation |x|
    says how good an image is. The survey prints a g that is largest at its reference length, so that it would drive
    lengths away from it, and leaves out the bounds: a slip, not offered.

    Args:
        num_classes: C.
        embedding_dim: width of x.
        scale: s.
        norm_low: l_a > 0.
        norm_high: u_a > l_a.
        margin_low: l_m, radians.
        margin_high: u_m >= l_m, radians.
        regularizer: lambda >= 0.
        easy_margin: the margin only where cos > 0, as in the authors' default.
        extension: as in ArcFace, where the margin is not easy.
        reduction: ``mean`` or ``none``.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        scale: float = 64.0,
        norm_low: float = 10.0,
        norm_high: float = 110.0,
        margin_low: float = 0.45,
        margin_high: float = 0.8,
        regularizer: float = 35.0,
        easy_margin: bool = True,
        extension: bool = True,
        reduction: str = "mean",
    ) -> None:
        if not 0 < norm_low < norm_high:
            raise ValueError(f"norm_low must be above 0 and below norm_high, found {norm_low} and {norm_high}")
        if not margin_low <= margin_high:
            raise ValueError(f"margin_low must not be above margin_high, found {margin_low} and {margin_high}")
        super().__init__(num_classes, embedding_dim, margin_low, scale, easy_margin, extension, reduction)
        self.norm_low, self.norm_high, self.regularizer = norm_low, norm_high, regularizer
        self.slope = (margin_high - margin_low) / (norm_high - norm_low)

    def least_regularizer(self) -> float:
        """The lambda from which on every sample has one best length."""
        low, high = self.norm_low**2, self.norm_high**2
        return self.scale * self.slope * high * low / (high - low)

    def lengths(self, samples: Samples) -> Tensor:
        """a, ``(batch, 1)``."""
        return samples.norms.clamp(self.norm_low, self.norm_high)

    def margins(self, samples: Samples) -> Tensor:
        """m(a), ``(batch, 1)``."""
        return self.margin + self.slope * (self.lengths(samples) - self.norm_low)

    def head_terms(self, samples: Samples) -> HeadTerms:
        """ArcFace and lambda g(a)."""
        terms, a = softmax_head_loss(self, samples), self.lengths(samples)
        return dataclasses.replace(terms, losses=terms.losses + self.regularizer * (1 / a + a / self.norm_high**2))


class QualityArcFace(ArcFace):
    """The margin that a survey ascribes to QMagFace: ``m_i = m + k (Q_i - mean Q)``, with a given quality Q_i.

    The mean is that of the global batch. QMagFace itself trains with MagFace and changes the comparison only.

    Args:
        num_classes: C.
        embedding_dim: width of x.
        margin: m in radians.
        scale: s.
        quality_slope: k, radians between qualities 0 and 1.
        reduction: ``mean`` or ``none``.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        margin: float = 0.5,
        scale: float = 64.0,
        quality_slope: float = 0.2,
        reduction: str = "mean",
    ) -> None:
        super().__init__(num_classes, embedding_dim, margin, scale, reduction=reduction)
        self.quality_slope = quality_slope

    def margins(self, samples: Samples) -> Tensor:
        """m_i; the column ``quality`` is ``(batch,)``."""
        quality = samples.info["quality"].to(samples.embeddings.dtype).view(-1, 1)
        return self.margin + self.quality_slope * (quality - global_mean(quality))


class ClassMargins(ArcFace):
    """A margin for every class: ``T_i = cos(theta_i) - m_y`` or ``cos(theta_i + m_y)``.

    Liu et al., "Fair Loss", ICCV 2019. The margins are data that something else moves, without gradient.

    Args:
        num_classes: C.
        embedding_dim: width of x.
        margin: m of every class at the start.
        scale: s.
        form: ``cos`` or ``arc`` (radians).
        reduction: ``mean`` or ``none``.

    Attributes:
        class_margins: ``(num_classes,)``, or this worker's part where rows are split.
    """

    row_names = ("weight", "class_margins")
    class_margins: Tensor

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        margin: float = 0.35,
        scale: float = 64.0,
        form: str = "cos",
        reduction: str = "mean",
    ) -> None:
        check_choice("form", form, ("cos", "arc"))
        super().__init__(num_classes, embedding_dim, margin, scale, reduction=reduction)
        self.form = form
        self.register_buffer("class_margins", torch.full((num_classes,), margin))

    @torch.no_grad()
    def set_margins(self, margins: Tensor) -> None:
        """Takes new margins ``(num_classes,)``, equal on all workers."""
        first, count = (self.row_split.first, self.row_split.count) if self.row_split else (0, self.num_classes)
        self.class_margins.copy_(margins[first : first + count])

    def own_class(self, embeddings: Tensor, rows: Rows, similarity: Tensor) -> Columns:
        """The own class's cosine and margin."""
        return {"similarity": similarity, "class_margin": rows["class_margins"][:, None]}

    def margins(self, samples: Samples) -> Tensor:
        """m_y, ``(batch, 1)``."""
        return samples.own["class_margin"].detach()

    def target(self, cosine: Tensor, margin: Tensor) -> Tensor:
        """T."""
        return super().target(cosine, margin) if self.form == "arc" else cosine - margin


class ProbabilityArcFace(ArcFace):
    """ArcFace whose margin shrinks with the probability of the own class: ``m_i = m exp(-k p_i)``.

    p_i is the softmax probability without margin, and has no gradient. A survey ascribes this to spherical confidence
    learning. A column ``margin (batch,)``, where given, takes the place of m_i.

    Args:
        num_classes: C.
        embedding_dim: width of x.
        margin: m in radians.
        scale: s.
        decay: k >= 0.
        reduction: ``mean`` or ``none``.

    Attributes:
        probability: p of the last forward pass, ``(batch, 1)``, detached.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        margin: float = 0.5,
        scale: float = 64.0,
        decay: float = 1.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__(num_classes, embedding_dim, margin, scale, reduction=reduction)
        self.decay = decay
        self.probability: Tensor | None = None

    def head_terms(self, samples: Samples) -> HeadTerms:
        """One reduction over the classes serves both the probability and the loss."""
        cosine, scale = samples.similarity, self.logit_scale(samples)
        others = samples.classes.scaled_log_sum_exp(scale.expand_as(cosine))
        probability = torch.sigmoid((scale * cosine - others).detach())
        self.probability = probability
        given = samples.info.get("margin")
        margin = (
            self.margin * (-self.decay * probability).exp() if given is None else given.to(cosine.dtype).view(-1, 1)
        )
        losses = nn.functional.softplus(others - scale * self.target(cosine, margin))
        return HeadTerms(losses, cosine.detach(), samples.correct())
