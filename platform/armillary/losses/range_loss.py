"""Range loss: the widest distances inside classes against the distance between their centres."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from armillary.losses.blocks import Block
from armillary.losses.global_batch import global_rows
from armillary.losses.miners import chosen_pairs
from armillary.losses.similarities import SQUARED_FLOOR, Distance
from armillary.losses.tensors import check_choice, check_embeddings, float32_math, normalize, not_a_number_guard
from armillary.losses.tuples import check_parts


@dataclass(frozen=True)
class Classes:
    """The samples of a batch by class: ``members (classes, most)``, and which of these places are ``taken``."""

    members: Tensor
    taken: Tensor

    @classmethod
    def of(cls, labels: Tensor) -> Classes:
        """Of ``labels (samples,)``, in ascending order; members in the order in which they stand."""
        _, number, count = labels.unique(return_inverse=True, return_counts=True)
        by_class = number.argsort(stable=True)
        place = torch.arange(len(labels), device=labels.device) - (count.cumsum(0) - count)[number[by_class]]
        members = by_class.new_zeros(len(count), int(count.max()))
        members[number[by_class], place] = by_class
        return cls(members, torch.arange(members.shape[1], device=labels.device) < count[:, None])

    def centres(self, vectors: Tensor) -> Tensor:
        """Mean of each class' vectors, ``(classes, dim)``."""
        taken = self.taken[:, :, None]
        return (vectors[self.members] * taken).sum(1) / taken.sum(1)


class RangeLoss(nn.Module):
    """Range loss: a term beside a classification loss. X. Zhang et al., ICCV 2017, arXiv 1611.08976.

    With D = |x_a - x_b|^2 of raw features, D_1 ... D_k the k widest pairs of a class (its ranges), and Q, R the two
    classes of the batch whose centres are nearest::

        L_intra = sum over classes of  k / sum_j 1 / D_j
        L_inter = max(0, m - |centre_Q - centre_R|^2)
        L       = alpha L_intra + beta L_inter

    A class with fewer than k pairs uses those it has, one without a pair adds nothing; a batch of one class has no
    L_inter. ``formulation="survey"`` is one hinge over the batch, of plain distances: the widest pair within a class
    minus the narrowest pair of two classes, plus m. The paper's own weights (5e-5, 1e-4) and margin (some 2e4) belong
    to unbounded features of a large network; these defaults suit features of length 1.

    Args:
        k: ranges of each class, 1 to 64.
        margin: m > 0, in the unit of the distances.
        alpha: weight of L_intra, 0 or more.
        beta: weight of L_inter, 0 or more.
        squared: squared distances, as in the paper, or plain ones, as in the program that is mostly copied.
        formulation: ``paper`` or ``survey``, which has neither k nor weights.
        gather: see the other workers' samples.
        similarity: ``euclidean``, or ``cosine``: D = 1 - cos, its square where ``squared``.
        mining: which pairs can be ranges (and, in the survey's hinge, the narrowest pair): those that a miner chooses
            from either end; ``all`` in the paper. See :func:`~armillary.losses.miners.chosen_pairs`.
        epsilon: slack of the miner ``multi_similarity``, in the unit of D.
        reduction: of L_intra over classes: ``sum`` (the paper's), ``mean_all`` over classes that have a range,
            ``mean_active`` over those whose ranges are not 0. The survey's has one term.

    Raises:
        ValueError: an unknown option or one out of range; in ``forward`` a wrong shape.
    """

    def __init__(
        self,
        k: int = 2,
        margin: float = 1.0,
        alpha: float = 0.5,
        beta: float = 0.5,
        squared: bool = True,
        formulation: str = "paper",
        gather: bool = True,
        similarity: str = "euclidean",
        mining: str = "all",
        epsilon: float = 0.1,
        reduction: str = "sum",
    ) -> None:
        super().__init__()
        check_parts(similarity, mining, epsilon)
        check_choice("similarity", similarity, ("euclidean", "cosine"))
        check_choice("reduction", reduction, ("mean_active", "mean_all", "sum"))
        check_choice("formulation", formulation, ("paper", "survey"))
        if k < 1:
            raise ValueError(f"k must be at least 1, found {k}")
        if not (margin > 0 and alpha >= 0 and beta >= 0):
            raise ValueError(
                f"margin must be above 0, alpha and beta at least 0, found margin {margin}, alpha {alpha}, beta {beta}"
            )
        self.k, self.margin, self.alpha, self.beta = k, margin, alpha, beta
        self.formulation, self.gather = formulation, gather
        self.distance = Distance(similarity, squared and formulation == "paper")
        self.mining, self.epsilon, self.reduction = mining, epsilon, reduction

    @float32_math
    def forward(self, embeddings: Tensor, labels: Tensor, *, metrics: dict[str, Tensor] | None = None) -> Tensor:
        """The loss of ``embeddings (batch, dim)`` with ``labels (batch,)``; every worker computes the whole of it.

        ``metrics`` receives ``intra`` and ``inter`` (of the survey's: the two distances), ``pairs`` (ranges that count)
        and ``empty`` (1 where neither term costs anything).
        """
        check_embeddings(embeddings, labels)
        vectors, keys = global_rows(embeddings, self.gather), global_rows(labels, self.gather)
        if self.distance.of_units:
            vectors = normalize(vectors)
        classes, (positive, negative) = Classes.of(keys), self._chosen(vectors, keys)
        if self.formulation == "paper":
            ranges, taken = self._ranges(vectors, classes, self.k, positive)
            intra, inter = self._harmonic(ranges, taken), self._inter(vectors, classes)
            loss = self.alpha * intra + self.beta * inter
        else:
            ranges, taken = self._ranges(vectors, classes, 1, positive)
            intra, inter = ranges.masked_fill(~taken, 0).max(), self._nearest(vectors, negative)
            both = taken.any() & torch.isfinite(inter.detach())
            inter = inter.nan_to_num(posinf=0.0)
            loss = torch.where(both, F.relu(intra - inter + self.margin), 0)
        if metrics is not None:
            metrics.update(intra=intra.detach(), inter=inter.detach(), pairs=taken.sum().to(loss.dtype))
            metrics["empty"] = (loss.detach() <= 0).to(loss.dtype)
        return loss + not_a_number_guard(vectors)

    @torch.no_grad()
    def _chosen(self, vectors: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Which pairs of one class count, and which of two: symmetric ``(samples, samples)``."""
        block = Block(vectors, vectors, keys, keys, keys, keys, slice(None), 0)
        if self.mining == "all":
            return block.positive, block.negative
        block = chosen_pairs(self.mining, self.distance.matrix(vectors, vectors), block, self.epsilon)
        partners, negative = block.partners, block.negative
        times = torch.zeros_like(negative, dtype=torch.long)
        positive = times.scatter_add_(1, partners.columns, partners.taken.long()) > 0
        return positive | positive.T, negative | negative.T

    def _ranges(self, vectors: Tensor, classes: Classes, k: int, positive: Tensor) -> tuple[Tensor, Tensor]:
        """The ``k`` widest pairs of each class, ``(classes, k)``, and which of them there are."""
        members, most = classes.members, classes.members.shape[1]
        left, right = torch.triu_indices(most, most, 1, device=members.device)
        if not len(left):
            return vectors.sum() * 0 + vectors.new_zeros(len(members), 1), classes.taken.new_zeros(len(members), 1)
        with torch.no_grad():
            of_class = vectors[members]
            wide = torch.cdist(of_class, of_class, compute_mode="donot_use_mm_for_euclid_dist")[:, left, right]
            counts = classes.taken[:, right] & positive[members[:, left], members[:, right]]
            wide = wide.masked_fill(~counts, -torch.inf)
            widest, pair = wide.topk(min(k, len(left)), dim=1)
        one, other = members.gather(1, left[pair]), members.gather(1, right[pair])
        return self.distance.paired(vectors[one], vectors[other]), widest > -torch.inf

    def _harmonic(self, ranges: Tensor, taken: Tensor) -> Tensor:
        """The harmonic mean of each class' ranges, reduced over classes."""
        inverse = (1 / ranges.clamp_min(SQUARED_FLOOR)).masked_fill(~taken, 0).sum(1)
        of_classes = taken.sum(1) / inverse.masked_fill(inverse == 0, 1)
        counts = {"sum": None, "mean_all": taken.any(1), "mean_active": of_classes > SQUARED_FLOOR}[self.reduction]
        return of_classes.sum() if counts is None else of_classes.sum() / counts.sum().clamp_min(1)

    def _inter(self, vectors: Tensor, classes: Classes) -> Tensor:
        centres = classes.centres(vectors)
        if self.distance.of_units:
            centres = normalize(centres)
        one, other = torch.triu_indices(len(centres), len(centres), 1, device=centres.device)
        if not len(one):
            return vectors.sum() * 0
        with torch.no_grad():
            nearest = torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist")[one, other].argmin()
        return F.relu(self.margin - self.distance.paired(centres[one[nearest]], centres[other[nearest]]))

    def _nearest(self, vectors: Tensor, negative: Tensor) -> Tensor:
        """The distance of the nearest two samples of different classes; infinite with one class."""
        with torch.no_grad():
            order = Distance(squared=True).matrix(vectors, vectors).masked_fill(~negative, torch.inf)
            pair = order.argmin()
            one, other = pair // len(vectors), pair % len(vectors)
            absent = torch.where(torch.isinf(order.min()), torch.inf, 0.0)
        return self.distance.paired(vectors[one], vectors[other]) + absent
