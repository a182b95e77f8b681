"""Embeddings spread over the sphere: alignment and uniformity."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from armillary import collectives
from armillary.losses.blocks import Block, against_batch, log_sum_exp_of_others
from armillary.losses.global_batch import global_rows
from armillary.losses.tensors import check_embeddings, float32_math, normalize, not_a_number_guard


class Uniformity(nn.Module):
    """How evenly directions cover the sphere. T. Wang and Isola, ICML 2020, arXiv 2005.10242.

    ``L = log mean_{i != j} exp(-t |x_i - x_j|^2)`` of unit vectors, over the pairs of the global batch: the logarithm
    of a mean over all workers. 0 when all coincide, -2 t n / (n - 1) for the regular simplex of n points; 0 for one.

    Args:
        t: > 0.
        gather: see the other workers' samples.
    """

    def __init__(self, t: float = 2.0, gather: bool = True) -> None:
        super().__init__()
        if not t > 0:
            raise ValueError(f"t must be above 0, found {t}")
        self.t, self.gather = t, gather

    @float32_math
    def forward(self, embeddings: Tensor) -> Tensor:
        """Of ``embeddings (batch, dim)``; the same on all workers."""
        check_embeddings(embeddings)
        samples = len(embeddings) * (collectives.world_size() if self.gather else 1)
        if samples < 2:
            return not_a_number_guard(embeddings)

        def of_anchors(block: Block) -> tuple[Tensor, ...]:
            # |x - y|^2 = 2 - 2 x.y
            return (log_sum_exp_of_others(block, 2 * self.t),)

        anchors = normalize(embeddings)
        keys = torch.arange(len(anchors), device=anchors.device)
        rows = against_batch(of_anchors, anchors, keys, self.gather, eager=False)[0]
        total = global_rows(rows, self.gather).logsumexp(dim=0)
        return total - 2 * self.t - math.log(samples * (samples - 1)) + not_a_number_guard(embeddings)


class AlignUniform(nn.Module):
    """Views of an image close to each other, images spread out. T. Wang and Isola, ICML 2020, arXiv 2005.10242.

    ``L = w_a mean_i |x_i - y_i|^alpha + w_u (U(x) + U(y)) / 2`` of unit vectors, with U of :class:`Uniformity`.

    Args:
        alpha: >= 1; below 2 the gradient of a pair that coincides is taken as 0.
        t: of the uniformity, > 0.
        align_weight: w_a >= 0.
        uniform_weight: w_u >= 0.
        gather: see the other workers' samples.

    Raises:
        ValueError: an option out of range; in ``forward`` views of different shapes.
    """

    def __init__(
        self,
        alpha: float = 2.0,
        t: float = 2.0,
        align_weight: float = 1.0,
        uniform_weight: float = 1.0,
        gather: bool = True,
    ) -> None:
        super().__init__()
        if not (alpha >= 1 and align_weight >= 0 and uniform_weight >= 0):
            raise ValueError(
                f"alpha must be at least 1 and the weights at least 0, found {alpha}, {align_weight}, {uniform_weight}"
            )
        self.alpha, self.align_weight, self.uniform_weight = alpha, align_weight, uniform_weight
        self.uniformity = Uniformity(t, gather)

    @float32_math
    def forward(self, view1: Tensor, view2: Tensor, *, metrics: dict[str, Tensor] | None = None) -> Tensor:
        """The loss of two views ``(batch, dim)``; ``metrics`` receives ``alignment`` and ``uniformity``."""
        check_embeddings(view1)
        if view1.shape != view2.shape:
            raise ValueError(f"the views differ in shape: {tuple(view1.shape)} and {tuple(view2.shape)}")
        squared = (normalize(view1) - normalize(view2)).square().sum(dim=1)
        apart = squared > 0
        align = torch.where(apart, torch.where(apart, squared, 1).pow(self.alpha / 2), squared * 0).mean()
        uniform = (self.uniformity(view1) + self.uniformity(view2)) / 2
        if metrics is not None:
            metrics.update(alignment=align.detach(), uniformity=uniform.detach())
        loss: Tensor = self.align_weight * align + self.uniform_weight * uniform
        return loss
