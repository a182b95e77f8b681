"""Contrastive losses: each anchor picks its positives out of all columns.

One masked cross-entropy serves them all. Further columns (a queue, synthetic negatives) are concatenated to the logits
and masks, offsets (a margin, a log-weight) are added to the logits, soft targets take the place of the positive mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from armillary.losses.blocks import Block, against_batch
from armillary.losses.global_batch import first_column, global_mean, global_rows, global_sum
from armillary.losses.slopes import empty_logit, exponentials_, with_slope
from armillary.losses.tensors import check_choice, check_embeddings, float32_math, normalize, not_a_number_guard


def masked_cross_entropy(
    logits: Tensor, targets: Tensor, denominator: Tensor, mode: str = "out"
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each anchor over the columns in its denominator.

    ::

        out: -1/|P(i)| sum_{p in P(i)} log( exp(l_ip) / sum_{a in A(i)} exp(l_ia) )
        in:  -log( 1/|P(i)| sum_{p in P(i)} exp(l_ip) / sum_{a in A(i)} exp(l_ia) )

    Args:
        logits: l, ``(anchors, columns)``.
        targets: P, ``(anchors, columns)``: a mask of positives, or their non-negative weights.
        denominator: A, ``(anchors, columns)`` bool.
        mode: where the mean over positives stands, ``out`` of the logarithm or ``in`` it.

    Returns:
        ``losses (anchors,)``, 0 for an anchor without positives, and ``valid (anchors,)`` bool.
    """
    weights = targets.to(logits.dtype)
    total = weights.sum(dim=1)
    valid = total > 0
    # An anchor that does not count keeps all its columns: the gradient of an empty log-sum-exp is NaN.
    log_denominator = logits.masked_fill(~denominator & valid[:, None], -torch.inf).logsumexp(dim=1)
    if mode == "out":
        log_numerator = (weights * logits.masked_fill(weights == 0, 0)).sum(dim=1) / total.clamp_min(1e-12)
    else:
        kept = logits.masked_fill((weights == 0) & valid[:, None], -torch.inf)
        log_weights = weights.masked_fill(weights == 0, 1).log()
        log_numerator = (kept + log_weights).logsumexp(dim=1) - total.masked_fill(~valid, 1).log()
    return torch.where(valid, log_denominator - log_numerator, 0), valid


def partner_cross_entropy(block: Block, scale: float) -> tuple[Tensor, Tensor]:
    """:func:`masked_cross_entropy` (``out``) of a block, over all columns but the anchor itself, in few passes.

    ::

        -1/|P(i)| sum_{p in P(i)} log( exp(scale a_i.c_p) / sum_{j != i} exp(scale a_i.c_j) )

    Its derivative by the logits, softmax minus targets, is formed before anything is summed with it: the two
    nearly cancel near convergence.

    Args:
        block: anchors against columns; to be used inside :func:`armillary.losses.blocks.by_blocks`.
        scale: turns inner products into logits.

    Returns:
        ``losses (rows,)``, 0 for an anchor without positives, and ``valid (rows,)`` bool.
    """
    logits, partners = (block.anchors * scale) @ block.columns.T, block.partners
    with torch.no_grad():
        matrix, count = logits.detach(), partners.taken.sum(1)
        valid, share = count > 0, 1 / count.clamp_min(1).to(logits.dtype)
        own = partners.of(matrix, 0.0).sum(1) * share
        matrix.diagonal(block.first).fill_(empty_logit(matrix.dtype))
        values, factor = exponentials_(matrix)
        matrix.scatter_add_(1, partners.columns, partners.taken * -(share / factor)[:, None])
        losses = torch.where(valid, values - own, 0)
    return with_slope(logits, losses, matrix, torch.where(valid, factor, 0)), valid


class _ColumnLoss(nn.Module):
    """Base: cosines of local anchors with global columns, positives by equal key, mean over anchors that have one."""

    def __init__(self, temperature: float, mode: str, reduction: str, gather: bool) -> None:
        super().__init__()
        check_choice("reduction", reduction, ("mean", "none"))
        check_choice("mode", mode, ("out", "in"))
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, found {temperature}")
        self.temperature, self.mode, self.reduction, self.gather = temperature, mode, reduction, gather

    def extra_repr(self) -> str:
        """The options, for ``print(loss)``."""
        return f"temperature={self.temperature}, mode={self.mode}"

    def contrast(self, embeddings: Tensor, keys: Tensor, metrics: dict[str, Tensor] | None) -> Tensor:
        """The loss of ``embeddings (rows, dim)`` where rows with equal ``keys (rows,)`` are positives of each other."""
        anchors = normalize(embeddings)
        eager = self.reduction == "mean"
        losses, valid = against_batch(self._out if self.mode == "out" else self._in, anchors, keys, self.gather, eager)
        if metrics is not None:
            metrics.update(self._metrics(anchors.detach(), keys))
        guard = not_a_number_guard(embeddings)
        if self.reduction == "none":
            return losses + guard
        return global_mean(losses.sum(), valid.sum(), self.gather) + guard

    def _out(self, block: Block) -> tuple[Tensor, ...]:
        return partner_cross_entropy(block, 1 / self.temperature)

    def _in(self, block: Block) -> tuple[Tensor, ...]:
        logits = block.anchors @ block.columns.T / self.temperature
        return masked_cross_entropy(logits, block.positive, block.others, "in")

    def _metrics(self, anchors: Tensor, keys: Tensor) -> dict[str, Tensor]:
        """Sums of cosines over pairs from sums of vectors: ``sum_{j in J} a.z_j = a.(sum_{j in J} z_j)``."""
        groups = Groups.of(anchors, keys, self.gather)
        rows, partners = anchors.new_tensor(len(anchors)), groups.partners.sum().to(anchors.dtype)
        of_same = (anchors * groups.sums).sum()
        with_positive = global_sum((groups.partners > 0).sum(), self.gather).to(anchors.dtype)
        of_others = (anchors * groups.others).sum()
        return {
            "anchors": with_positive,
            "empty": (with_positive == 0).to(anchors.dtype),
            "positives_per_anchor": global_mean(partners, rows, self.gather),
            "positive_cosine": global_mean(of_same, partners, self.gather),
            "negative_cosine": global_mean(of_others, rows * (groups.samples - 1) - partners, self.gather),
        }


@dataclass(frozen=True)
class Groups:
    """Sums over an anchor's group, the samples of all workers with its key, and over all others.

    Args:
        sums: of the group's vectors without the anchor's own, ``(anchors, dim)``.
        partners: how many these are, ``(anchors,)``.
        others: sums of all other groups' vectors, ``(anchors, dim)``.
        samples: number of all samples.
    """

    sums: Tensor
    partners: Tensor
    others: Tensor
    samples: int

    @classmethod
    def of(cls, anchors: Tensor, keys: Tensor, gather: bool = True) -> Groups:
        """Of ``anchors (rows, dim)`` with ``keys (rows,)``."""
        columns, column_keys = global_rows(anchors, gather), global_rows(keys, gather)
        _, number = column_keys.unique(return_inverse=True)
        own = number[first_column(len(keys), gather) :][: len(keys)]
        # Of a sum from which the anchor is taken away again float32 would keep the rounding error.
        exact = columns.double()
        sums = torch.zeros_like(exact).index_add(0, number, exact)[own]
        partners, others = (sums - anchors.double()).to(anchors.dtype), (exact.sum(0) - sums).to(anchors.dtype)
        return cls(partners, number.bincount()[own] - 1, others, len(columns))


class SupCon(_ColumnLoss):
    """Supervised contrastive loss. Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, arXiv 2004.11362.

    With z normalised, A(i) all samples but i, P(i) those of A(i) with i's label::

        L_out = mean_i -1/|P(i)| sum_{p in P(i)} log( exp(z_i.z_p / tau) / sum_{a in A(i)} exp(z_i.z_a / tau) )
        L_in  = mean_i -log( 1/|P(i)| sum_{p in P(i)} exp(z_i.z_p / tau) / sum_{a in A(i)} exp(z_i.z_a / tau) )

    The paper sums over anchors; here the mean runs over the anchors that have a positive. No such anchor: 0.

    Args:
        temperature: tau > 0.
        mode: ``out`` (recommended by the paper) or ``in``.
        reduction: ``mean``, or ``none`` for the anchors' losses ``(batch,)``, 0 for one without a positive.
        gather: see the other workers' samples.
    """

    def __init__(
        self, temperature: float = 0.1, mode: str = "out", reduction: str = "mean", gather: bool = True
    ) -> None:
        super().__init__(temperature, mode, reduction, gather)

    @float32_math
    def forward(self, embeddings: Tensor, labels: Tensor, *, metrics: dict[str, Tensor] | None = None) -> Tensor:
        """The loss of ``embeddings (batch, dim)`` with ``labels (batch,)``; views are stacked as samples.

        ``metrics`` receives ``anchors`` (those with a positive), ``empty`` (1 for a batch without such an anchor),
        ``positives_per_anchor``, ``positive_cosine`` and ``negative_cosine``.
        """
        check_embeddings(embeddings, labels)
        return self.contrast(embeddings, labels, metrics)


class NTXent(_ColumnLoss):
    """Normalised temperature-scaled cross-entropy of SimCLR. Chen et al., ICML 2020, arXiv 2002.05709.

    ``l(i, j) = -log( exp(cos_ij / tau) / sum_{k != i} exp(cos_ik / tau) )``, averaged over all 2N anchors i with j the
    other view of i. The denominator has 2N - 1 terms: both views of every other image, and the positive.

    Args:
        temperature: tau > 0.
        reduction: ``mean``, or ``none`` for the anchors' losses ``(2 * batch,)``, the first view's before the second's.
        gather: see the other workers' samples.
    """

    def __init__(self, temperature: float = 0.5, reduction: str = "mean", gather: bool = True) -> None:
        super().__init__(temperature, "out", reduction, gather)

    @float32_math
    def forward(self, view1: Tensor, view2: Tensor, *, metrics: dict[str, Tensor] | None = None) -> Tensor:
        """The loss of two views ``(batch, dim)``, row i of both from image i; ``metrics`` as in :class:`SupCon`."""
        check_embeddings(view1)
        if view1.shape != view2.shape:
            raise ValueError(f"the views differ in shape: {tuple(view1.shape)} and {tuple(view2.shape)}")
        image = torch.arange(len(view1), device=view1.device) + first_column(len(view1), self.gather)
        return self.contrast(torch.cat([view1, view2]), image.repeat(2), metrics)
