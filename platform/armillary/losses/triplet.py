"""Triplet loss on the unit sphere."""

from __future__ import annotations

from typing import ClassVar

from armillary.losses.blocks import Block
from armillary.losses.miners import TRIPLETS
from armillary.losses.similarities import Distance
from armillary.losses.tuples import Terms, TupleLoss, all_triplets, mined_triplets


class Triplet(TupleLoss):
    """Triplet loss. Schroff et al., "FaceNet", CVPR 2015, arXiv 1503.03832; batch-hard: Hermans et al. 2017.

    With f normalised, D_ij = |f_i - f_j|^2 (or its root) and T the chosen triplets of anchor, positive, negative::

        L = reduce_{(a, p, n) in T} [D_ap - D_an + margin]_+        soft: log(1 + exp(D_ap - D_an))

    Which triplets are chosen:

    * ``semi_hard``: for every (a, p) the nearest negative farther than p, else the farthest negative;
    * ``batch_hard``: for every a its farthest positive and nearest negative (its paper uses plain distances);
    * ``hard_negative``: for every (a, p) the negative nearest to a; apt to collapse from a random start;
    * ``all``: every triplet of the batch;
    * ``multi_similarity``: every triplet of the pairs that multi-similarity's miner keeps, see
      :func:`~armillary.losses.miners.chosen_pairs`.

    A batch without a triplet gives 0, and the metric ``triplets`` 0.

    Args:
        margin: distance by which a negative must lie farther than a positive; 0 to 4 squared, 0 to 2 plain or cosine.
        mining: ``semi_hard``, ``batch_hard``, ``hard_negative``, ``all`` or ``multi_similarity``.
        squared: squared distances, as in the paper, or plain ones.
        soft: softplus in place of the hinge; it has no margin.
        reduction: ``mean_active`` over triplets with a loss above 0, ``mean_all``, ``sum`` (the paper's), or ``none``:
            each anchor's sum, ``(batch,)``.
        gather: see the other workers' samples.
        similarity: ``euclidean``, or ``cosine``: D = 1 - cos, squared where ``squared``.
        epsilon: slack of ``multi_similarity``, in the unit of the margin.

    Raises:
        ValueError: an unknown option, a negative margin; in ``forward`` a wrong shape.
    """

    unit: ClassVar[str] = "triplets"

    def __init__(
        self,
        margin: float = 0.2,
        mining: str = "semi_hard",
        squared: bool = True,
        soft: bool = False,
        reduction: str = "mean_active",
        gather: bool = True,
        similarity: str = "euclidean",
        epsilon: float = 0.1,
    ) -> None:
        super().__init__(True, reduction, gather, similarity, mining, epsilon)
        if not margin >= 0:
            raise ValueError(f"margin must be at least 0, found {margin}")
        self.margin, self.squared, self.soft = margin, squared, soft
        self.distance = Distance(similarity, squared)

    def terms(self, block: Block) -> Terms:
        """The chosen triplets of some anchors."""
        if self.mining in TRIPLETS:
            return mined_triplets(self.distance, self.mining, block, self.margin, self.soft)
        return all_triplets(self.distance, self.chosen(block), self.margin, self.soft)
