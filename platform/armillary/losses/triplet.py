"""Triplet loss on the unit sphere."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from armillary.losses.global_batch import global_mean, global_rows, global_sum
from armillary.losses.tensors import check_choice, check_embeddings, float32_math, normalize, not_a_number_guard
from armillary.losses.tuples import (
    MINERS,
    Triplets,
    all_triplets,
    euclidean,
    mined_triplets,
    positives_and_negatives,
    reduce_triplets,
)


class Triplet(nn.Module):
    """Triplet loss. Schroff et al., "FaceNet", CVPR 2015, arXiv 1503.03832; batch-hard: Hermans et al. 2017.

    With f normalised, D_ij = |f_i - f_j|^2 (or its root) and T the chosen triplets of anchor, positive, negative::

        L = reduce_{(a, p, n) in T} [D_ap - D_an + margin]_+        soft: log(1 + exp(D_ap - D_an))

    Which triplets are chosen:

    * ``semi_hard``: for every (a, p) the nearest negative farther than p, else the farthest negative;
    * ``batch_hard``: for every a its farthest positive and nearest negative (its paper uses plain distances);
    * ``hard_negative``: for every (a, p) the negative nearest to a; apt to collapse from a random start;
    * ``all``: every triplet of the batch.

    A batch without a triplet gives 0, and the metric ``triplets`` 0.

    Args:
        margin: distance by which a negative must lie farther than a positive; 0 to 4 squared, 0 to 2 plain.
        mining: ``semi_hard``, ``batch_hard``, ``hard_negative`` or ``all``.
        squared: squared distances, as in the paper, or plain ones.
        soft: softplus in place of the hinge; it has no margin.
        reduction: ``mean_active`` over triplets with a loss above 0, ``mean_all``, ``sum`` (the paper's), or ``none``:
            each anchor's sum, ``(batch,)``.
        gather: see the other workers' samples.

    Raises:
        ValueError: an unknown option, a negative margin; in ``forward`` a wrong shape.
    """

    def __init__(
        self,
        margin: float = 0.2,
        mining: str = "semi_hard",
        squared: bool = True,
        soft: bool = False,
        reduction: str = "mean_active",
        gather: bool = True,
    ) -> None:
        super().__init__()
        check_choice("mining", mining, (*MINERS, "all"))
        check_choice("reduction", reduction, ("mean_active", "mean_all", "sum", "none"))
        if not margin >= 0:
            raise ValueError(f"margin must be at least 0, found {margin}")
        self.margin, self.mining, self.squared, self.soft = margin, mining, squared, soft
        self.reduction, self.gather = reduction, gather

    def extra_repr(self) -> str:
        """The options, for ``print(loss)``."""
        return f"margin={self.margin}, mining={self.mining}, squared={self.squared}, reduction={self.reduction}"

    @float32_math
    def forward(self, embeddings: Tensor, labels: Tensor, *, metrics: dict[str, Tensor] | None = None) -> Tensor:
        """The loss of ``embeddings (batch, dim)`` with ``labels (batch,)``.

        ``metrics`` receives ``triplets`` (how many were chosen), ``active_share`` (of them with a loss above 0) and
        ``positives_per_anchor``.
        """
        check_embeddings(embeddings, labels)
        anchors = normalize(embeddings)
        distance = euclidean(anchors, global_rows(anchors, self.gather), self.squared)
        positive, negative = positives_and_negatives(labels, self.gather)
        if self.mining == "all":
            triplets = all_triplets(distance, positive, negative, self.margin, self.soft)
        else:
            mined = MINERS[self.mining](distance, positive, negative)
            triplets = mined_triplets(distance, mined, self.margin, self.soft)
        if metrics is not None:
            metrics.update(self._metrics(triplets, positive, embeddings.dtype))
        return reduce_triplets(triplets, self.reduction, self.gather) + not_a_number_guard(embeddings)

    def _metrics(self, triplets: Triplets, positive: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        anchors = positive.new_full((), len(positive), dtype=torch.long)
        return {
            "triplets": global_sum(triplets.count.sum(), self.gather).to(dtype),
            "active_share": global_mean(triplets.active.sum().to(dtype), triplets.count.sum(), self.gather),
            "positives_per_anchor": global_mean(positive.sum().to(dtype), anchors, self.gather),
        }
