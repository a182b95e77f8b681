"""Multi-class N-pair loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from armillary.losses.blocks import Block
from armillary.losses.global_batch import global_rows
from armillary.losses.miners import chosen_pairs
from armillary.losses.similarities import Distance
from armillary.losses.slopes import empty_logit
from armillary.losses.tensors import check_choice, check_embeddings, float32_math, normalize, not_a_number_guard
from armillary.losses.tuples import Terms, check_parts, reduce_terms


def one_pair_per_label(labels: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of an anchor and a positive of every label that has two samples: its first two by ``order``.

    Args:
        labels: ``(samples,)``.
        order: ``(samples,)``, a number for each sample that does not depend on where it stands.

    Returns:
        Anchors and positives, ``(pairs,)`` each, by ascending label.
    """
    by_order = order.argsort(stable=True)
    positions = by_order[labels[by_order].argsort(stable=True)]
    ascending = labels[positions]
    starts = torch.ones_like(ascending, dtype=torch.bool)
    starts[1:] = ascending[1:] != ascending[:-1]
    has_second = torch.zeros_like(starts)
    has_second[:-1] = starts[:-1] & ~starts[1:]
    first = has_second.nonzero().squeeze(1)
    return positions[first], positions[first + 1]


class NPair(nn.Module):
    """Multi-class N-pair loss. Sohn, NeurIPS 2016.

    Of each of N labels an anchor f_i and a positive f_i+, as they leave the encoder, unnormalised::

        L = 1/N sum_i log(1 + sum_{j != i} exp(S(f_i, f_j+) - S(f_i, f_i+))) + l2_reg / N sum_i (|f_i|^2 + |f_i+|^2)

    with S = f_i.f_j+. The penalty holds the norms down in place of a normalisation. Labels with one sample are left
    out, as are a label's third and further ones: draw batches with two samples a class. How programs scale the penalty
    differs (TensorFlow's counts a quarter of it).

    Args:
        l2_reg: weight of the squared norms, 0 or more.
        symmetric: average with the direction from the positives to the anchors.
        gather: see the other workers' samples.
        similarity: what S is: ``dot``, ``cosine``, or ``euclidean``: 1 - |f_i - f_j+|.
        mining: which j count, and which i: ``all`` in the paper; a miner leaves out pairs without a chosen negative.
        epsilon: slack of the miner ``multi_similarity``, a difference of similarities.
        reduction: ``mean_all`` over pairs, ``mean_active`` over those that are active, or ``sum``; the penalty is a
            mean over pairs in any case.

    Raises:
        ValueError: an unknown option, a negative weight; in ``forward`` a wrong shape.
    """

    def __init__(
        self,
        l2_reg: float = 0.002,
        symmetric: bool = False,
        gather: bool = True,
        similarity: str = "dot",
        mining: str = "all",
        epsilon: float = 0.1,
        reduction: str = "mean_all",
    ) -> None:
        super().__init__()
        check_parts(similarity, mining, epsilon)
        check_choice("reduction", reduction, ("mean_active", "mean_all", "sum"))
        if not l2_reg >= 0:
            raise ValueError(f"l2_reg must be at least 0, found {l2_reg}")
        self.l2_reg, self.symmetric, self.gather = l2_reg, symmetric, gather
        self.distance, self.mining, self.epsilon, self.reduction = Distance(similarity), mining, epsilon, reduction

    @float32_math
    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        order: Tensor | None = None,
        metrics: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """The loss of ``embeddings (batch, dim)`` with ``labels (batch,)``; every worker computes the whole of it.

        ``order (batch,)`` says which of a label's samples come first, by default those of the lower rows. ``metrics``
        receives ``pairs``, ``active`` (those not told apart from all others to within 1e-3), ``active_share``,
        ``empty`` and ``squared_norm``.
        """
        check_embeddings(embeddings, labels)
        vectors, keys = global_rows(embeddings, self.gather), global_rows(labels, self.gather)
        given = torch.arange(len(keys), device=keys.device) if order is None else global_rows(order, self.gather)
        anchor, positive = one_pair_per_label(keys, given)
        left, right = vectors[anchor], vectors[positive]
        norms = (left.square().sum() + right.square().sum()) / max(1, len(anchor))
        if self.distance.of_units:
            left, right = normalize(left), normalize(right)
        losses, taken = self._of_anchors(left, right)
        if self.symmetric:
            backward, also = self._of_anchors(right, left)
            losses, taken = 0.5 * (losses + backward), taken | also
        active = losses.detach() > 1e-3
        # Every worker has all pairs.
        loss = reduce_terms(Terms(losses, taken.long(), active.long()), self.reduction, gather=False)
        if metrics is not None:
            pairs, opened = taken.sum().to(losses.dtype), active.sum().to(losses.dtype)
            metrics.update(pairs=pairs, active=opened, active_share=opened / pairs.clamp_min(1))
            metrics.update(empty=(opened == 0).to(losses.dtype), squared_norm=0.5 * norms.detach())
        return loss + self.l2_reg * norms + not_a_number_guard(vectors)

    def _of_anchors(self, anchors: Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
        """The losses of anchors whose positives stand in the same rows, ``(pairs,)``, and which of them count."""
        scores = self.distance.similarity(anchors, positives)
        taken = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
        if self.mining != "all" and len(scores):
            number = torch.arange(len(scores), device=scores.device)
            # No anchor stands among the columns.
            block = Block(anchors, positives, number, number, number, number, slice(None), len(scores))
            block = chosen_pairs(self.mining, 1 - scores.detach(), block, self.epsilon)
            taken = block.partners.taken.any(dim=1)
            scores = scores.masked_fill(~(block.negative | (number[:, None] == number)), empty_logit(scores.dtype))
        return (scores.logsumexp(1) - scores.diagonal()).masked_fill(~taken, 0), taken
