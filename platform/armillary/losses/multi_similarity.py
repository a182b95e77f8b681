"""Multi-similarity loss: each anchor's hard positives and negatives, weighted by how they compare with each other."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.nn import functional as F

from armillary.losses.blocks import Block
from armillary.losses.slopes import empty_logit, exponentials_, with_slope
from armillary.losses.tuples import Terms, TupleLoss, cosine


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
        epsilon: slack of the miner, a difference of cosines, 0 or more; ``None`` mines nothing.
        reduction: ``mean_all`` over the batch, ``mean_active`` over anchors with a loss, ``sum`` or ``none``.
        gather: see the other workers' samples.

    Raises:
        ValueError: an unknown option or one out of range; in ``forward`` a wrong shape.
    """

    unit: ClassVar[str] = "anchors"

    def __init__(
        self,
        alpha: float = 2.0,
        beta: float = 50.0,
        lam: float = 0.5,
        epsilon: float | None = 0.1,
        reduction: str = "mean_all",
        gather: bool = True,
    ) -> None:
        super().__init__(True, reduction, gather)
        if not (alpha > 0 and beta > 0):
            raise ValueError(f"alpha and beta must be above 0, found {alpha} and {beta}")
        if epsilon is not None and not epsilon >= 0:
            raise ValueError(f"epsilon must be at least 0, found {epsilon}")
        self.alpha, self.beta, self.lam, self.epsilon = alpha, beta, lam, epsilon

    def terms(self, block: Block) -> Terms:
        """One term an anchor."""
        similarity, partners = cosine(block.anchors, block.columns), block.partners
        near = partners.of(similarity, torch.inf)
        with torch.no_grad():
            empty = empty_logit(similarity.dtype)
            far = similarity.masked_fill(~block.negative, empty)
            hardest_positive, hardest_negative = near.amin(dim=1, keepdim=True), far.amax(dim=1, keepdim=True)
            whole = (hardest_positive < torch.inf) & (hardest_negative > empty)
            positive, dropped = partners.taken & whole, ~whole
            if self.epsilon is not None:
                positive &= near < hardest_negative + self.epsilon
                dropped = dropped | (far <= hardest_positive - self.epsilon)
            push, scale = exponentials_(far.sub_(self.lam).mul_(self.beta).masked_fill_(dropped, empty))
        pull = (self.alpha * (self.lam - near)).masked_fill(~positive, empty).logsumexp(dim=1)
        # log(1 + e^x) of a log-sum-exp adds 1 to the sum.
        push = with_slope(similarity, push, far, scale * self.beta)
        losses = F.softplus(pull) / self.alpha + F.softplus(push) / self.beta
        return Terms(losses, torch.ones_like(losses, dtype=torch.long), (losses > 0).long())
