"""Objectives that cluster while they learn: SwAV, PCL, HCSC, MiCE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from armillary import collectives
from armillary.components.bank import encode_all
from armillary.components.clustering import Clusters, concentrations, hierarchy, kmeans
from armillary.components.collapse import CollapseMonitor
from armillary.components.counter import key, sample_keys, uniforms
from armillary.components.heads import Projector, Prototypes
from armillary.components.queue import Queue
from armillary.components.schedules import Schedule
from armillary.components.sinkhorn import sinkhorn
from armillary.components.teacher import Teacher
from armillary.losses.cluster_contrast import (
    SwappedPrediction,
    expert_log_likelihoods,
    keep_probability,
    mixture_loss,
    prototype_contrast,
    selected_instance_contrast,
)
from armillary.losses.tensors import normalize, widen
from armillary.objectives import base
from armillary.objectives.base import Batch, BuildContext, Citation, Convergence, Needs, Objective, Output, Samples
from armillary.objectives.queue_contrastive import MomentumQueueObjective, QueueHyperparameters
from armillary.objectives.registry import register

_KMEANS, _SUBSET, _INSTANCES, _PROTOTYPES = 71, 72, 73, 74
ClusterCounts = tuple[Annotated[int, Field(ge=2, le=10_000_000)], ...]


@register
class SwAV(Objective):
    """SwAV: every crop predicts the soft cluster of the large ones; clusters are learned and equally filled.

    Loss: :class:`armillary.losses.cluster_contrast.SwappedPrediction`. Codes come from Sinkhorn's equal partition of
    the global batch, beside which past projections may stand (one queue a large view, used once full). Prototypes have
    unit length, learn by gradient and stand still in the first steps. The survey calls them centres of an online
    k-means, which they are not; its loss is this one.
    """

    name = "swav"
    family = "clustering"
    catalog_id = "swav"
    citation = Citation(
        "Mathilde Caron, Ishan Misra, Julien Mairal, Priya Goyal, Piotr Bojanowski, Armand Joulin",
        "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments",
        2020,
        "NeurIPS",
        "https://arxiv.org/abs/2006.09882",
    )
    needs = Needs(views=8, recipe="multicrop", components=("projector", "prototypes", "queue"), batch_coupled=True)
    waivers: ClassVar[Mapping[str, str]] = {"gradcheck": "codes are targets: no gradient passes through Sinkhorn"}
    convergence = Convergence(
        margin=0.01,
        reason="codes are nearly even for the first few hundred steps",
        job={
            "views.name": "multicrop_small",
            "views.local_crops": 2,
            "backbone.pool": "mean",
            "objective.local_crops": 2,
            "objective.prototypes": 60,
            "objective.projection_dim": 64,
            "objective.projection_hidden": 256,
            "objective.frozen_steps": 20,
        },
    )

    class Hyperparameters(base.Hyperparameters):
        """Crops, prototypes, codes, queue, projector."""

        local_crops: int = Field(6, ge=0, le=32, description="small crops beside the two large ones")
        prototypes: int = Field(3000, ge=2, le=1_000_000, description="K; about three times the classes, or more")
        temperature: float = Field(0.1, ge=0.005, le=10, description="tau, of the predictions")
        epsilon: float = Field(0.05, ge=0.001, le=10, description="Sinkhorn's temperature, of the codes")
        iterations: int = Field(3, ge=1, le=100, description="passes of Sinkhorn")
        queue_size: int = Field(0, ge=0, le=1_048_576, description="past projections per large view; 0: none")
        queue_start: int = Field(15, ge=0, le=10_000, description="epoch from which the queue is used")
        frozen_steps: int = Field(313, ge=0, le=1_000_000, description="first steps without a gradient to prototypes")
        projection_dim: int = Field(128, ge=2, le=8192, description="width of the projection")
        projection_hidden: int = Field(2048, ge=2, le=65536, description="width of the hidden layer")

    @classmethod
    def needs_for(cls, hyperparameters: Any) -> Needs:
        """Two large crops and the wanted number of small ones."""
        crops = hyperparameters.local_crops
        return replace(cls.needs, views=2 + crops, recipe_options={"local_crops": crops})

    def build(self, context: BuildContext) -> None:
        """Makes projector, prototypes, queues and loss."""
        options = self.hyperparameters
        self.projector = Projector(context.embedding_dim, options.projection_hidden, options.projection_dim, 2)
        self.prototypes = Prototypes(options.projection_dim, options.prototypes)
        size, shape = options.queue_size, (options.projection_dim,)
        self.queues = nn.ModuleList(Queue(size, shape, start="zeros") for _ in range(2 if size else 0))
        self.loss, self.collapse = SwappedPrediction(options.temperature), CollapseMonitor()

    def forward(self, batch: Batch) -> Output:
        """The loss of all crops."""
        frozen = self.step < self.hyperparameters.frozen_steps
        embeddings = self.encoder(torch.cat(batch.views[:2]))
        self.collapse.update(embeddings)
        projections = [*self.projector(embeddings).chunk(2)]
        if len(batch.views) > 2:
            small = self.projector(self.encoder(torch.cat(batch.views[2:])))
            projections += small.chunk(len(batch.views) - 2)
        scores = torch.stack([self.prototypes(projection, frozen) for projection in projections])
        codes = torch.stack([self._codes(view, scores[view].detach()) for view in range(2)])
        for view in range(len(self.queues)):
            self._queue(view).hold(self.step, normalize(widen(projections[view])))
        self.collapse.update_assignments(codes.flatten(0, 1))
        loss = self.loss(scores, codes)
        return Output(loss, {"code_confidence": codes.amax(dim=2).mean()})

    def _codes(self, view: int, scores: Tensor) -> Tensor:
        options = self.hyperparameters
        shared = None
        if self.queues and self.epoch >= options.queue_start and len(self._queue(view)) == options.queue_size:
            shared = self.prototypes(self._queue(view).rows).detach()
        return sinkhorn(scores, options.epsilon, options.iterations, shared)

    def _queue(self, view: int) -> Queue:
        return cast(Queue, self.queues[view])

    def after_step(self, step: int) -> None:
        """Puts the step's projections into the queues."""
        for view in range(len(self.queues)):
            self._queue(view).write()

    def epoch_metrics(self) -> dict[str, Tensor]:
        """Collapse, and the use of the prototypes."""
        return self.collapse.metrics()


class ClusterLevel(nn.Module):
    """One clustering of the training set, rebuilt every epoch: what PCL and HCSC compare with; buffers only.

    ``prototypes (k, dim)`` of unit length, rows of zeros where there is no cluster; ``widths (k,)``; ``assigned`` gives
    the cluster of a sample by its index (level 1), or of a cluster of the level below.
    """

    prototypes: Tensor
    widths: Tensor
    assigned: Tensor

    def __init__(self, clusters: int, dim: int, members: int) -> None:
        super().__init__()
        self.register_buffer("prototypes", torch.zeros(clusters, dim))
        self.register_buffer("widths", torch.ones(clusters))
        self.register_buffer("assigned", torch.zeros(members, dtype=torch.int64))

    def take(self, found: Clusters, temperature: float, smoothing: float, places: Tensor | None = None) -> None:
        """Takes over a clustering; ``places`` are the members that were clustered, all by default."""
        count = len(found.centroids)
        self.prototypes.zero_()
        self.prototypes[:count] = found.prototypes.to(self.prototypes.dtype)
        self.widths[:count] = concentrations(found, temperature, smoothing).to(self.widths.dtype)
        self.assigned[slice(len(found.labels)) if places is None else places] = found.labels


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
    needs = Needs(views=2, recipe="moco_v1", components=("projector", "teacher", "queue", "clusters"))
    convergence = Convergence(
        margin=0.04,
        job={
            "objective.queue_size": 256,
            "objective.momentum": 0.99,
            "objective.projection_dim": 64,
            "objective.projection_hidden": 256,
            "objective.clusters": [20, 50],
            "objective.warmup_epochs": 3,
        },
    )

    class Hyperparameters(PrototypicalHyperparameters):
        """Clusterings, queue, momentum, projector."""

        clusters: ClusterCounts = Field(
            (25_000, 50_000, 100_000),
            min_length=1,
            max_length=8,
            description="sizes of the M clusterings, cut to data",
        )
        negative_prototypes: int = Field(16384, ge=1, le=1_000_000, description="r, centroids in the denominator")

    def make_levels(self, context: BuildContext) -> Sequence[ClusterLevel]:
        """One of each size."""
        options = self.hyperparameters
        return [
            ClusterLevel(min(size, context.num_samples), options.projection_dim, context.dataset_size)
            for size in options.clusters
        ]

    def cluster(self, features: Tensor, places: Tensor, seed: int) -> None:
        """M times k-means."""
        options = self.hyperparameters
        for number, level in enumerate(self.rooms()):
            found = kmeans(features, min(len(level.prototypes), len(features)), seed=key(seed, number))
            level.take(found, options.temperature, options.smoothing, places)

    def forward(self, batch: Batch) -> Output:
        """MoCo's loss and the mean over clusterings."""
        metrics: dict[str, Tensor] = {}
        queries = self.projector(self.encoder(batch.views[0]))
        keys = normalize(widen(self.teacher(batch.views[1])))
        self.queue.hold(self.step, keys)
        loss = self.loss(queries, keys, self.queue.rows, metrics=metrics)
        if self.clustered:
            terms = [
                prototype_contrast(
                    queries, level.prototypes, level.widths, level.assigned[batch.index], self._allowed(level)
                )
                for level in self.rooms()
            ]
            prototype = torch.stack(terms).mean()
            metrics["prototype_loss"] = prototype.detach()
            loss = loss + prototype
        return Output(loss, metrics)

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
    needs = Needs(views=2, recipe="moco_v2", components=("projector", "teacher", "queue", "clusters"))
    convergence = Convergence(
        margin=0.04,
        job={
            "objective.queue_size": 256,
            "objective.momentum": 0.99,
            "objective.projection_dim": 64,
            "objective.projection_hidden": 256,
            "objective.clusters": [50, 20, 8],
            "objective.warmup_epochs": 3,
            "views.blur": 0.0,
        },
    )

    class Hyperparameters(PrototypicalHyperparameters):
        """The hierarchy, what is selected, queue, momentum, projector."""

        clusters: ClusterCounts = Field(
            (3000, 2000, 1000), min_length=1, max_length=8, description="clusters of each level, finest first"
        )
        instance_selection: bool = Field(True, description="draw the negatives of the queue")
        prototype_selection: bool = Field(True, description="draw the prototypes of the lower levels")

    def make_levels(self, context: BuildContext) -> Sequence[ClusterLevel]:
        """Each level's members are the clusters of the one below, the lowest one's the samples."""
        options, members, levels = self.hyperparameters, context.dataset_size, []
        for size in options.clusters:
            count = min(size, context.num_samples, members)
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

    def forward(self, batch: Batch) -> Output:
        """Both selective losses; MoCo's during the warm-up."""
        metrics: dict[str, Tensor] = {}
        queries = self.projector(self.encoder(batch.views[0]))
        keys = normalize(widen(self.teacher(batch.views[1])))
        self.queue.hold(self.step, keys)
        if not self.clustered:
            return Output(self.loss(queries, keys, self.queue.rows, metrics=metrics), metrics)
        unit = normalize(widen(queries.detach()))
        # Rows of zeros have cosine 0: a query that is far from all clusters must not be given to one of those.
        cosines = [
            (unit @ level.prototypes.to(unit.dtype).T).masked_fill(level.prototypes.abs().sum(1) == 0, -torch.inf)
            for level in self.rooms()
        ]
        own = [cosine.argmax(dim=1) for cosine in cosines]
        levels = range(len(own))
        instance = torch.stack([self._instances(number, queries, keys, own, batch.index) for number in levels]).sum()
        prototype = torch.stack([self._prototypes(number, queries, own, batch.index) for number in levels]).mean()
        metrics.update(instance_loss=instance.detach(), prototype_loss=prototype.detach())
        return Output(instance + prototype, metrics)

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


@register
class MiCE(Objective):
    """MiCE: a mixture of contrastive experts, one a cluster, chosen by a gate.

    ``L = -mean log sum_k pi_k p(y | x, k)``, the bound of the paper at its exact posterior; gates
    ``pi = softmax(omega.g / kappa)`` towards fixed directions omega as far apart as can be, likelihoods
    :func:`armillary.losses.cluster_contrast.expert_log_likelihoods`. The experts' centres mu learn by gradient and are
    put, before every epoch, to the mean direction of the keys their experts won; one that won none stays. Views: the
    student's, the teacher's, the gate's. kappa and tau are one temperature.
    """

    name = "mice"
    family = "clustering"
    catalog_id = "mice"
    citation = Citation(
        "Tsung Wei Tsai, Chongxuan Li, Jun Zhu",
        "MiCE: Mixture of Contrastive Experts for Unsupervised Image Clustering",
        2021,
        "ICLR",
        "https://arxiv.org/abs/2105.01899",
    )
    needs = Needs(views=3, recipe="moco_v1", components=("projector", "teacher", "queue", "prototypes"))
    convergence = Convergence(
        margin=0.06,
        job={
            "objective.experts": 8,
            "objective.queue_size": 256,
            "objective.momentum": 0.99,
            "objective.projection_dim": 16,
            "objective.projection_hidden": 128,
            "objective.temperature": 0.3,
        },
    )

    wins: Tensor
    start: Tensor
    directions: Tensor

    class Hyperparameters(base.Hyperparameters):
        """Experts, queue, momentum, heads."""

        experts: int = Field(10, ge=2, le=1000, description="K, experts: one a cluster")
        temperature: float = Field(1.0, ge=0.01, le=10, description="tau and kappa")
        queue_size: int = Field(16384, ge=1, le=1_048_576, description="past keys of every expert; 2048 if small")
        momentum: float = Field(0.999, ge=0, le=1, description="share of the old teacher a step keeps; 0.99 if short")
        projection_dim: int = Field(128, ge=2, le=4096, description="d, width of an expert's embedding")
        projection_hidden: int = Field(512, ge=2, le=65536, description="width of the hidden layer")

    def build(self, context: BuildContext) -> None:
        """Makes experts, gate, teacher, queue and centres."""
        options = self.hyperparameters
        count, dim = options.experts, options.projection_dim
        self.experts = Projector(context.embedding_dim, options.projection_hidden, count * dim, 2, norm=False)
        self.gate = Projector(context.embedding_dim, options.projection_hidden, dim, 2, norm=False)
        momentum = Schedule(options.momentum, options.momentum, 0, "constant")
        self.teacher = Teacher(self, ("encoder", "experts"), momentum)
        self.queue = Queue(options.queue_size, (count, dim))
        # mu is start + drift: what is reset lies outside the optimizer, whose engine may have sharded the parameter.
        self.drift = nn.Parameter(torch.zeros(count, dim))
        self.register_buffer("start", normalize(torch.randn(count, dim)))
        self.register_buffer("wins", torch.zeros(count, dim))
        self.register_buffer("directions", separated_directions(count, dim))
        self._won: tuple[Tensor, Tensor] | None = None

    def before_epoch(self, epoch: int, samples: Samples) -> None:
        """Puts every centre where the keys lie that its expert won."""
        won = self.wins.abs().sum(dim=1, keepdim=True) > 0
        self.start.copy_(torch.where(won, normalize(self.wins) - self.drift.detach().to(self.wins.dtype), self.start))
        self.wins.zero_()

    def forward(self, batch: Batch) -> Output:
        """Minus the mean log likelihood."""
        options = self.hyperparameters
        shape = (len(batch.index), options.experts, options.projection_dim)
        student, teacher, gating = batch.views
        embeddings = self.encoder(torch.cat([student, gating]))
        own, other = embeddings.chunk(2)
        keys = normalize(widen(self.teacher(teacher)).view(shape))
        gate = normalize(widen(self.gate(other)))
        logits = gate @ self.directions.to(gate.dtype).T / options.temperature
        centres = self.start.to(gate.dtype) + widen(self.drift)
        likelihoods = expert_log_likelihoods(
            self.experts(own).view(shape), keys, centres, self.queue.rows, options.temperature
        )
        gates = logits.log_softmax(dim=1)
        winner = (gates + likelihoods).detach().argmax(dim=1)
        self.queue.hold(self.step, keys)
        self._won = (winner, keys.detach().gather(1, winner[:, None, None].expand(-1, 1, shape[2])).squeeze(1))
        posterior = (gates + likelihoods).detach().softmax(dim=1)
        return Output(mixture_loss(gates, likelihoods), {"posterior_confidence": posterior.amax(dim=1).mean()})

    def after_step(self, step: int) -> None:
        """Moves the teacher, fills the queue, remembers who won what."""
        self.teacher.update(self, step)
        self.queue.write()
        if self._won is not None:
            winner, keys = self._won
            local = torch.zeros_like(self.wins).index_add_(0, winner, keys.to(self.wins.dtype))
            self.wins += collectives.all_reduce_sum(local)
            self._won = None


def separated_directions(count: int, dim: int) -> Tensor:
    """Unit vectors ``(count, dim)`` as far apart as can be: a simplex where it fits, random ones beyond."""
    if count > dim + 1:
        return normalize(torch.randn(count, dim))
    # The corners of a simplex, less their mean, span count - 1 dimensions.
    corners = torch.eye(count) - 1 / count
    basis = torch.linalg.svd(corners).Vh[: count - 1]
    flat = normalize(corners @ basis.T)
    return torch.cat([flat, torch.zeros(count, dim - (count - 1))], dim=1)
