"""Con2R's term: two sets of places, whose similarity graph should follow a graph of nearness and agreement."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from armillary.losses.tensors import float32_math


class GraphConstraint(nn.Module):
    """Graph-constrained contrastive regularisation. Reiss et al., ECCV 2022.

    For n queries q and n neighbours k of an image or a volume, with positions, class posteriors p and embeddings z::

        A_ij = prod_axis max(r - |q_i - k_j|, 0) / prod r, at least 1e-7      (overlap of boxes of size r)
        B_ij = exp(-1/2 [KL(p_i || p_j) + KL(p_j || p_i)])
        T = alpha A/sum A + (1 - alpha) B/sum B, along rows (T^r) and along columns (T^c)
        L = 1/2 mean_i -sum_j T^r_ij log softmax_j(z_i . sg z_j) + 1/2 mean_j -sum_i T^c_ij log softmax_i(sg z_i . z_j)

    Plain products, no temperature; no gradient into T.

    Args:
        alpha: in [0, 1].
        receptive: r, one size an axis, in the positions' unit.
    """

    FLOOR = 1e-7

    def __init__(self, alpha: float = 0.5, receptive: tuple[float, ...] = (3, 3)) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], found {alpha}")
        self.alpha, self.receptive = alpha, receptive

    @float32_math
    def forward(
        self,
        queries: Tensor,
        neighbours: Tensor,
        query_places: Tensor,
        neighbour_places: Tensor,
        query_posteriors: Tensor,
        neighbour_posteriors: Tensor,
    ) -> Tensor:
        """The mean over volumes.

        Args:
            queries: z_i, ``(volumes, n, dim)``.
            neighbours: z_j, ``(volumes, m, dim)``.
            query_places: ``(volumes, n, axes)``.
            neighbour_places: ``(volumes, m, axes)``.
            query_posteriors: p_i, ``(volumes, n, classes)``.
            neighbour_posteriors: p_j, ``(volumes, m, classes)``.
        """
        near = self.overlap(query_places, neighbour_places).to(queries.dtype)
        alike = agreement(query_posteriors.detach(), neighbour_posteriors.detach())
        losses = []
        for axis, scores in (
            (2, queries @ neighbours.detach().transpose(1, 2)),
            (1, queries.detach() @ neighbours.transpose(1, 2)),
        ):
            target = self.alpha * near / near.sum(axis, keepdim=True)
            target = target + (1 - self.alpha) * alike / alike.sum(axis, keepdim=True)
            losses.append(-(target * scores.log_softmax(dim=axis)).sum(dim=axis).mean())
        return (losses[0] + losses[1]) / 2

    def overlap(self, queries: Tensor, neighbours: Tensor) -> Tensor:
        """A ``(volumes, n, m)`` of positions."""
        size = torch.tensor(self.receptive, dtype=torch.float64, device=queries.device)
        distance = (queries[:, :, None] - neighbours[:, None]).abs()
        return ((size - distance).clamp_min(0) / size).prod(dim=3).clamp_min(self.FLOOR)


def agreement(queries: Tensor, neighbours: Tensor) -> Tensor:
    """B ``(volumes, n, m)`` of posteriors; probabilities below 1e-7 count as that."""
    p, q = queries.clamp_min(1e-7), neighbours.clamp_min(1e-7)
    # KL(p||q) + KL(q||p) = sum (p - q)(log p - log q), from four matrix products.
    own = (p * p.log()).sum(2)[:, :, None] + (q * q.log()).sum(2)[:, None, :]
    return (-(own - p @ q.log().transpose(1, 2) - p.log() @ q.transpose(1, 2)) / 2).exp().clamp_max(1)
