"""Momentum contrast with clusters that are made anew before every epoch: PCL and HCSC."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from armillary.components.bank import encode_all
from armillary.components.clustering import ClusterLevel, hierarchy, kmeans
from armillary.components.counter import key, sample_keys, uniforms
from armillary.components.heads import Projector
from armillary.losses.cluster_contrast import keep_probability, prototype_contrast, selected_instance_contrast
from armillary.losses.tensors import normalize, widen
from armillary.objectives.base import Batch, BuildContext, Citation, Convergence, Needs, Output, Samples
from armillary.objectives.queue_contrastive import MomentumQueueObjective, QueueHyperparameters
from armillary.objectives.registry import register
from armillary.spec.errors import UserError

_KMEANS, _SUBSET, _INSTANCES, _PROTOTYPES = 71, 72, 73, 74
_NEEDS = Needs(views=2, recipe="moco_v1", components=("projector", "teacher", "queue", "clusters"))
# What both take to be trained in seconds.
_SMALL: dict[str, Any] = {
    "objective.queue_size": 256,
    "objective.momentum": 0.99,
    "objective.projection_dim": 64,
    "objective.projection_hidden": 256,
    "objective.warmup_epochs": 3,
}
ClusterCounts = tuple[Annotated[int, Field(ge=2, le=10_000_000)], ...]
# Images a cluster at the finest of PCL's paper: 1,281,167 over 100,000.
_IMAGES_PER_CLUSTER = 12.8


def cluster_counts(wanted: ClusterCounts | None, default: ClusterCounts, samples: int) -> ClusterCounts:
    """Sizes of the clusterings of so many samples.

    The defaults are the papers', for 1.28 million images; on a smaller set all are smaller by one factor, so that the
    finest has as many images a cluster as PCL's paper, 12.8.

    Raises:
        UserError: as many clusters as samples are wanted, or more, where every sample would be its own.
    """
    if wanted is None:
        factor = min(1.0, samples / _IMAGES_PER_CLUSTER / max(default))
        return tuple(max(2, round(size * factor)) for size in default)
    if max(wanted) >= samples:
        raise UserError(
            f"found {max(wanted)} clusters for {samples} training samples", key="objective.clusters", allowed="fewer"
        )
    return wanted


class PrototypicalHyperparameters(QueueHyperparameters):
    """What PCL and HCSC share: sizes of clusterings, smoothing, warm-up."""

    queue_size: int = Field(16384, ge=1, le=1_048_576, description="past keys; 1024 suits small data")
    projection_hidden: int = Field(2048, ge=2, le=65536, description="width of the hidden layer")
    smoothing: float = Field(10.0, ge=1, le=1000, description="alpha, in the width of small clusters")
    warmup_epochs: int = Field(20, ge=0, le=10_000, description="epochs without clusters; 3 if short")


class PrototypicalObjective(MomentumQueueObjective):
    """MoCo with clusters of the teacher's features, made anew before every epoch after the warm-up."""

    family = "clustering"

    def make_projector(self, context: BuildContext) -> nn.Module:
        """Two layers without batch norm, as MoCo v2's."""
        options = self.hyperparameters
        return Projector(context.embedding_dim, options.projection_hidden, options.projection_dim, 2, norm=False)

    def build(self, context: BuildContext) -> None:
        """Makes MoCo's parts and room for the clusterings."""
        super().build(context)
        self.seed, self.dataset_size = context.seed, context.dataset_size
        self.levels = nn.ModuleList(self.make_levels(context))

    def make_levels(self, context: BuildContext) -> Sequence[ClusterLevel]:
        """Room for each clustering."""
        raise NotImplementedError(f"{type(self).__name__} does not define make_levels")

    def cluster(self, features: Tensor, places: Tensor, seed: int) -> None:
        """Fills the levels from the features of the training samples at ``places``."""
        raise NotImplementedError(f"{type(self).__name__} does not define cluster")

    def before_epoch(self, epoch: int, samples: Samples) -> None:
        """Clusters the teacher's features of the whole training set."""
        if epoch < self.hyperparameters.warmup_epochs:
            return
        rows, seen = encode_all(
            samples(), lambda batch: normalize(self.teacher(batch.views[0])), self.dataset_size, self.teacher
        )
        self.cluster(rows[seen], seen.nonzero().squeeze(1), key(_KMEANS, self.seed, epoch))

    def forward(self, batch: Batch) -> Output:
        """MoCo's loss during the warm-up, then the method's own."""
        metrics: dict[str, Tensor] = {}
        queries, keys = self.queries_and_keys(batch)
        method = self.clustered_loss if self.clustered else self.momentum_contrast
        return Output(method(queries, keys, batch.index, metrics), metrics)

    def momentum_contrast(self, queries: Tensor, keys: Tensor, index: Tensor, metrics: dict[str, Tensor]) -> Tensor:
        """MoCo's loss of queries and keys ``(batch, dim)``."""
        value: Tensor = self.loss(queries, keys, self.queue.rows, metrics=metrics)
        return value

    def clustered_loss(self, queries: Tensor, keys: Tensor, index: Tensor, metrics: dict[str, Tensor]) -> Tensor:
        """The loss of the samples at ``index (batch,)`` once there are clusters."""
        raise NotImplementedError(f"{type(self).__name__} does not define clustered_loss")

    def rooms(self) -> list[ClusterLevel]:
        """The clusterings, typed."""
        return [cast(ClusterLevel, level) for level in self.levels]

    @property
    def clustered(self) -> bool:
        """Whether the warm-up is over."""
        return bool(self.epoch >= self.hyperparameters.warmup_epochs)


@register
class PCL(PrototypicalObjective):
    """PCL: a query finds its key among past keys, and the centroid of its cluster among centroids.

    ``L = InfoNCE(v, v', queue) + 1/M sum_m prototype_contrast(v, c^m, phi^m)``, see
    :func:`armillary.losses.cluster_contrast.prototype_contrast`; M clusterings of different sizes. Of more centroids
    than ``negative_prototypes`` a random part stands in the denominator. In the released code another sample's centroid
    enters even when it is the own, as a negative; here a centroid counts once.
    """

    name = "pcl"
    catalog_id = "pcl"
    citation = Citation(
        "Junnan Li, Pan Zhou, Caiming Xiong, Steven C. H. Hoi",
        "Prototypical Contrastive Learning of Unsupervised Representations",
        2021,
        "ICLR",
        "https://arxiv.org/abs/2005.04966",
    )
    needs = _NEEDS
    convergence = Convergence(
        margin=0.04,
        job={**_SMALL, "objective.clusters": [20, 50]},
        reason="clusters join the loss after the warm-up, so that their part of it must fall",
        falls="prototype_loss",
    )

    class Hyperparameters(PrototypicalHyperparameters):
        """Clusterings, queue, momentum, projector."""

        clusters: ClusterCounts | None = Field(
            None,
            min_length=1,
            max_length=8,
            description="sizes of the M clusterings; null: 25,000, 50,000, 100,000, fewer below 1.28 M images",
        )
        negative_prototypes: int = Field(16384, ge=1, le=1_000_000, description="r, centroids in the denominator")

    def make_levels(self, context: BuildContext) -> Sequence[ClusterLevel]:
        """One of each size."""
        options = self.hyperparameters
        return [
            ClusterLevel(size, options.projection_dim, context.dataset_size)
            for size in cluster_counts(options.clusters, (25_000, 50_000, 100_000), context.num_samples)
        ]

    def cluster(self, features: Tensor, places: Tensor, seed: int) -> None:
        """M times k-means."""
        options = self.hyperparameters
        for number, level in enumerate(self.rooms()):
            found = kmeans(features, min(len(level.prototypes), len(features)), seed=key(seed, number))
            level.take(found, options.temperature, options.smoothing, places)

    def clustered_loss(self, queries: Tensor, keys: Tensor, index: Tensor, metrics: dict[str, Tensor]) -> Tensor:
        """MoCo's loss and the mean over clusterings."""
        terms = [
            prototype_contrast(queries, level.prototypes, level.widths, level.assigned[index], self._allowed(level))
            for level in self.rooms()
        ]
        prototype = torch.stack(terms).mean()
        metrics["prototype_loss"] = prototype.detach()
        return self.momentum_contrast(queries, keys, index, metrics) + prototype

    def _allowed(self, level: ClusterLevel) -> Tensor | None:
        """A random part of the centroids, where there are more than wanted."""
        count, wanted = len(level.prototypes), self.hyperparameters.negative_prototypes
        if count - 1 <= wanted:
            return None
        order = sample_keys(key(_SUBSET, self.seed, self.step), torch.arange(count, device=level.prototypes.device))
        place: Tensor = order.argsort(stable=True).argsort(stable=True)
        allowed: Tensor = (place < wanted)[None, :]
        return allowed


@register
class HCSC(PrototypicalObjective):
    """HCSC: clusters in levels, and negatives that are likely of another cluster than the query.

    ``L = sum_l InfoNCE(z, z', chosen negatives) + 1/L sum_l prototype_contrast(z, chosen prototypes)``; a negative is
    kept with :func:`armillary.losses.cluster_contrast.keep_probability`, a prototype with that of its parent level, on
    the top level always. The query's cluster is the most similar prototype of each level. Draws depend on the seed, the
    step and the sample.
    """

    name = "hcsc"
    catalog_id = "hcsc"
    citation = Citation(
        "Yuanfan Guo, Minghao Xu, Jiawen Li, Bingbing Ni, Xuanyu Zhu, Zhenbang Sun, Yi Xu",
        "HCSC: Hierarchical Contrastive Selective Coding",
        2022,
        "CVPR",
        "https://arxiv.org/abs/2202.00455",
    )
    needs = replace(_NEEDS, recipe="moco_v2")
    convergence = Convergence(
        margin=0.04,
        job={**_SMALL, "objective.clusters": [50, 20, 8], "views.blur": 0.0},
        reason="clusters join the loss after the warm-up, so that their part of it must fall",
        falls="prototype_loss",
    )

    class Hyperparameters(PrototypicalHyperparameters):
        """The hierarchy, what is selected, queue, momentum, projector."""

        clusters: ClusterCounts | None = Field(
            None,
            min_length=1,
            max_length=8,
            description="clusters of each level, finest first; null: 3000, 2000, 1000, fewer below 38 k images",
        )
        instance_selection: bool = Field(True, description="draw the negatives of the queue")
        prototype_selection: bool = Field(True, description="draw the prototypes of the lower levels")

    def make_levels(self, context: BuildContext) -> Sequence[ClusterLevel]:
        """Each level's members are the clusters of the one below, the lowest one's the samples."""
        options, members, levels = self.hyperparameters, context.dataset_size, []
        for size in cluster_counts(options.clusters, (3000, 2000, 1000), context.num_samples):
            count = min(size, members)
            levels.append(ClusterLevel(count, options.projection_dim, members))
            members = count
        return levels

    def cluster(self, features: Tensor, places: Tensor, seed: int) -> None:
        """k-means of the features, of its centroids, and so on."""
        options, sizes, most = self.hyperparameters, [], len(features)
        for level in self.rooms():
            most = min(most, len(level.prototypes))
            sizes.append(most)
        for number, (level, found) in enumerate(zip(self.rooms(), hierarchy(features, sizes, seed=seed), strict=True)):
            level.take(found, options.temperature, options.smoothing, None if number else places)

    def clustered_loss(self, queries: Tensor, keys: Tensor, index: Tensor, metrics: dict[str, Tensor]) -> Tensor:
        """Both selective losses."""
        unit = normalize(widen(queries.detach()))
        # Rows of zeros have cosine 0: a query that is far from all clusters must not be given to one of those.
        cosines = [
            (unit @ level.prototypes.to(unit.dtype).T).masked_fill(level.prototypes.abs().sum(1) == 0, -torch.inf)
            for level in self.rooms()
        ]
        own = [cosine.argmax(dim=1) for cosine in cosines]
        levels = range(len(own))
        instance = torch.stack([self._instances(number, queries, keys, own, index) for number in levels]).sum()
        prototype = torch.stack([self._prototypes(number, queries, own, index) for number in levels]).mean()
        metrics.update(instance_loss=instance.detach(), prototype_loss=prototype.detach())
        return instance + prototype

    def _instances(self, number: int, queries: Tensor, keys: Tensor, own: list[Tensor], index: Tensor) -> Tensor:
        level, negatives = self.rooms()[number], self.queue.rows.to(keys.dtype)
        keep = torch.ones(len(keys), len(negatives), dtype=torch.bool, device=keys.device)
        if self.hyperparameters.instance_selection:
            chance = keep_probability(
                negatives, level.prototypes.to(keys.dtype), level.widths.to(keys.dtype), own[number]
            )
            keep = self._drawn(_INSTANCES, number, index, chance)
        return selected_instance_contrast(queries, keys, negatives, keep, self.hyperparameters.temperature).mean()

    def _prototypes(self, number: int, queries: Tensor, own: list[Tensor], index: Tensor) -> Tensor:
        level, allowed = self.rooms()[number], None
        if self.hyperparameters.prototype_selection and number + 1 < len(self.levels):
            above = self.rooms()[number + 1]
            parent = above.assigned[own[number]]
            chance = keep_probability(level.prototypes, above.prototypes, above.widths, parent)
            allowed = self._drawn(_PROTOTYPES, number, index, chance)
        return prototype_contrast(queries, level.prototypes, level.widths, own[number], allowed).mean()

    def _drawn(self, purpose: int, number: int, index: Tensor, chance: Tensor) -> Tensor:
        """Which of the columns each sample keeps: true with its chance."""
        keys = sample_keys(key(purpose, number, self.seed, self.step), index)
        return uniforms(keys, chance.shape[1]).to(chance.dtype) < chance
