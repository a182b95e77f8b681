"""Margins that multiply the angle to the own class, softened at the start of training: L-Softmax and SphereFace.

::

    psi(theta) = (-1)^k cos(m theta) - 2k,   theta in [k pi / m, (k + 1) pi / m]

falls from 1 at theta = 0 to 1 - 2m at theta = pi and lies below cos(theta). Training starts near cos(theta), mixed with
the weight lambda(t) = max(lambda_min, lambda_0 (1 + gamma t)^-power), t the optimizer steps begun, from 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from armillary.losses.class_chunks import Rows
from armillary.losses.class_head import ClassHeadLoss, Columns, Samples
from armillary.losses.margin_softmax import ANGLE_EPS
from armillary.losses.tensors import check_choice


def psi(cosine: Tensor, m: float) -> Tensor:
    """Psi of the angles with these cosines, in [1 - 2m, 1]; ``m`` at least 1.

    For whole m no angle is computed: cos(m theta) is the m-th Chebyshev polynomial of cos(theta). k has no gradient.
    """
    if m == int(m):
        before, multiple = torch.ones_like(cosine), cosine
        for _ in range(int(m) - 1):
            before, multiple = multiple, 2 * cosine * multiple - before
    else:
        multiple = torch.cos(m * cosine.clamp(-1 + ANGLE_EPS, 1 - ANGLE_EPS).acos())
    borders = cosine.new_tensor([math.cos(k * math.pi / m) for k in range(1, math.ceil(m))])
    k = (cosine.detach()[..., None] < borders).sum(dim=-1)
    return torch.where(k % 2 == 0, multiple, -multiple) - 2 * k


class _AnnealedMargin(ClassHeadLoss):
    """A class head whose target mixes plain and margined logits with a falling weight.

    ``iteration`` counts the training steps begun. It advances by itself; whoever takes several forward passes for one
    optimizer step sets it before each.
    """

    iteration: Tensor

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        margin: float,
        scale: float,
        annealing: tuple[float, float, float, float],
        formulation: str,
        reduction: str,
    ) -> None:
        check_choice("formulation", formulation, ("paper", "survey"))
        if not margin >= 1:
            raise ValueError(f"margin must be at least 1, found {margin}")
        super().__init__(num_classes, embedding_dim, margin, scale, reduction)
        self.formulation = formulation
        self.start, self.floor, self.gamma, self.power = annealing
        self.register_buffer("iteration", torch.zeros((), dtype=torch.int64))

    def observe(self, samples: Samples) -> None:
        """Counts the step."""
        self.iteration += 1

    def plain_weight(self, like: Tensor) -> Tensor:
        """lambda, the weight of the logit without margin; the survey's formulations have none."""
        if self.formulation == "survey":
            return like.new_zeros(())
        decayed = self.start * (1 + self.gamma * self.iteration.to(like.dtype)) ** -self.power
        return decayed.clamp_min(self.floor)

    def annealed(self, cosine: Tensor) -> Tensor:
        """(lambda cos + psi) / (1 + lambda)."""
        weight = self.plain_weight(cosine)
        return (weight * cosine + psi(cosine, self.margin)) / (1 + weight)

    def monitors(self, samples: Samples) -> dict[str, Tensor]:
        """The mean of s, and lambda, which the survey's formulations lack."""
        annealing = {} if self.formulation == "survey" else {"plain_weight": self.plain_weight(samples.embeddings)}
        return {**super().monitors(samples), **annealing}


class LSoftmax(_AnnealedMargin):
    """Large-margin softmax: free class norms, free feature norms. Liu et al., ICML 2016, arXiv 1612.02295, eqs. 4-6.

    ::

        L = mean_i -log( exp(f_y) / (exp(f_y) + sum_{j != y} exp(W_j . x_i)) )
        f_y = |W_y| |x_i| (lambda cos_iy + psi(theta_iy)) / (1 + lambda)

    The annealing's defaults bring lambda to its floor after 6,538 steps: in a run of hundreds this is hardly more than
    softmax unless ``annealing_start`` is smaller or ``annealing_speed`` larger. The metric ``plain_weight`` is lambda.

    ``formulation: survey`` normalises both norms away, ``f_y = s psi``, others ``s cos_ij``, and does not anneal.

    Args:
        num_classes: C.
        embedding_dim: width of x.
        margin: m >= 1, whole in the paper (4).
        scale: s, of the survey's formulation alone.
        annealing_start: lambda_0 >= 0.
        annealing_floor: lambda_min >= 0; the authors' digits use 0, faces 5.
        annealing_speed: gamma >= 0.
        annealing_power: >= 0.
        formulation: ``paper`` or ``survey``.
        reduction: ``mean`` or ``none``.
    """

    similarity_name = "logit"

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        margin: float = 4,
        scale: float = 64.0,
        annealing_start: float = 1000.0,
        annealing_floor: float = 5.0,
        annealing_speed: float = 2.5e-5,
        annealing_power: float = 35.0,
        formulation: str = "paper",
        reduction: str = "mean",
    ) -> None:
        annealing = (annealing_start, annealing_floor, annealing_speed, annealing_power)
        super().__init__(num_classes, embedding_dim, margin, scale, annealing, formulation, reduction)

    def similarity(self, embeddings: Tensor, rows: Rows | None = None) -> Tensor:
        """W_j . x_i, or cosines for the survey's formulation."""
        if self.formulation == "survey":
            return super().similarity(embeddings, rows)
        weight = (self.rows() if rows is None else rows)["weight"]
        return embeddings @ weight.to(embeddings.dtype).T

    def own_class(self, embeddings: Tensor, rows: Rows, similarity: Tensor) -> Columns:
        """The own class' logit, and |W_y|."""
        length = torch.linalg.vector_norm(rows["weight"], dim=1, keepdim=True)
        return {"similarity": similarity, "row_norm": length.to(similarity.dtype)}

    def lengths(self, samples: Samples) -> Tensor:
        """``|W_y| |x_i|``, ``(batch, 1)``."""
        return samples.norms * samples.own["row_norm"]

    def target_of(self, samples: Samples) -> Tensor:
        """f_y, or psi for the survey's formulation."""
        if self.formulation == "survey":
            return self.annealed(samples.similarity)
        lengths = self.lengths(samples)
        cosine = samples.similarity / lengths.masked_fill(lengths == 0, torch.inf)
        return lengths * self.annealed(cosine)

    def logit_scale(self, samples: Samples) -> Tensor:
        """1: the logits have their own scale; s for the survey's."""
        return super().logit_scale(samples) if self.formulation == "survey" else samples.embeddings.new_ones(())

    def monitors(self, samples: Samples) -> dict[str, Tensor]:
        """Lambda, and as the scale the mean of ``|W_y| |x_i|``, which stands where s does in other losses."""
        found = super().monitors(samples)
        return found if self.formulation == "survey" else {**found, "scale": self.lengths(samples).detach().mean()}


class SphereFace(_AnnealedMargin):
    """A-Softmax: unit class rows, the feature's length as the scale. Liu et al., CVPR 2017, arXiv 1704.08063, eqs. 5-7.

    ::

        L = mean_i -log( exp(f_y) / (exp(f_y) + sum_{j != y} exp(|x_i| cos_ij)) )
        f_y = |x_i| (lambda cos_iy + psi(theta_iy)) / (1 + lambda)

    The gradient is the exact one; the authors' code rescales that of the target. With ``normalized`` the scale s takes
    the place of |x_i|, as later work does with m of 1.5 to 1.7. ``formulation: survey`` is ``f_y = s cos(m theta)``,
    whose logit rises again beyond pi / m, without annealing. At right angles, where untrained features are, it is
    largest with m = 4 and has no slope with any even m, so that nothing is learned; m = 1.5 trains.

    The annealing's defaults bring lambda, the metric ``plain_weight``, to its floor after 1,659 steps.

    Args:
        num_classes: C.
        embedding_dim: width of x.
        margin: m >= 1; 4 in the paper.
        scale: s, where the features' lengths are not used.
        normalized: scale s instead of |x_i|.
        annealing_start: lambda_0 >= 0.
        annealing_floor: lambda_min >= 0.
        annealing_speed: gamma >= 0.
        annealing_power: >= 0.
        formulation: ``paper`` or ``survey``.
        reduction: ``mean`` or ``none``.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        margin: float = 4,
        scale: float = 30.0,
        normalized: bool = False,
        annealing_start: float = 1000.0,
        annealing_floor: float = 5.0,
        annealing_speed: float = 0.12,
        annealing_power: float = 1.0,
        formulation: str = "paper",
        reduction: str = "mean",
    ) -> None:
        annealing = (annealing_start, annealing_floor, annealing_speed, annealing_power)
        super().__init__(num_classes, embedding_dim, margin, scale, annealing, formulation, reduction)
        self.normalized = normalized or formulation == "survey"

    def target(self, cosine: Tensor, margin: Tensor) -> Tensor:
        """(lambda cos + psi) / (1 + lambda); cos(m theta) for the survey's formulation."""
        if self.formulation == "survey":
            return torch.cos(self.margin * cosine.clamp(-1 + ANGLE_EPS, 1 - ANGLE_EPS).acos())
        return self.annealed(cosine)

    def logit_scale(self, samples: Samples) -> Tensor:
        """|x_i|, or s."""
        return super().logit_scale(samples) if self.normalized else samples.norms
