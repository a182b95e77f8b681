"""Con2R's term: a similarity graph of embeddings that should follow a graph of nearness and agreement."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from armillary.losses.global_batch import global_rows, self_mask
from armillary.losses.tensors import check_choice, float32_math

FLOOR = 1e-7


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
            losses.append(_follow(scores, near, alike, self.alpha, axis).mean())
        return (losses[0] + losses[1]) / 2

    def overlap(self, queries: Tensor, neighbours: Tensor) -> Tensor:
        """A ``(volumes, n, m)`` of positions."""
        size = torch.tensor(self.receptive, dtype=torch.float64, device=queries.device)
        distance = (queries[:, :, None] - neighbours[:, None]).abs()
        return ((size - distance).clamp_min(0) / size).prod(dim=3).clamp_min(FLOOR)


class SampleGraphConstraint(nn.Module):
    """Con2R's term between the samples of a batch, whose nearness a graph says: who is related to whom.

    With A_ij in [0, 1] the weight of the edge between samples i and j, at least 1e-7, and B as in
    :class:`GraphConstraint`, both over all others j != i of the global batch::

        L = mean_i -sum_j T_ij log softmax_j(z_i . sg z_j),   T = alpha A/sum_j A + (1 - alpha) B/sum_j B

    Queries and neighbours are one set here, so that the paper's two halves are the same number. Samples are left out of
    their own row, where the paper draws places with replacement. ``formulation="survey"``: a survey's smoothness,
    ``mean_i sum_j A_ij |z_i - z_j|^2``, which knows no alpha, and alone is least when all embeddings are equal.

    Args:
        alpha: in [0, 1].
        formulation: ``paper`` or ``survey``.
        gather: whether the other workers' samples are compared with too.
    """

    def __init__(self, alpha: float = 0.5, formulation: str = "paper", gather: bool = True) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], found {alpha}")
        check_choice("formulation", formulation, ("paper", "survey"))
        self.alpha, self.formulation, self.gather = alpha, formulation, gather

    @float32_math
    def forward(self, embeddings: Tensor, near: Tensor, posteriors: Tensor | None = None) -> Tensor:
        """The mean over samples; 0 of a batch of one.

        Args:
            embeddings: z, ``(batch, dim)``; lengths count.
            near: A, ``(batch, global batch)``, symmetric over the global batch.
            posteriors: p, ``(batch, classes)``; may be missing at alpha 1.
        """
        if self.formulation == "survey":
            return smoothness(embeddings, global_rows(embeddings, self.gather), near) / len(embeddings)
        others = global_rows(embeddings.detach(), self.gather)
        if len(others) == 1:
            return embeddings.sum() * 0
        own = self_mask(near, self.gather)
        near = near.to(embeddings.dtype).clamp_min(FLOOR).masked_fill(own, 0)
        alike = near
        if self.alpha < 1:
            if posteriors is None:
                raise ValueError("agreement needs posteriors: alpha is below 1")
            sides = posteriors.detach()[None], global_rows(posteriors.detach(), self.gather)[None]
            alike = agreement(*sides)[0].to(embeddings.dtype).masked_fill(own, 0)
        return _follow((embeddings @ others.T).masked_fill(own, -torch.inf), near, alike, self.alpha, 1).mean()


def smoothness(embeddings: Tensor, others: Tensor, weights: Tensor) -> Tensor:
    """A survey's form: ``sum_ij w_ij |z_i - z_j|^2`` over ``(n, dim)``, ``(m, dim)`` and ``(n, m)``."""
    return (weights.to(embeddings.dtype) * (embeddings[:, None] - others[None]).square().sum(dim=2)).sum()


def _follow(scores: Tensor, near: Tensor, alike: Tensor, alpha: float, axis: int) -> Tensor:
    """Cross-entropy of softmaxed scores along an axis to the target T; scores of -inf have the target 0."""
    target = alpha * near / near.sum(axis, keepdim=True)
    target = target + (1 - alpha) * alike / alike.sum(axis, keepdim=True)
    return -(target * scores.log_softmax(dim=axis).masked_fill(target == 0, 0)).sum(dim=axis)


def agreement(queries: Tensor, neighbours: Tensor) -> Tensor:
    """B ``(volumes, n, m)`` of posteriors; probabilities below 1e-7 count as that."""
    p, q = queries.clamp_min(FLOOR), neighbours.clamp_min(FLOOR)
    # KL(p||q) + KL(q||p) = sum (p - q)(log p - log q), from four matrix products.
    own = (p * p.log()).sum(2)[:, :, None] + (q * q.log()).sum(2)[:, None, :]
    return (-(own - p @ q.log().transpose(1, 2) - p.log() @ q.transpose(1, 2)) / 2).exp().clamp_max(1)
