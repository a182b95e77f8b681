"""Parts of tuple losses: distances, masks, miners, hinges over triplets, reducers.

Everything is ``(anchors, columns)``: anchors are this worker's samples, columns all workers'. Nothing of size
anchors x columns x columns is ever stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from armillary import collectives
from armillary.losses.global_batch import global_mean, same_label, self_mask

# Smallest squared distance under a root: its slope is infinite at 0.
SQUARED_FLOOR = 1e-12


@dataclass(frozen=True)
class Triplets:
    """Per anchor, ``(anchors,)``: the sum of its triplets' losses, how many triplets, how many with a loss above 0."""

    losses: Tensor
    count: Tensor
    active: Tensor


@dataclass(frozen=True)
class Mined:
    """Chosen triplets: ``pairs (anchors, columns)`` bool, and for each pair the column of its negative."""

    pairs: Tensor
    negative: Tensor


def euclidean(anchors: Tensor, columns: Tensor, squared: bool) -> Tensor:
    """Distances ``(anchors, columns)`` between rows; equal rows get 0 with zero gradient.

    Args:
        anchors: ``(anchors, dim)``.
        columns: ``(columns, dim)``.
        squared: the square, which on the unit sphere is ``2 - 2 cos``.
    """
    square = anchors.square().sum(1)[:, None] + columns.square().sum(1)[None, :] - 2 * anchors @ columns.T
    square = square.clamp_min(0)
    if squared:
        return square
    return torch.where(square > SQUARED_FLOOR, square.clamp_min(SQUARED_FLOOR).sqrt(), 0)


def positives_and_negatives(labels: Tensor, gather: bool = True) -> tuple[Tensor, Tensor]:
    """Masks ``(anchors, columns)``: same label but not the anchor itself, and another label."""
    same = same_label(labels, gather)
    return same & ~self_mask(same, gather), ~same


def _sorted_negatives(distance: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """Detached distances of each row with non-negatives pushed to infinity, ascending, and their columns."""
    key, column = distance.detach().masked_fill(~negative, torch.inf).sort(dim=1)
    return key, column


def mine_semi_hard(distance: Tensor, positive: Tensor, negative: Tensor) -> Mined:
    """For every pair (a, p) the nearest negative farther than p; the farthest negative where there is none.

    Schroff et al. 2015 ask for a negative inside the margin; one outside it has loss 0 all the same.
    """
    key, column = _sorted_negatives(distance, negative)
    last = negative.sum(dim=1, keepdim=True) - 1
    nearest_farther = torch.searchsorted(key, distance.detach().contiguous(), right=True)
    place = torch.minimum(nearest_farther, last).clamp_min(0)
    return Mined(positive & (last >= 0), column.gather(1, place))


def mine_batch_hard(distance: Tensor, positive: Tensor, negative: Tensor) -> Mined:
    """One triplet an anchor: its farthest positive, its nearest negative. Hermans et al. 2017, arXiv 1703.07737."""
    detached = distance.detach()
    farthest = detached.masked_fill(~positive, -torch.inf).argmax(dim=1, keepdim=True)
    chosen = torch.zeros_like(positive).scatter(1, farthest, True) & positive
    return mine_hard_negative(distance, chosen, negative)


def mine_hard_negative(distance: Tensor, positive: Tensor, negative: Tensor) -> Mined:
    """For every pair (a, p) the negative nearest to a."""
    nearest = distance.detach().masked_fill(~negative, torch.inf).argmin(dim=1, keepdim=True)
    return Mined(positive & negative.any(dim=1, keepdim=True), nearest.expand_as(positive))


MINERS = {"semi_hard": mine_semi_hard, "batch_hard": mine_batch_hard, "hard_negative": mine_hard_negative}


def hinge(difference: Tensor, margin: float, soft: bool) -> Tensor:
    """``[difference + margin]_+``, or ``log(1 + exp(difference))``, which has no margin."""
    return F.softplus(difference) if soft else F.relu(difference + margin)


def mined_triplets(distance: Tensor, mined: Mined, margin: float, soft: bool) -> Triplets:
    """The losses of chosen triplets."""
    losses = hinge(distance - distance.gather(1, mined.negative), margin, soft)
    losses = torch.where(mined.pairs, losses, 0)
    return Triplets(losses.sum(1), mined.pairs.sum(1), (losses > 0).sum(1))


def all_triplets(distance: Tensor, positive: Tensor, negative: Tensor, margin: float, soft: bool) -> Triplets:
    """The losses of every (a, p, n), without enumerating them."""
    count = positive.sum(1) * negative.sum(1)
    if soft:
        return Triplets(_soft_sum(distance, positive, negative), count, count)
    losses, active = _hinge_sum(distance, positive, negative, margin)
    return Triplets(losses, count, active)


def _hinge_sum(distance: Tensor, positive: Tensor, negative: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Per anchor ``sum_{p, n} [D_ap - D_an + m]_+`` and the number of terms above 0.

    With negatives in ascending order and k the number of those below D_ap + m, the sum over n is
    ``k (D_ap + m) - (sum of the k smallest D_an)``: one sort, one cumulative sum.
    """
    key, column = _sorted_negatives(distance, negative)
    ascending = torch.where(key < torch.inf, distance.gather(1, column), 0)
    smallest = F.pad(ascending.cumsum(dim=1), (1, 0))
    threshold = distance + margin
    below = torch.searchsorted(key, threshold.detach().contiguous()).minimum(negative.sum(1, keepdim=True))
    sums = below * threshold - smallest.gather(1, below)
    return torch.where(positive, sums, 0).sum(1), torch.where(positive, below, 0).sum(1)


def _soft_sum(distance: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Per anchor ``sum_{p, n} log(1 + exp(D_ap - D_an))``, one positive of every anchor at a time."""

    def one_positive(distance: Tensor, column: Tensor) -> Tensor:
        losses = F.softplus(distance.gather(1, column) - distance)
        return torch.where(positive.gather(1, column) & negative, losses, 0).sum(1)

    positives_first = positive.long().argsort(dim=1, descending=True)
    total = distance.new_zeros(len(distance))
    for place in range(int(positive.sum(1).max())):
        column = positives_first[:, place : place + 1]
        # Keeping every positive's (anchors, columns) for the backward pass would be a batch^3 tensor after all.
        total = total + checkpoint(one_positive, distance, column, use_reentrant=False, preserve_rng_state=False)
    return total


def reduce_triplets(triplets: Triplets, reduction: str, gather: bool = True) -> Tensor:
    """One value from the anchors' triplets, over all workers.

    Args:
        triplets: local anchors' sums and counts.
        reduction: ``sum`` over triplets (the paper's), ``mean_all`` over triplets, ``mean_active`` over those with a
            loss above 0, or ``none``: each anchor's sum, ``(anchors,)``.
        gather: whether the other workers' triplets count.

    Returns:
        A scalar whose mean over workers is the global value, 0 where there is no (active) triplet.
    """
    if reduction == "none":
        return triplets.losses
    total = triplets.losses.sum()
    if reduction == "sum":
        return total * (collectives.world_size() if gather else 1)
    count = triplets.count if reduction == "mean_all" else triplets.active
    return global_mean(total, count.sum(), gather)
