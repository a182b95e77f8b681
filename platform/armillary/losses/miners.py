"""Miners: which triplets, and which pairs, of a block count. They see values, never gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from armillary.losses.blocks import Block, Partners


@dataclass(frozen=True)
class Mined:
    """Chosen triplets of each anchor, ``(rows, most)`` each: the columns of both others, and which places are taken."""

    positive: Tensor
    negative: Tensor
    taken: Tensor


# They compare the distances of one anchor, so that any order of them serves.


def mine_semi_hard(order: Tensor, block: Block) -> Mined:
    """For every pair (a, p) the nearest negative farther than p; the farthest negative where there is none.

    Schroff et al. 2015 ask for a negative inside the margin; one outside it has loss 0 all the same.
    """
    partners = block.partners
    key, column = order.masked_fill(~block.negative, torch.inf).sort(dim=1)
    last = block.negative.sum(dim=1, keepdim=True) - 1
    nearest_farther = torch.searchsorted(key, partners.of(order, 0.0), right=True)
    place = torch.minimum(nearest_farther, last).clamp_min(0)
    return Mined(partners.columns, column.gather(1, place), partners.taken & (last >= 0))


def mine_batch_hard(order: Tensor, block: Block) -> Mined:
    """One triplet an anchor: its farthest positive, its nearest negative. Hermans et al. 2017, arXiv 1703.07737."""
    every = mine_hard_negative(order, block)
    farthest = block.partners.of(order, -torch.inf).argmax(dim=1, keepdim=True)
    return Mined(*(places.gather(1, farthest) for places in (every.positive, every.negative, every.taken)))


def mine_hard_negative(order: Tensor, block: Block) -> Mined:
    """For every pair (a, p) the negative nearest to a."""
    partners = block.partners
    nearest, column = order.masked_fill(~block.negative, torch.inf).min(dim=1, keepdim=True)
    return Mined(partners.columns, column.expand_as(partners.columns), partners.taken & (nearest < torch.inf))


Miner = Callable[[Tensor, Block], Mined]
TRIPLETS: dict[str, Miner] = {
    "semi_hard": mine_semi_hard,
    "batch_hard": mine_batch_hard,
    "hard_negative": mine_hard_negative,
}
MINERS = ("all", *TRIPLETS, "multi_similarity")


def chosen_pairs(mining: str, distance: Tensor, block: Block, epsilon: float) -> Block:
    """The block with those pairs alone that count.

    A miner of triplets keeps the positives and the negatives of the triplets that it chooses.

    Args:
        mining: ``all``, a miner of triplets, or ``multi_similarity``: of each anchor the positives farther than its
            nearest negative, and the negatives nearer than its farthest positive, both by up to ``epsilon``.
        distance: ``(rows, columns)``, of the block's anchors from its columns, without gradient.
        block: what is chosen from.
        epsilon: slack of ``multi_similarity``, in the unit of the distance.
    """
    if mining == "all":
        return block
    if mining == "multi_similarity":
        near = block.partners.of(distance, -torch.inf)
        far = distance.masked_fill(~block.negative, torch.inf)
        # An anchor without the one kind keeps none of the other.
        positive = near > far.amin(dim=1, keepdim=True) - epsilon
        return block.choose(Partners(block.partners.columns, positive), far < near.amax(dim=1, keepdim=True) + epsilon)
    mined = TRIPLETS[mining](distance, block)
    times = torch.zeros_like(distance).scatter_add_(1, mined.negative, mined.taken.to(distance.dtype))
    return block.choose(Partners(mined.positive, mined.taken), times > 0)
