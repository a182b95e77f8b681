"""Objectives over image sets: clusters of like images within each set, or each set as its mean."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from armillary import collectives, losses
from armillary.components.bank import encode_all
from armillary.components.clustering import kmeans
from armillary.components.counter import key
from armillary.losses.subclusters import (
    SubclusterLoss,
    nearest_accuracy,
    neighbor_accuracy,
    set_means,
    squared_distances,
)
from armillary.losses.tensors import check_labels, normalize, widen
from armillary.objectives import base
from armillary.objectives.base import Batch, BuildContext, Citation, Convergence, Needs, Output, Samples
from armillary.objectives.bases import ClassHeadObjective
from armillary.objectives.registry import register


@register
class SetDDC(ClassHeadObjective):
    """DDFM on image sets: every set splits into clusters of like images, whose trained centres attract and repel.

    Loss: :class:`armillary.losses.subclusters.SubclusterLoss`. k-means splits each set, by the features at the start of
    an epoch: of the first one (``recluster`` 0, as in the paper, whose features are pre-trained), or of every
    ``recluster``-th, since features that start at random say little; centres then start again at the clusters' means.
    Between, they descend their own gradient at rate ``center_lr``, as the authors' do. Set numbers of a class share
    ``sets`` places, modulo; a sample whose cluster is not known yet belongs to the nearest centre of its class. The
    paper's second method, which projects on common vectors, and its majority vote over a set are not part of this.

    ``formulation: survey`` takes each set for its mean feature and sets triplets between sets:
    ``[|phi(S_a) - phi(S_p)|^2 - |phi(S_a) - phi(S_n)|^2 + margin]_+`` over the semi-hard ones, phi scaled to length 1.

    The metric ``accuracy`` is of the batch's sets by their means: how many are nearest to a centre of their class; in
    the survey's formulation, how many are nearest to another set of their class, by direction.
    """

    name = "set_ddc"
    family = "set_based"
    catalog_id = "set_ddc"
    citation = Citation(
        "Bedirhan Uzun, Hakan Cevikalp, Hasan Saribas",
        "Deep Discriminative Feature Models (DDFMs) for Set Based Face Recognition and Distance Metric Learning",
        2023,
        "IEEE TPAMI 45(5)",
        "https://github.com/bdrhn9/ddfm-face",
    )
    needs = Needs(
        recipe="faces",
        fields=("label", "image_set"),
        sampler="image_sets",
        sets_per_class=2,
        samples_per_set=3,
        components=("centers",),
        batch_coupled=True,
    )
    convergence = Convergence(
        margin=0.15,
        job={"train.batch_size": 48, "objective.recluster": 3, "objective.subclusters": 1, "optimizer.lr": 2e-3},
    )

    centers: Tensor
    classes: Tensor
    assigned: Tensor

    class Hyperparameters(base.Hyperparameters):
        """Weights and centres; the survey's margin."""

        margin: float = Field(24.0, ge=0, le=1e6, description="gamma, in squared units of the features")
        subclusters: int = Field(3, ge=1, le=64, description="K, clusters of each image set")
        sets: int = Field(4, ge=1, le=1024, description="sets of a class that have centres of their own")
        intra: float = Field(1.0, ge=0, le=1000, description="weight of the distance to the own centre")
        inter: float = Field(1.0, ge=0, le=1000, description="weight of the distances between centres")
        triplet: float = Field(1.0, ge=0, le=1000, description="weight of the distance to other classes' centres")
        center_lr: float = Field(0.5, ge=0, le=10, description="rate at which centres descend")
        recluster: int = Field(0, ge=0, le=1000, description="epochs between clusterings; 0 clusters once")
        formulation: Literal["paper", "survey"] = Field("paper", description="survey: triplets between set means")
        set_margin: float = Field(0.2, ge=0, le=4, description="survey: margin, in squared distances of unit vectors")

    def build(self, context: BuildContext) -> None:
        """Makes loss and centres."""
        options = self.hyperparameters
        self.num_classes, self.seed = context.num_classes, context.seed
        if options.formulation == "survey":
            self.loss: Any = losses.Triplet(margin=options.set_margin, gather=False)
            return
        self.loss = SubclusterLoss(options.margin, options.intra, options.inter, options.triplet)
        places = options.sets * options.subclusters
        self.register_buffer("centers", torch.randn(context.num_classes * places, context.embedding_dim))
        self.register_buffer("classes", torch.arange(context.num_classes).repeat_interleave(places))
        # Of each image of the training set its centre; -1: not known.
        self.register_buffer("assigned", torch.full((context.dataset_size,), -1))
        self._leaves: list[Tensor] = []

    def before_epoch(self, epoch: int, samples: Samples) -> None:
        """Splits the sets, and puts the centres at the clusters' means."""
        options = self.hyperparameters
        due = epoch % options.recluster == 0 if options.recluster else epoch == 0
        if options.formulation == "survey" or not due:
            return

        def encode(batch: Batch) -> Tensor:
            features = self.encoder(batch.views[0]).double()
            numbers = torch.stack([batch.label, batch.fields["image_set"]], dim=1)
            return torch.cat([features, numbers.to(features.dtype)], dim=1)

        rows, known = encode_all(samples(), encode, len(self.assigned), self.encoder)
        index = known.nonzero().squeeze(1)
        features, label, number = rows[index, :-2], rows[index, -2].round().long(), rows[index, -1].round().long()
        place = label * options.sets + number.remainder(options.sets)
        self.classes.fill_(-1)
        self.assigned.fill_(-1)
        for group in place.unique().tolist():
            members = (place == group).nonzero().squeeze(1)
            # k-means needs no more clusters than there are different images.
            k = min(options.subclusters, len(features[members].unique(dim=0)))
            found = kmeans(features[members], k, seed=key(self.seed, epoch, group))
            first = group * options.subclusters
            self.centers[first : first + k] = found.centroids.to(self.centers.dtype)
            self.classes[first : first + k] = group // options.sets
            self.assigned[index[members]] = first + found.labels

    def forward(self, batch: Batch) -> Output:
        """The loss of the batch's sets."""
        check_labels(batch.label, self.num_classes)
        metrics: dict[str, Tensor] = {}
        embeddings = self.encoder(batch.views[0])
        if self.hyperparameters.formulation == "survey":
            means, labels = set_means(embeddings, batch.label, batch.fields["image_set"])
            metrics["accuracy"] = neighbor_accuracy(normalize(widen(means)), labels)
            return Output(self.loss(means, labels, metrics=metrics), metrics)
        # Centres are buffers, which no engine shards, and rates of their own; this is what their gradient goes to.
        leaf = self.centers.detach().clone().requires_grad_(torch.is_grad_enabled())
        self._leaves.append(leaf)
        assigned = self._centers_of(embeddings.detach(), batch)
        means, labels = set_means(widen(embeddings.detach()), batch.label, batch.fields["image_set"])
        metrics["accuracy"] = nearest_accuracy(means, labels, self.centers, self.classes)
        return Output(self.loss(embeddings, assigned, leaf, self.classes, metrics=metrics), metrics)

    def _centers_of(self, embeddings: Tensor, batch: Batch) -> Tensor:
        """The centre of each sample, ``(batch,)``."""
        distance = squared_distances(embeddings.to(self.centers.dtype), self.centers)
        nearest = distance.masked_fill(self.classes != batch.label[:, None], torch.inf).argmin(dim=1)
        assigned = self.assigned[batch.index]
        return torch.where((assigned >= 0) & (self.classes[assigned] == batch.label), assigned, nearest)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Moves the centres down their gradient, averaged over the workers."""
        if self.hyperparameters.formulation == "survey":
            return
        gradients = [leaf.grad for leaf in self._leaves if leaf.grad is not None]
        self._leaves = []
        if gradients:
            total = collectives.all_reduce_sum(torch.stack(gradients).sum(dim=0)) / collectives.world_size()
            self.centers -= self.hyperparameters.center_lr * total

    def epoch_metrics(self) -> dict[str, Tensor]:
        """How many centres there are."""
        if self.hyperparameters.formulation == "survey":
            return {}
        return {"centers": (self.classes >= 0).sum().float()}
