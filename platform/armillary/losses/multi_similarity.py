"""Multi-similarity loss: each anchor's hard positives and negatives, weighted by how they compare with each other."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.nn import functional as F

from armillary.losses.blocks import Block
from armillary.losses.slopes import empty_logit, exponentials_, with_slope
from armillary.losses.tuples import Terms, TupleLoss


class MultiSimilarity(TupleLoss):
    """Multi-similarity loss with its miner. X. Wang et al., CVPR 2019, arXiv 1904.06627.

    With S the cosines, for every anchor i of the batch of size B::

        P_i = positives p with S_ip < max_n S_in + epsilon,    N_i = negatives n with S_in > min_p S_ip - epsilon
        L   = 1/B sum_i  1/alpha log(1 + sum_{p in P_i} exp(-alpha (S_ip - lam)))
                       + 1/beta  log(1 + sum_{n in N_i} exp( beta (S_in - lam)))

    An anchor without any positive or any negative in the batch is left out of the sum, but not of B. The paper's text
    sets lam = 1, its code 0.5 (and beta 40). That code also drops an anchor when one of its mined sets is empty; here
    the other set still counts, as the formula says.

    Args:
        alpha: sharpness over positives, above 0 to 1000.
        beta: sharpness over negatives, above 0 to 1000.
        lam: the cosine that both are measured from, -1 to 1.
        epsilon: slack of the miner, a difference of cosines, 0 or more.
        reduction: ``mean_all`` over the batch, ``mean_active`` over anchors with a loss, ``sum`` or ``none``.
        gather: see the other workers' samples.
        similarity: what S is: ``cosine``, or ``euclidean``: 1 - the distance of unit vectors.
        mining: which pairs count, the paper's ``multi_similarity``, ``all``, or as of
            :class:`~armillary.losses.tuples.TupleLoss`.

    Raises:
        ValueError: an unknown option or one out of range; in ``forward`` a wrong shape.
    """

    unit: ClassVar[str] = "anchors"

    def __init__(
        self,
        alpha: float = 2.0,
        beta: float = 50.0,
        lam: float = 0.5,
        epsilon: float = 0.1,
        reduction: str = "mean_all",
        gather: bool = True,
        similarity: str = "cosine",
        mining: str = "multi_similarity",
    ) -> None:
        super().__init__(True, reduction, gather, similarity, mining, epsilon)
        if not (alpha > 0 and beta > 0):
            raise ValueError(f"alpha and beta must be above 0, found {alpha} and {beta}")
        self.alpha, self.beta, self.lam = alpha, beta, lam

    def terms(self, block: Block) -> Terms:
        """One term an anchor."""
        # Far as D = 1 - S, which miners compare.
        distance, middle = self.distance.matrix(block.anchors, block.columns), 1 - self.lam
        with torch.no_grad():
            empty = empty_logit(distance.dtype)
            block = self.chosen(block, distance)
            slope = torch.add(distance.new_tensor(self.beta * middle), distance, alpha=-self.beta)
            push, scale = exponentials_(slope.masked_fill_(~block.negative, empty))
            # A miner leaves both kinds or none.
            whole = block.partners.taken.any(dim=1) & (push > empty / 2)
            push, scale = push.where(whole, empty), scale.where(whole, 0)
        positive = block.partners.taken & whole[:, None]
        near = block.partners.of(distance, 0.0)
        pull = (self.alpha * (near - middle)).masked_fill(~positive, empty).logsumexp(dim=1)
        # log(1 + e^x) of a log-sum-exp adds 1 to the sum.
        push = with_slope(distance, push, slope, scale * -self.beta)
        losses = F.softplus(pull) / self.alpha + F.softplus(push) / self.beta
        return Terms(losses, torch.ones_like(losses, dtype=torch.long), (losses > 0).long())
