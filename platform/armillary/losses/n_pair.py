"""Multi-class N-pair loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from armillary.losses.global_batch import global_rows
from armillary.losses.tensors import check_embeddings, float32_math, not_a_number_guard


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

        L = 1/N sum_i log(1 + sum_{j != i} exp(f_i.f_j+ - f_i.f_i+)) + l2_reg / N sum_i (|f_i|^2 + |f_i+|^2)

    The penalty holds the norms down in place of a normalisation. Labels with one sample are left out, as are a label's
    third and further ones: draw batches with two samples a class. How programs scale the penalty differs (TensorFlow's
    counts a quarter of it).

    Args:
        l2_reg: weight of the squared norms, 0 or more.
        symmetric: average with the direction from the positives to the anchors.
        gather: see the other workers' samples.

    Raises:
        ValueError: a negative weight; in ``forward`` a wrong shape.
    """

    def __init__(self, l2_reg: float = 0.002, symmetric: bool = False, gather: bool = True) -> None:
        super().__init__()
        if not l2_reg >= 0:
            raise ValueError(f"l2_reg must be at least 0, found {l2_reg}")
        self.l2_reg, self.symmetric, self.gather = l2_reg, symmetric, gather

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
        scores = left @ right.T
        losses = scores.logsumexp(1) - scores.diagonal()
        if self.symmetric:
            losses = 0.5 * (losses + scores.logsumexp(0) - scores.diagonal())
        pairs = max(1, len(anchor))
        norms = (left.square().sum() + right.square().sum()) / pairs
        if metrics is not None:
            active = (losses.detach() > 1e-3).sum().to(losses.dtype)
            metrics.update(pairs=active.new_tensor(len(anchor)), active=active, active_share=active / pairs)
            metrics.update(empty=(active == 0).to(active.dtype), squared_norm=0.5 * norms.detach())
        return losses.sum() / pairs + self.l2_reg * norms + not_a_number_guard(vectors)
