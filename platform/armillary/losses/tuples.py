"""Parts of losses over pairs and tuples: distances, miners, hinges over triplets, reductions, the losses' base.

A loss is a distance or similarity, a selection of tuples, a function of each, and a reduction. The first three see a
:class:`~armillary.losses.blocks.Block` of this worker's anchors against all workers' samples, so that nothing of the
size of the whole matrix is kept, let alone of anchors x columns x columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from armillary import collectives
from armillary.losses.blocks import Block, against_batch
from armillary.losses.global_batch import global_mean, global_sum
from armillary.losses.slopes import empty_logit, with_slope
from armillary.losses.tensors import check_choice, check_embeddings, float32_math, normalize, not_a_number_guard

# Smallest squared distance under a root: its slope is infinite at 0.
SQUARED_FLOOR = 1e-12
REDUCTIONS = ("mean_active", "mean_all", "sum", "none")


@dataclass(frozen=True)
class Terms:
    """Per anchor, ``(anchors,)``: the sum of its tuples' losses, how many tuples, how many of them active.

    A tuple is active when its loss is above 0. ``(anchors, parts)`` where parts are averaged apart and then added.
    """

    losses: Tensor
    count: Tensor
    active: Tensor


@dataclass(frozen=True)
class Mined:
    """Chosen triplets of each anchor, ``(rows, most)`` each: the columns of both others, and which places are taken."""

    positive: Tensor
    negative: Tensor
    taken: Tensor


# Distances and similarities.


def cosine(anchors: Tensor, columns: Tensor) -> Tensor:
    """Inner products ``(anchors, columns)``: cosines where the rows have unit length."""
    return anchors @ columns.T


def euclidean(anchors: Tensor, columns: Tensor, squared: bool) -> Tensor:
    """Distances ``(anchors, columns)`` between rows; equal rows get 0 with zero gradient.

    Args:
        anchors: ``(anchors, dim)``.
        columns: ``(columns, dim)``.
        squared: the square, which on the unit sphere is ``2 - 2 cos``.
    """
    square = torch.addmm(columns.square().sum(1)[None, :], anchors, columns.T, alpha=-2)
    square = (square + anchors.square().sum(1)[:, None]).clamp_min(0)
    return square if squared else root(square)


def root(square: Tensor) -> Tensor:
    """The root of squared distances; 0 has zero gradient."""
    return torch.where(square > SQUARED_FLOOR, square.clamp_min(SQUARED_FLOOR).sqrt(), 0)


@dataclass(frozen=True)
class Distance:
    """A distance D between vectors.

    Args:
        squared: D^2 in place of D.
        cosine: D = 1 - cos, of unit vectors (half the squared distance), in place of D = |a - c|.
    """

    squared: bool = True
    cosine: bool = False

    def matrix(self, anchors: Tensor, columns: Tensor) -> Tensor:
        """Of all ``anchors (rows, dim)`` from all ``columns (columns, dim)``, ``(rows, columns)``."""
        if self.cosine:
            away = 1 - cosine(anchors, columns)
            return away.square() if self.squared else away
        return euclidean(anchors, columns, self.squared)

    def paired(self, left: Tensor, right: Tensor) -> Tensor:
        """Of vectors ``(..., dim)`` from their counterparts, ``(...)``."""
        if self.cosine:
            away = 1 - (left * right).sum(-1)
            return away.square() if self.squared else away
        square = (left - right).square().sum(-1)
        return square if self.squared else root(square)

    def order(self, anchors: Tensor, columns: Tensor) -> Tensor:
        """A matrix without gradient that sorts each anchor's columns as the distance does, in one product."""
        with torch.no_grad():
            lengths = columns.new_zeros(1, 1) if self.cosine else columns.square().sum(1)[None, :]
            return torch.addmm(lengths, anchors, columns.T, alpha=-2)


# Miners: which triplets of a block count. They compare the distances of one anchor, so that any order of them serves.


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
MINERS: dict[str, Miner] = {
    "semi_hard": mine_semi_hard,
    "batch_hard": mine_batch_hard,
    "hard_negative": mine_hard_negative,
}


# Losses of triplets.


def hinge(difference: Tensor, margin: float, soft: bool) -> Tensor:
    """``[difference + margin]_+``, or ``log(1 + exp(difference))``, which has no margin."""
    return F.softplus(difference) if soft else F.relu(difference + margin)


def mined_triplets(distance: Distance, mining: str, block: Block, margin: float, soft: bool) -> Terms:
    """The losses of the triplets that a miner chooses; only the chosen ones are evaluated with gradient."""
    mined = MINERS[mining](distance.order(block.anchors, block.columns), block)
    if mined.taken.shape[1] == 1:
        near, far = (
            distance.paired(block.anchors, block.columns[columns.squeeze(1)])[:, None]
            for columns in (mined.positive, mined.negative)
        )
    else:
        matrix = distance.matrix(block.anchors, block.columns)
        near, far = matrix.gather(1, mined.positive), matrix.gather(1, mined.negative)
    losses = hinge(near - far, margin, soft).masked_fill(~mined.taken, 0)
    return Terms(losses.sum(1), mined.taken.sum(1), (losses > 0).sum(1))


def all_triplets(distance: Distance, block: Block, margin: float, soft: bool) -> Terms:
    """The losses of every (a, p, n), without enumerating them.

    Summed over p and n, a loss of ``D_ap - D_an`` has the derivative ``k_p`` by ``D_ap`` and ``-w_n`` by ``D_an``: its
    slopes summed over the other index.
    """
    matrix = distance.matrix(block.anchors, block.columns)
    with torch.no_grad():
        weigh = _soft_weights if soft else _hinge_weights
        values, of_positives, slope, active = weigh(matrix.detach(), block, margin)
        # Positives and negatives are different columns.
        slope.neg_().scatter_add_(1, block.partners.columns, of_positives)
    losses = with_slope(matrix, values, slope)
    return Terms(losses, block.partners.taken.sum(1) * block.negative.sum(1), active)


def _hinge_weights(distance: Tensor, block: Block, margin: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum of ``[D_ap - D_an + m]_+``, and how many hinges of each positive and of each negative are open.

    With the thresholds ``t_p = D_ap + m`` in ascending order, the place of D_an among them says which are open: one
    binary search among the few positives for every negative, and a histogram of the places.
    """
    threshold, rank = (block.partners.of(distance, -torch.inf) + margin).sort(dim=1)
    most = threshold.shape[1]
    place = torch.searchsorted(threshold, distance.contiguous(), right=True).masked_fill_(~block.negative, most)
    of_negatives = (most - place).to(distance.dtype)
    histogram = distance.new_zeros(len(distance), most + 1)
    histogram.scatter_add_(1, place, distance.new_ones(()).expand_as(distance))
    opened = histogram[:, :most].cumsum(1).masked_fill(threshold == -torch.inf, 0)
    values = (opened * threshold.masked_fill(threshold == -torch.inf, 0)).sum(1) - (distance * of_negatives).sum(1)
    of_positives = torch.zeros_like(opened).scatter_(1, rank, opened)
    return values.clamp_min(0), of_positives, of_negatives, opened.sum(1).long()


def _soft_weights(distance: Tensor, block: Block, _margin: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum of ``log(1 + exp(D_ap - D_an))`` and its slopes, one positive of every anchor at a time."""
    partners, absent = block.partners, empty_logit(distance.dtype)
    values, of_negatives = torch.zeros_like(distance[:, 0]), torch.zeros_like(distance)
    of_positives = torch.zeros_like(partners.columns, dtype=distance.dtype)
    for number, near in enumerate(partners.of(distance, absent).unbind(1)):
        difference = (near[:, None] - distance).masked_fill_(~block.negative, absent)
        values += F.softplus(difference).sum(1)
        slope = difference.sigmoid_()
        of_positives[:, number] = slope.sum(1)
        of_negatives += slope
    return values, of_positives, of_negatives, partners.taken.sum(1) * block.negative.sum(1)


# Reduction.


def reduce_terms(terms: Terms, reduction: str, gather: bool = True, seen: int = 1) -> Tensor:
    """One value from the anchors' tuples, over all workers.

    Args:
        terms: local anchors' sums and counts.
        reduction: ``sum`` over tuples, ``mean_all`` over tuples, ``mean_active`` over those with a loss above 0, or
            ``none``: each anchor's sum, ``(anchors,)``.
        gather: whether the other workers' tuples count.
        seen: how many anchors see the same tuple; a pair is seen from both ends.

    Returns:
        A scalar whose mean over workers is the global value, 0 where there is no (active) tuple.
    """
    if reduction == "none":
        return terms.losses if terms.losses.ndim == 1 else terms.losses.sum(1)
    if reduction == "sum":
        return terms.losses.sum() * ((collectives.world_size() if gather else 1) / seen)
    if reduction == "mean_all":
        return global_mean(terms.losses.sum(), terms.count.sum(), gather)
    return global_mean(terms.losses.sum(0), terms.active.sum(0), gather).sum()


class TupleLoss(nn.Module):
    """Base of the losses over a batch's pairs, triplets and larger tuples; a subclass defines :meth:`terms`.

    Args:
        normalize: bring the embeddings to unit length first.
        reduction: ``mean_active``, ``mean_all``, ``sum`` or ``none``; see :func:`reduce_terms`.
        gather: see the other workers' samples.

    Raises:
        ValueError: an unknown option; in ``forward`` a wrong shape.
    """

    unit: ClassVar[str] = "pairs"
    # How many anchors see one tuple.
    seen: ClassVar[int] = 1
    # Whether the reduction weighs all anchors' losses alike, so that their gradient can be taken at once.
    uniform: ClassVar[bool] = True

    def __init__(self, normalize: bool = True, reduction: str = "mean_all", gather: bool = True) -> None:
        super().__init__()
        check_choice("reduction", reduction, REDUCTIONS)
        self.normalize, self.reduction, self.gather = normalize, reduction, gather

    def terms(self, block: Block) -> Terms:
        """The tuples of some anchors."""
        raise NotImplementedError(f"{type(self).__name__} does not define terms")

    def prepare(self, vectors: Tensor, labels: Tensor, apart: Tensor | None) -> Tensor:
        """What stands for each sample in the blocks, ``(batch, ...)``: its vector, and what else pairs must know."""
        return vectors

    def extra_repr(self) -> str:
        """The options, for ``print(loss)``."""
        shown = {key: value for key, value in vars(self).items() if isinstance(value, (int, float, str))}
        return ", ".join(f"{key}={value}" for key, value in shown.items() if key[0] != "_" and key != "training")

    @float32_math
    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        apart: Tensor | None = None,
        metrics: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """The loss of the batch.

        Args:
            embeddings: ``(batch, dim)``.
            labels: ``(batch,)`` integers: samples of equal label are positives of each other.
            apart: ``(batch,)`` integers where not every other label is a negative: samples of equal ``apart`` are none.
            metrics: receives the number of tuples (``pairs``, ``triplets`` or ``anchors``), how many are ``active``
                (their loss is above 0), ``active_share``, ``empty`` (1 for a batch without an active one) and
                ``positives_per_anchor``.

        Returns:
            A scalar, or ``(batch,)`` with ``reduction="none"``.
        """
        check_embeddings(embeddings, labels)
        anchors = self.prepare(normalize(embeddings) if self.normalize else embeddings, labels, apart)

        def of_block(block: Block) -> tuple[Tensor, ...]:
            found = self.terms(block)
            return found.losses, found.count, found.active, block.partners.taken.sum(1)

        eager = self.reduction != "none" and (self.uniform or self.reduction != "mean_active")
        losses, count, active, positives = against_batch(of_block, anchors, labels, self.gather, eager, apart)
        if metrics is not None:
            metrics.update(self.count(count, active, positives, embeddings.dtype))
        terms = Terms(losses, count, active)
        return reduce_terms(terms, self.reduction, self.gather, self.seen) + not_a_number_guard(embeddings)

    def count(self, count: Tensor, active: Tensor, positives: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """What there was to learn from, over all workers."""
        total, opened = (global_sum(given.sum(), self.gather).to(dtype) for given in (count, active))
        anchors = positives.new_tensor(len(positives))
        return {
            self.unit: total / self.seen,
            "active": opened / self.seen,
            "active_share": opened / total.clamp_min(1),
            "empty": (opened == 0).to(dtype),
            "positives_per_anchor": global_mean(positives.sum().to(dtype), anchors, self.gather),
        }
