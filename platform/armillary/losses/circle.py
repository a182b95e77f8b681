"""Circle loss: similarities pulled and pushed with weights of their own, over pairs and over classes."""

from __future__ import annotations

from math import log
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from armillary.losses.blocks import Block, against_batch
from armillary.losses.class_head import ClassHeadLoss, Columns
from armillary.losses.global_batch import global_rows
from armillary.losses.slopes import empty_logit, exponentials_, with_slope
from armillary.losses.tensors import check_choice, check_embeddings, float32_math, normalize, not_a_number_guard
from armillary.losses.tuples import Terms, TupleLoss


def within(similarity: Tensor, margin: float) -> Tensor:
    """``alpha_p (s_p - Delta_p)`` with ``alpha_p = [1 + m - s_p]_+`` held constant and ``Delta_p = 1 - m``."""
    return F.relu(1 + margin - similarity.detach()) * (similarity - (1 - margin))


def between(similarity: Tensor, margin: float) -> Tensor:
    """``alpha_n (s_n - Delta_n)`` with ``alpha_n = [s_n + m]_+`` held constant and ``Delta_n = m``."""
    return F.relu(similarity.detach() + margin) * (similarity - margin)


class Circle(TupleLoss):
    """Circle loss over the pairs of a batch. Sun et al., CVPR 2020, arXiv 2002.10857.

    With s_p the cosines of positive and s_n those of negative pairs, the weights alpha held constant::

        alpha_p = [1 + m - s_p]_+    alpha_n = [s_n + m]_+    Delta_p = 1 - m    Delta_n = m
        L = log(1 + sum_n exp(gamma alpha_n (s_n - Delta_n)) * sum_p exp(-gamma alpha_p (s_p - Delta_p)))

    ``per_anchor``: the sums run over one anchor's pairs, and L is averaged over the anchors that have both kinds;
    ``whole_batch``: over all unordered pairs of the batch, one L. A survey prints squared hinges of both similarities
    with their signs reversed: that charges similar positives and dissimilar negatives, a slip.

    Args:
        m: relaxation, above 0 to 1; the paper's 0.25 for faces, 0.4 for fine-grained retrieval.
        gamma: scale, above 0 to 4096; 256 for faces, 128 for people, 80 for fine-grained retrieval.
        form: ``per_anchor`` or ``whole_batch``; :class:`CircleHead` is the form over classes.
        reduction: of ``per_anchor``: ``mean_all``, ``mean_active`` over anchors with a loss above 0, ``sum``, ``none``.
        gather: see the other workers' samples.
        similarity: what s is: ``cosine``, or ``euclidean``: 1 - the distance of unit vectors.
        mining: which pairs count, ``all`` in the paper, or as of :class:`~armillary.losses.tuples.TupleLoss`.
        epsilon: slack of the miner ``multi_similarity``, a difference of similarities.

    Raises:
        ValueError: an unknown option or one out of range; in ``forward`` a wrong shape.
    """

    unit: ClassVar[str] = "anchors"

    def __init__(
        self,
        m: float = 0.25,
        gamma: float = 256.0,
        form: str = "per_anchor",
        reduction: str = "mean_all",
        gather: bool = True,
        similarity: str = "cosine",
        mining: str = "all",
        epsilon: float = 0.1,
    ) -> None:
        super().__init__(True, reduction, gather, similarity, mining, epsilon)
        check_choice("form", form, ("per_anchor", "whole_batch"))
        _check_circle(m, gamma)
        self.m, self.gamma, self.form = m, gamma, form

    def logits(self, block: Block) -> tuple[Tensor, Tensor]:
        """Log-sum-exp over each anchor's positive and over its negative pairs, ``(rows,)`` each."""
        similarity = self.distance.similarity(block.anchors, block.columns)
        block = self.chosen(block)
        empty = empty_logit(similarity.dtype)
        near = block.partners.of(similarity, 1.0)
        positive = (-self.gamma * within(near, self.m)).masked_fill(~block.partners.taken, empty)
        with torch.no_grad():
            # alpha_n (s - m) = [s]_-m^2 - m^2 with [s]_-m the larger of s and -m; its slope is [s]_-m + m.
            weight = similarity.detach().clamp_min(-self.m)
            logits = weight.square().sub_(self.m**2).mul_(self.gamma).masked_fill_(~block.negative, empty)
            values, scale = exponentials_(logits)
            slope = weight.add_(self.m).mul_(logits)
        return positive.logsumexp(1), with_slope(similarity, values, slope, scale * self.gamma)

    def terms(self, block: Block) -> Terms:
        """One term an anchor that has both kinds of pairs."""
        positive, negative = self.logits(block)
        # Where one kind is missing the sum of both is so low that softplus gives 0, and so does its slope.
        losses, empty = F.softplus(positive + negative), empty_logit(positive.dtype) / 2
        both = (positive > empty) & (negative > empty)
        return Terms(losses, both.long(), (losses > 0).long())

    @float32_math
    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        apart: Tensor | None = None,
        metrics: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """The loss of the batch; arguments as of :class:`~armillary.losses.tuples.TupleLoss`."""
        if self.form == "per_anchor":
            loss: Tensor = super().forward(embeddings, labels, apart=apart, metrics=metrics)
            return loss
        check_embeddings(embeddings, labels)

        def of_block(block: Block) -> tuple[Tensor, ...]:
            return torch.stack(self.logits(block), dim=1), block.partners.taken.sum(1)

        # Few pairs decide over the whole batch, and gamma multiplies their rounding error.
        anchors = normalize(embeddings.double())
        pooled, positives = against_batch(of_block, anchors, labels, self.gather, eager=False, labels=apart)
        # Each unordered pair is seen from both ends: half of either sum.
        positive, negative = (global_rows(pooled, self.gather).logsumexp(0) - log(2)).unbind()
        loss = F.softplus(positive + negative).to(embeddings.dtype)
        if metrics is not None:
            both = (pooled.detach() > empty_logit(pooled.dtype) / 2).all(dim=1).long()
            metrics.update(self.count(both, both * (loss.detach() > 0), positives, embeddings.dtype))
        return loss + not_a_number_guard(embeddings)


class CircleHead(ClassHeadLoss):
    """Circle loss over classes: the formula of :class:`Circle` with s_p = cos(x, w_y) and s_n = cos(x, w_j).

    ``L = mean_i -log( e^(gamma T_i) / (e^(gamma T_i) + sum_{j != y} e^(gamma N_ij)) )`` with
    ``T = alpha_p (s_p - 1 + m)`` and ``N = alpha_n (s_n - m)``, the weights alpha held constant.

    Args:
        num_classes: C.
        embedding_dim: width of x.
        margin: m, the relaxation, above 0 to 1.
        scale: gamma, above 0.
        reduction: ``mean`` or ``none``.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        margin: float = 0.25,
        scale: float = 256.0,
        reduction: str = "mean",
    ) -> None:
        _check_circle(margin, scale)
        super().__init__(num_classes, embedding_dim, margin, scale, reduction)

    def target(self, cosine: Tensor, margin: Tensor) -> Tensor:
        """T, weighted by how far the cosine is from 1 + m."""
        return within(cosine, self.margin)

    def non_target(self, cosine: Tensor, target: Tensor, columns: Columns) -> Tensor:
        """N, weighted by how far the cosine is above -m."""
        return between(cosine, self.margin)


def _check_circle(m: float, gamma: float) -> None:
    if not 0 < m <= 1:
        raise ValueError(f"m must be above 0 and at most 1, found {m}")
    if not gamma > 0:
        raise ValueError(f"gamma must be above 0, found {gamma}")
