"""Decoupled contrastive learning: the positive is left out of the denominator."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from armillary import collectives
from armillary.losses.blocks import Block, against_batch
from armillary.losses.global_batch import first_column, global_mean
from armillary.losses.key_contrast import check_temperature
from armillary.losses.slopes import empty_logit
from armillary.losses.tensors import check_embeddings, float32_math, normalize, not_a_number_guard


class DecoupledContrastive(nn.Module):
    """DCL and DCLW. Yeh et al., "Decoupled Contrastive Learning", ECCV 2022, arXiv 2110.06848, eqs. 5 and 6.

    With s cosines, i an anchor of 2N, i+ its other view, and j the 2N - 2 views of other images::

        L_i = -w_i s_{i,i+} / tau + log sum_j exp(s_ij / tau),    L = mean_i L_i
        DCL: w_i = 1        DCLW: w_i = 2 - exp(s_{i,i+} / sigma) / mean_j exp(s_{j,j+} / sigma), a constant

    Not bounded below. One image alone has nothing to stand apart from: 0.

    Args:
        temperature: tau > 0.
        sigma: temperature of the weights, > 0.
        weighted: DCLW; the mean of its weights over the global batch is 1.
        gather: see the other workers' samples.
    """

    def __init__(
        self, temperature: float = 0.1, sigma: float = 0.5, weighted: bool = False, gather: bool = True
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        check_temperature(sigma)
        self.temperature, self.sigma, self.weighted, self.gather = temperature, sigma, weighted, gather

    def weights(self, positive: Tensor) -> Tensor:
        """DCLW's w ``(batch,)`` of the pairs' cosines ``(batch,)``."""
        share = (positive.detach() / self.sigma).exp()
        count = share.new_tensor(len(share))
        total = collectives.all_reduce_sum(share.sum()) if self.gather else share.sum()
        pairs = collectives.all_reduce_sum(count) if self.gather else count
        return 2 - share * pairs / total

    @float32_math
    def forward(self, view1: Tensor, view2: Tensor, *, metrics: dict[str, Tensor] | None = None) -> Tensor:
        """The loss of two views ``(batch, dim)``; ``metrics`` receives ``positive_cosine`` and ``log_negatives``."""
        check_embeddings(view1)
        if view1.shape != view2.shape:
            raise ValueError(f"the views differ in shape: {tuple(view1.shape)} and {tuple(view2.shape)}")
        z1, z2 = normalize(view1), normalize(view2)
        image = torch.arange(len(z1), device=z1.device) + first_column(len(z1), self.gather)

        def log_negatives(block: Block) -> tuple[Tensor, ...]:
            logits = block.anchors @ block.columns.T / self.temperature
            return (logits.masked_fill(~block.negative, empty_logit(logits.dtype)).logsumexp(dim=1),)

        (log_sum,) = against_batch(log_negatives, torch.cat([z1, z2]), image.repeat(2), self.gather)
        positive = (z1 * z2).sum(1)
        weight = self.weights(positive) if self.weighted else torch.ones_like(positive)
        alone = len(z1) * (collectives.world_size() if self.gather else 1) == 1
        losses = torch.zeros_like(log_sum) if alone else log_sum - (weight * positive / self.temperature).repeat(2)
        if metrics is not None:
            count = positive.new_tensor(len(positive))
            metrics["positive_cosine"] = global_mean(positive.detach().sum(), count, self.gather)
            metrics["log_negatives"] = torch.zeros_like(count) if alone else log_sum.detach().mean()
        return losses.mean() + not_a_number_guard(view1) + not_a_number_guard(view2)
