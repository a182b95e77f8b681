"""Losses of pairs: similar ones drawn together, dissimilar ones pushed beyond a margin."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from armillary.losses.blocks import Block
from armillary.losses.similarities import Distance, root
from armillary.losses.tensors import check_choice, check_embeddings, float32_math, normalize, not_a_number_guard
from armillary.losses.tuples import REDUCTIONS, Terms, TupleLoss, reduce_terms


def similar_loss(square: Tensor) -> Tensor:
    """``D^2 / 2`` of squared distances."""
    return 0.5 * square


def dissimilar_loss(square: Tensor, margin: float) -> Tensor:
    """``max(0, m - D)^2 / 2`` of squared distances; where D = 0 the loss is ``m^2 / 2`` and has no direction."""
    return 0.5 * F.relu(margin - root(square)).square()


class Contrastive(TupleLoss):
    """Contrastive loss over all pairs of a batch. Hadsell, Chopra, LeCun, CVPR 2006, doi 10.1109/CVPR.2006.100.

    ::

        L = sum_{i<j} 1/2 D_ij^2            where the labels are equal
                      1/2 max(0, m - D_ij)^2   where they differ,        D_ij = |f_i - f_j|

    The paper calls similar pairs Y = 0 and sums over a list of pairs; :class:`ContrastivePairs` takes such a list.
    Without the halves, as it is sometimes printed, it is twice this: nothing that a learning rate does not say.

    Args:
        margin: m > 0, a distance; below 2 for unit vectors.
        normalize: compare unit vectors; the paper compares raw outputs.
        reduction: ``mean_all`` over all pairs; ``mean_active``: the mean over similar pairs plus the mean over
            dissimilar ones nearer than the margin; ``sum`` (the paper's); ``none``: each sample's sum, ``(batch,)``,
            which sees every pair from both ends.
        gather: see the other workers' samples.
        similarity: what D is: ``euclidean``, ``cosine`` or ``dot``; see :class:`~armillary.losses.tuples.TupleLoss`.
        mining: which pairs count, ``all`` in the paper, or as of :class:`~armillary.losses.tuples.TupleLoss`.
        epsilon: slack of the miner ``multi_similarity``, a distance.

    Raises:
        ValueError: an unknown option, a margin that is not above 0; in ``forward`` a wrong shape.
    """

    seen: ClassVar[int] = 2
    uniform: ClassVar[bool] = False

    def __init__(
        self,
        margin: float = 1.0,
        normalize: bool = False,
        reduction: str = "mean_all",
        gather: bool = True,
        similarity: str = "euclidean",
        mining: str = "all",
        epsilon: float = 0.1,
    ) -> None:
        super().__init__(normalize, reduction, gather, similarity, mining, epsilon)
        _check_margin(margin)
        self.margin = margin

    def terms(self, block: Block) -> Terms:
        """The pairs of some anchors; similar and dissimilar ones are averaged apart."""
        square = Distance(self.similarity, squared=True).matrix(block.anchors, block.columns)
        block = self.chosen(block)
        similar = similar_loss(block.partners.of(square, 0.0))
        dissimilar = dissimilar_loss(square, self.margin).masked_fill(~block.negative, 0)
        count = torch.stack([block.partners.taken.sum(1), block.negative.sum(1)], dim=1)
        # A similar pair counts whether it costs something or not, as the mean over similar pairs wants it.
        active = torch.stack([count[:, 0], (dissimilar > 0).sum(1)], dim=1)
        return Terms(torch.stack([similar.sum(1), dissimilar.sum(1)], dim=1), count, active)

    def count(self, count: Tensor, active: Tensor, positives: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """As of any tuple loss, with the dissimilar pairs inside the margin as ``active_negatives``."""
        counted = super().count(count, active, positives, dtype)
        negatives = super().count(count[:, 1], active[:, 1], positives, dtype)["active"]
        return {**counted, "active_negatives": negatives}


class ContrastivePairs(nn.Module):
    """Contrastive loss over a list of pairs, in either convention of what the label of a pair means.

    The formula of :class:`Contrastive`. The paper writes Y = 0 for similar and Y = 1 for dissimilar pairs; most
    programs since then write 1 for similar.

    Args:
        margin: m > 0, a distance.
        similar_is: the label of a similar pair, 0 (the paper's) or 1.
        normalize: compare unit vectors.
        reduction: ``mean_all`` over pairs, ``sum`` (the paper's), ``mean_active`` as of :class:`Contrastive`, or
            ``none``: the pairs' losses, ``(pairs,)``.

    Raises:
        ValueError: an unknown option, a margin that is not above 0; in ``forward`` a wrong shape or a label that is
            neither 0 nor 1.
    """

    def __init__(
        self, margin: float = 1.0, similar_is: int = 0, normalize: bool = False, reduction: str = "mean_all"
    ) -> None:
        super().__init__()
        check_choice("reduction", reduction, REDUCTIONS)
        _check_margin(margin)
        if similar_is not in (0, 1):
            raise ValueError(f"similar_is must be 0 or 1, found {similar_is!r}")
        self.margin, self.similar_is, self.normalize, self.reduction = margin, similar_is, normalize, reduction

    @float32_math
    def forward(self, left: Tensor, right: Tensor, pair_labels: Tensor) -> Tensor:
        """The loss of pairs ``left, right (pairs, dim)`` with ``pair_labels (pairs,)``, 0 or 1, over all workers."""
        check_embeddings(left, pair_labels)
        if left.shape != right.shape:
            raise ValueError(f"the pairs' sides differ in shape: {tuple(left.shape)} and {tuple(right.shape)}")
        strange = (pair_labels != 0) & (pair_labels != 1)
        if bool(strange.any()):
            raise ValueError(f"pair labels must be 0 or 1, found {int(pair_labels[strange][0])}")
        guard = not_a_number_guard(left) + not_a_number_guard(right)
        if self.normalize:
            left, right = normalize(left), normalize(right)
        square, similar = (left - right).square().sum(1), pair_labels == self.similar_is
        costs = torch.stack([similar_loss(square), dissimilar_loss(square, self.margin)], dim=1)
        count = torch.stack([similar, ~similar], dim=1)
        losses = torch.where(count, costs, 0)
        active = torch.stack([similar, losses[:, 1] > 0], dim=1)
        return reduce_terms(Terms(losses, count.long(), active.long()), self.reduction) + guard


def _check_margin(margin: float) -> None:
    if not margin > 0:
        raise ValueError(f"margin must be above 0, found {margin}")
