"""Parts of losses over pairs and tuples: hinges over triplets, reductions, the losses' base.

A loss is a distance or similarity (:mod:`armillary.losses.similarities`), a selection of tuples
(:mod:`armillary.losses.miners`), a function of each, and a reduction: parts that combine freely. The first three see a
:class:`~armillary.losses.blocks.Block` of this worker's anchors against all workers' samples, so that nothing of the
size of the whole matrix is kept, let alone of anchors x columns x columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from armillary import collectives
from armillary.losses.blocks import Block, against_batch
from armillary.losses.global_batch import global_mean, global_sum
from armillary.losses.miners import MINERS, TRIPLETS, chosen_pairs
from armillary.losses.similarities import SIMILARITIES, Distance
from armillary.losses.slopes import empty_logit, with_slope
from armillary.losses.tensors import check_choice, check_embeddings, float32_math, normalize, not_a_number_guard

REDUCTIONS = ("mean_active", "mean_all", "sum", "none")


@dataclass(frozen=True)
class Terms:
    """Per anchor, ``(anchors,)``: the sum of its tuples' losses, how many tuples, how many of them active.

    A tuple is active when its loss is above 0. ``(anchors, parts)`` where parts are averaged apart and then added.
    """

    losses: Tensor
    count: Tensor
    active: Tensor


# Losses of triplets.


def hinge(difference: Tensor, margin: float, soft: bool) -> Tensor:
    """``[difference + margin]_+``, or ``log(1 + exp(difference))``, which has no margin."""
    return F.softplus(difference) if soft else F.relu(difference + margin)


def mined_triplets(distance: Distance, mining: str, block: Block, margin: float, soft: bool) -> Terms:
    """The losses of the triplets that a miner chooses; only the chosen ones are evaluated with gradient."""
    mined = TRIPLETS[mining](distance.order(block.anchors, block.columns), block)
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


def check_parts(similarity: str, mining: str, epsilon: float) -> None:
    """Raises ``ValueError`` for a part that does not exist."""
    check_choice("similarity", similarity, SIMILARITIES)
    check_choice("mining", mining, MINERS)
    if not epsilon >= 0:
        raise ValueError(f"epsilon must be at least 0, found {epsilon}")


class TupleLoss(nn.Module):
    """Base of the losses over a batch's pairs, triplets and larger tuples; a subclass defines :meth:`terms`.

    Args:
        normalize: bring the embeddings to unit length first; ``cosine`` does in any case.
        reduction: ``mean_active``, ``mean_all``, ``sum`` or ``none``; see :func:`reduce_terms`.
        gather: see the other workers' samples.
        similarity: ``euclidean``, ``cosine`` or ``dot``; see :class:`~armillary.losses.similarities.Distance`.
        mining: ``all``, ``semi_hard``, ``batch_hard``, ``hard_negative`` or ``multi_similarity``; see
            :func:`~armillary.losses.miners.chosen_pairs`. A miner chooses for each anchor: a pair that one of its ends
            alone chose counts half.
        epsilon: slack of the miner ``multi_similarity``, a difference of distances, 0 or more.

    Raises:
        ValueError: an unknown option; in ``forward`` a wrong shape.
    """

    unit: ClassVar[str] = "pairs"
    # How many anchors see one tuple.
    seen: ClassVar[int] = 1
    # Whether the reduction weighs all anchors' losses alike, so that their gradient can be taken at once.
    uniform: ClassVar[bool] = True

    def __init__(
        self,
        normalize: bool = True,
        reduction: str = "mean_all",
        gather: bool = True,
        similarity: str = "euclidean",
        mining: str = "all",
        epsilon: float = 0.1,
    ) -> None:
        super().__init__()
        check_choice("reduction", reduction, REDUCTIONS)
        check_parts(similarity, mining, epsilon)
        self.distance = Distance(similarity)
        self.normalize, self.reduction, self.gather = normalize or self.distance.of_units, reduction, gather
        self.similarity, self.mining, self.epsilon = similarity, mining, epsilon

    @torch.no_grad()
    def chosen(self, block: Block, distance: Tensor | None = None) -> Block:
        """The block with the pairs that the miner chooses; by its ``distance (rows, columns)``, if that is there."""
        if self.mining == "all":
            return block
        if distance is None:
            distance = self.distance.matrix(block.anchors, block.columns)
        return chosen_pairs(self.mining, distance, block, self.epsilon)

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
