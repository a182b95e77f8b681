"""Triplets and pairs together, for embeddings that are clustered afterwards."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from armillary import losses
from armillary.losses.logistic_pairs import LogisticPairs
from armillary.objectives import base
from armillary.objectives.base import Batch, BuildContext, Citation, Convergence, Output
from armillary.objectives.registry import register
from armillary.objectives.tuples import IMAGES_PER_CLASS, TupleObjective


@register
class TripletContrastive(TupleObjective):
    """Triplet loss of squared cosine distances, and a logistic loss over pairs, before clustering by k-means.

    ``L = mean_{triplets} [d(a, p)^2 - d(a, n)^2 + alpha]_+ + L_pairs,  d = 1 - cos``

    The recipe of a tutorial, whose formula for pairs is repaired, see
    :class:`armillary.losses.logistic_pairs.LogisticPairs`. The protocol ``clustering`` does the rest: PCA, unit length,
    k-means++, F1 over pairs. ``jobs/studies/alpha_sweep.yaml`` tries its five values of alpha.
    """

    name = "triplet_contrastive"
    catalog_id = "triplet_contrastive_pipeline"
    citation = Citation("(tutorial)", "Face clustering with triplet and contrastive loss, PCA and k-means++")
    convergence = Convergence(margin=0.18)

    class Hyperparameters(base.Hyperparameters):
        """The margin, and what pairs are divided by."""

        alpha: float = Field(0.5, ge=0, le=4, description="margin between squared cosine distances")
        temperature: float = Field(1.0, ge=0.01, le=10, description="tau, divides the cosines of pairs")
        samples_per_class: int = Field(4, ge=2, le=64, description=IMAGES_PER_CLASS)

    def build(self, context: BuildContext) -> None:
        """Makes both losses."""
        self.triplets = losses.Triplet(
            self.hyperparameters.alpha, mining="all", squared=True, reduction="mean_all", similarity="cosine"
        )
        self.pairs = LogisticPairs(self.hyperparameters.temperature)

    def forward(self, batch: Batch) -> Output:
        """The sum of both."""
        metrics: dict[str, Tensor] = {}
        embeddings = self.encoder(batch.views[0])
        triplets = self.triplets(embeddings, batch.label, metrics=metrics)
        pairs = self.pairs(embeddings, batch.label, metrics=metrics)
        return Output(triplets + pairs, metrics)
