"""Lifted structure loss: every positive pair against the negatives of both its ends."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from armillary.losses.blocks import Block, against_batch
from armillary.losses.similarities import Distance
from armillary.losses.slopes import empty_logit, log_sum_exp_
from armillary.losses.tensors import check_choice
from armillary.losses.tuples import Terms, TupleLoss


class LiftedStructure(TupleLoss):
    """Lifted structured feature embedding. Oh Song et al., CVPR 2016, arXiv 1511.06452.

    With D_ij = |f_i - f_j| and N(i) the samples of other labels than i's, over the unordered positive pairs P::

        J_ij = log( sum_{k in N(i)} exp(alpha - D_ik) + sum_{l in N(j)} exp(alpha - D_jl) ) + D_ij
        L    = 1 / (2 |P|) sum_{(i, j) in P} max(0, J_ij)^2

    ``formulation="survey"`` is the sum over P of the logarithm alone, of squared distances: without the attraction
    D_ij, the hinge and the mean. Nothing then holds raw embeddings together; use it with ``normalize``.

    Args:
        alpha: the margin, a distance; 0 to 10.
        normalize: compare unit vectors; the paper compares raw ones.
        formulation: ``paper`` or ``survey``.
        reduction: ``mean_all`` (the paper's), ``mean_active`` over pairs with a loss, ``sum`` over pairs, ``none``:
            each sample's sum, ``(batch,)``. The survey's formulation is a sum.
        gather: see the other workers' samples.
        similarity: what D is: ``euclidean``, ``cosine`` or ``dot``; see :class:`~armillary.losses.tuples.TupleLoss`.
        mining: which positive pairs count, and which negatives of each end; ``all`` in the paper.
        epsilon: slack of the miner ``multi_similarity``, in the unit of D.

    Raises:
        ValueError: an unknown option, a negative alpha; in ``forward`` a wrong shape.
    """

    seen: ClassVar[int] = 2

    def __init__(
        self,
        alpha: float = 1.0,
        normalize: bool = False,
        formulation: str = "paper",
        reduction: str | None = None,
        gather: bool = True,
        similarity: str = "euclidean",
        mining: str = "all",
        epsilon: float = 0.1,
    ) -> None:
        check_choice("formulation", formulation, ("paper", "survey"))
        by_default = "mean_all" if formulation == "paper" else "sum"
        super().__init__(normalize, reduction or by_default, gather, similarity, mining, epsilon)
        if not alpha >= 0:
            raise ValueError(f"alpha must be at least 0, found {alpha}")
        self.alpha, self.formulation = alpha, formulation
        self.distance = Distance(similarity, squared=formulation == "survey")

    def negatives(self, block: Block) -> tuple[Tensor, ...]:
        """``log sum_{k in N(i)} exp(alpha - D_ik)`` of some anchors, ``(rows, 1)``."""
        distance = self.distance.matrix(block.anchors, block.columns)
        negative = self.chosen(block, distance.detach()).negative
        logits = (self.alpha - distance).masked_fill(~negative, empty_logit(distance.dtype))
        return (log_sum_exp_(logits)[:, None],)

    def terms(self, block: Block) -> Terms:
        """The positive pairs of some anchors; the last element of each vector is what :meth:`negatives` gave for it."""
        (anchors, own), (columns, others) = (
            (vectors[:, :-1], vectors[:, -1]) for vectors in (block.anchors, block.columns)
        )
        partners = self.chosen(replace(block, anchors=anchors, columns=columns)).partners
        pairs = torch.logaddexp(own[:, None], others[partners.columns])
        losses = pairs
        if self.formulation == "paper":
            distance = self.distance.matrix(anchors, columns).gather(1, partners.columns)
            losses = 0.5 * F.relu(pairs + distance).square()
        # A pair whose both ends have no negatives is left out.
        taken = partners.taken & (pairs > empty_logit(pairs.dtype) / 2)
        losses = losses.masked_fill(~taken, 0)
        return Terms(losses.sum(1), taken.sum(1), (losses != 0).sum(1))

    def prepare(self, vectors: Tensor, labels: Tensor, apart: Tensor | None) -> Tensor:
        """The vectors, each with the log-sum-exp over its negatives as a further element."""
        (negatives,) = against_batch(self.negatives, vectors, labels, self.gather, eager=False, labels=apart)
        return torch.cat([vectors, negatives], dim=1)
