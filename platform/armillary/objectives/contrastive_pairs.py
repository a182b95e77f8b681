"""Pairs of views against other images: density ratios, hard and mixed negatives, alignment and spread."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from armillary import collectives, losses
from armillary.components.counter import integers, key, sample_keys, uniforms
from armillary.components.queue import Queue
from armillary.losses.hard_negatives import HardNegativeNCE, MixedNegatives, Mixtures
from armillary.losses.info_nce import InfoNCE
from armillary.losses.noise_contrast import NCE
from armillary.losses.self_distillation import KoLeo
from armillary.losses.tensors import float32_math, normalize, widen
from armillary.losses.uniformity import AlignUniform
from armillary.objectives.base import Batch, BuildContext, Citation, Convergence, Needs, Objective, Output
from armillary.objectives.base import Hyperparameters as Base
from armillary.objectives.bases import ProjectedViewsObjective
from armillary.objectives.contrastive import ProjectionHyperparameters
from armillary.objectives.queue_contrastive import SHUFFLED_WAIVER, MoCoV2
from armillary.objectives.registry import register

_NOISE, _MIXTURE = 71, 72
_SMALL = {"objective.projection_dim": 64, "objective.projection_hidden": 256}
_VIEWS = Needs(views=2, recipe="simclr", batch_coupled=True)


@register
class InfoNCEObjective(ProjectedViewsObjective):
    """InfoNCE: a view must find the other view of its image among the other views of the batch.

    Equation and shapes: :class:`armillary.losses.info_nce.InfoNCE`. ``critic: bilinear`` scores with ``q^T W k`` of
    plain projections, as contrastive predictive coding does; tau has no part in it.
    """

    name = "info_nce"
    family = "contrastive_views"
    catalog_id = "info_nce"
    citation = Citation(
        "Aaron van den Oord, Yazhe Li, Oriol Vinyals",
        "Representation Learning with Contrastive Predictive Coding",
        2018,
        "arXiv",
        "https://arxiv.org/abs/1807.03748",
    )
    convergence = Convergence(job={**_SMALL, "objective.temperature": 0.2})

    class Hyperparameters(ProjectionHyperparameters):
        """Temperature, direction and critic of the loss, shape of the projector."""

        temperature: float = Field(0.07, ge=0.005, le=10, description="divides the cosines; 0.2 suits small images")
        symmetric: bool = Field(False, description="average both directions")
        critic: Literal["cosine", "bilinear"] = Field("cosine", description="how a pair is scored")

    def build(self, context: BuildContext) -> None:
        """Makes projector, critic and loss."""
        super().build(context)
        options = self.hyperparameters
        bilinear = options.critic == "bilinear"
        self.loss = InfoNCE(1.0 if bilinear else options.temperature, normalized=not bilinear)
        width = options.projection_dim
        # A fresh identity scaled down, so that products of wide vectors start near 1.
        self.critic = nn.Parameter(torch.eye(width) / width**0.5) if bilinear else None

    def forward(self, batch: Batch) -> Output:
        """The loss of the first view's projections as queries and the second's as keys."""
        metrics: dict[str, Tensor] = {}
        queries, keys = widen(self.project(batch.views)).chunk(2)
        if self.critic is not None:
            queries = self._scored(queries, self.critic)
        loss = self.loss(queries, keys, metrics=metrics)
        if self.hyperparameters.symmetric:
            loss = (loss + self.loss(keys, queries)) / 2
        # What query and key tell of each other at least, in nats.
        metrics["mutual_information"] = math.log(len(keys) * collectives.world_size()) - loss.detach()
        return Output(loss, metrics)

    @staticmethod
    @float32_math
    def _scored(queries: Tensor, critic: Tensor) -> Tensor:
        return queries @ critic


@register
class NTXentObjective(ProjectedViewsObjective):
    """NT-Xent: SimCLR's loss at the temperature of small images.

    Equation and shapes: :class:`armillary.losses.NTXent`. ``simclr`` is the same loss with ImageNet's temperature.
    """

    name = "nt_xent"
    family = "contrastive_views"
    catalog_id = "nt_xent"
    citation = Citation(
        "Ting Chen, Simon Kornblith, Mohammad Norouzi, Geoffrey Hinton",
        "A Simple Framework for Contrastive Learning of Visual Representations",
        2020,
        "ICML",
        "https://arxiv.org/abs/2002.05709",
    )
    convergence = Convergence(job=_SMALL)

    class Hyperparameters(ProjectionHyperparameters):
        """Temperature of the loss, shape of the projector."""

        temperature: float = Field(0.5, ge=0.005, le=10, description="divides the cosines")

    def build(self, context: BuildContext) -> None:
        """Makes projector and loss."""
        super().build(context)
        self.loss = losses.NTXent(self.hyperparameters.temperature)

    def forward(self, batch: Batch) -> Output:
        """The loss of the two views' projections."""
        metrics: dict[str, Tensor] = {}
        view1, view2 = self.project(batch.views).chunk(2)
        return Output(self.loss(view1, view2, metrics=metrics), metrics)


@register
class NCEObjective(ProjectedViewsObjective):
    """NCE: the other view of an image is told from noise, keys of earlier steps, by a density that learns its norm.

    Equation: :class:`armillary.losses.noise_contrast.NCE`. The paper estimates densities of images; what is modelled
    here is the density of a key given a query, ``log p_m(k | q) = cos(q, k) / tau - c - log K``, over a universe as
    large as the queue of K keys, against their uniform distribution ``p_n = 1 / K``, of which nu are drawn for each
    query. c is the log-partition, a parameter that starts at its value for random directions.
    """

    name = "nce"
    family = "density_ratio"
    catalog_id = "nce"
    citation = Citation(
        "Michael U. Gutmann, Aapo Hyvärinen",
        "Noise-Contrastive Estimation of Unnormalized Statistical Models, with Applications to Natural Image "
        "Statistics",
        2012,
        "JMLR",
        "https://jmlr.org/papers/v13/gutmann12a.html",
    )
    needs = Needs(views=2, recipe="simclr", components=("projector", "queue"))
    convergence = Convergence(job={**_SMALL, "objective.queue_size": 64, "objective.temperature": 0.2})

    class Hyperparameters(ProjectionHyperparameters):
        """Noise, temperature, normaliser, shape of the projector."""

        nu: int = Field(10, ge=1, le=1000, description="noise samples of each query")
        learn_log_z: bool = Field(True, description="train the log-partition; otherwise it stays at its start")
        temperature: float = Field(0.07, ge=0.005, le=10, description="divides the cosines; 0.2 suits small images")
        queue_size: int = Field(4096, ge=1, le=1_048_576, description="K, keys of earlier steps")
        queue_host: bool = Field(False, description="keep the queue in main memory; costs a copy a step")

    def build(self, context: BuildContext) -> None:
        """Makes projector, queue, log-partition and loss."""
        super().build(context)
        options = self.hyperparameters
        self.seed, self.loss = context.seed, NCE()
        self.queue = Queue(options.queue_size, (options.projection_dim,), host=options.queue_host)
        # A product of random unit vectors is nearly normal with variance 1 / dim.
        start = torch.tensor([1 / (2 * options.projection_dim * options.temperature**2)])
        self.log_z = nn.Parameter(start, requires_grad=options.learn_log_z)

    def forward(self, batch: Batch) -> Output:
        """The loss of queries of the first view, keys of the second, noise from the queue."""
        queries, keys = widen(self.project(batch.views)).chunk(2)
        drawn = sample_keys(key(_NOISE, self.seed, self.step), batch.index)
        noise = self.queue.rows[integers(drawn, self.hyperparameters.nu, len(self.queue.rows))]
        loss, metrics = self._loss(queries, keys, noise)
        self.queue.hold(self.step, normalize(keys))
        return Output(loss, metrics)

    def _loss(self, queries: Tensor, keys: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast(queries.device.type, enabled=False):
            q, k = normalize(queries), normalize(keys)
            cosines = torch.einsum("bd,bnd->bn", q, noise.to(q.dtype))
            positive = (q * k).sum(dim=1)
            # log p_m - log p_n: the K of both cancels.
            ratios = [value / self.hyperparameters.temperature - self.log_z for value in (positive, cosines)]
            loss = self.loss(ratios[0], ratios[0].new_zeros(()), ratios[1], ratios[1].new_zeros(()))
        metrics = {"positive_cosine": positive.mean(), "noise_cosine": cosines.mean(), "log_z": self.log_z.mean()}
        return loss, {name: value.detach() for name, value in metrics.items()}

    def after_step(self, step: int) -> None:
        """Puts the step's keys into the queue."""
        self.queue.write()


@register
class HardNegativeNCEObjective(ProjectedViewsObjective):
    """Contrastive learning with hard, debiased negatives: similar images repel more, expected positives are deducted.

    Equation and shapes: :class:`armillary.losses.hard_negatives.HardNegativeNCE`. ``beta: 0`` is the debiased loss of
    Chuang et al. 2020.
    """

    name = "hard_negative_nce"
    family = "contrastive_views"
    catalog_id = "hard_negative_nce"
    citation = Citation(
        "Joshua Robinson, Ching-Yao Chuang, Suvrit Sra, Stefanie Jegelka",
        "Contrastive Learning with Hard Negative Samples",
        2021,
        "ICLR",
        "https://arxiv.org/abs/2010.04592",
    )
    waivers: ClassVar[Mapping[str, str]] = {
        "gradcheck[hard_negative_nce-detach_weights=True]": "the weights are constants: no gradient passes through them"
    }
    convergence = Convergence(job=_SMALL)

    class Hyperparameters(ProjectionHyperparameters):
        """Arguments of :class:`armillary.losses.hard_negatives.HardNegativeNCE`, shape of the projector."""

        beta: float = Field(1.0, ge=0, le=20, description="concentration on hard negatives; 0 weighs all alike")
        tau_plus: float = Field(0.1, ge=0, le=0.9, description="share of negatives of the anchor's own class, guessed")
        temperature: float = Field(0.5, ge=0.005, le=10, description="divides the cosines")
        detach_weights: bool = Field(False, description="no gradient through the weights")

    def build(self, context: BuildContext) -> None:
        """Makes projector and loss."""
        super().build(context)
        options = self.hyperparameters
        self.loss = HardNegativeNCE(options.beta, options.tau_plus, options.temperature, options.detach_weights)

    def forward(self, batch: Batch) -> Output:
        """The loss of the two views' projections."""
        metrics: dict[str, Tensor] = {}
        view1, view2 = self.project(batch.views).chunk(2)
        return Output(self.loss(view1, view2, metrics=metrics), metrics)


@register
class MoCHi(MoCoV2):
    """MoCHi: MoCo v2 with negatives mixed from the hardest keys of the queue, and from those and the query.

    Equation and shapes: :class:`armillary.losses.hard_negatives.MixedNegatives`. Pairs and shares are drawn by sample
    and step; mixing starts after ``warmup_epochs``, of which the number is not certain (10 or 15).
    """

    name = "mochi"
    catalog_id = "mochi"
    citation = Citation(
        "Yannis Kalantidis, Mert Bulent Sariyildiz, Noe Pion, Philippe Weinzaepfel, Diane Larlus",
        "Hard Negative Mixing for Contrastive Learning",
        2020,
        "NeurIPS",
        "https://arxiv.org/abs/2010.01028",
    )
    waivers: ClassVar[Mapping[str, str]] = {
        "gradcheck": "what is mixed of a query is a constant",
        **SHUFFLED_WAIVER,
    }
    convergence = Convergence(
        job={
            "objective.queue_size": 256,
            "objective.momentum": 0.99,
            "objective.projection_dim": 64,
            "objective.projection_hidden": 256,
            "objective.hardest": 64,
            "objective.pairs": 32,
            "objective.query_pairs": 8,
            "objective.warmup_epochs": 0,
            "views.blur": 0.0,
        }
    )

    class Hyperparameters(MoCoV2.Hyperparameters):
        """Mixtures, and the options of MoCo v2."""

        hardest: int = Field(1024, ge=1, le=65536, description="N, hardest keys that are mixed")
        pairs: int = Field(1024, ge=0, le=65536, description="s, mixtures of two keys")
        query_pairs: int = Field(128, ge=0, le=65536, description="s', mixtures of a key and the query")
        warmup_epochs: int = Field(15, ge=0, le=1000, description="epochs of plain MoCo before")

    def build(self, context: BuildContext) -> None:
        """Makes projector, key encoder, queue and loss."""
        super().build(context)
        self.seed = context.seed
        self.mixing = MixedNegatives(self.hyperparameters.hardest, self.hyperparameters.temperature)

    def forward(self, batch: Batch) -> Output:
        """The loss of the first view's queries with the second view's keys."""
        metrics: dict[str, Tensor] = {}
        queries, keys = self.queries_and_keys(batch)
        mixtures = self._drawn(batch.index) if self.epoch >= self.hyperparameters.warmup_epochs else None
        return Output(self.mixing(queries, keys, self.queue.rows, mixtures, metrics=metrics), metrics)

    def _drawn(self, index: Tensor) -> Mixtures:
        options, count = self.hyperparameters, min(self.hyperparameters.hardest, len(self.queue.rows))
        s, sq = options.pairs, options.query_pairs
        u = uniforms(sample_keys(key(_MIXTURE, self.seed, self.step), index), 3 * s + 2 * sq)
        first, second, weight, other, share = u.split([s, s, s, sq, sq], dim=1)
        places = [(part.double() * count).long() for part in (first, second, other)]
        return Mixtures(places[0], places[1], weight, places[2], share / 2)


class _EmbeddedViews(Objective):
    """Two views through the encoder in one pass, without a projector."""

    family = "contrastive_views"
    needs = _VIEWS

    def embedded(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Both views' embeddings, ``(batch, embedding_dim)``."""
        view1, view2 = self.encoder(torch.cat(batch.views)).chunk(2)
        return view1, view2


@register
class AlignUniformObjective(_EmbeddedViews):
    """Alignment and uniformity: views of an image coincide, images spread over the sphere, as two separate terms.

    Equation and shapes: :class:`armillary.losses.uniformity.AlignUniform`, on the encoder's embeddings themselves.
    """

    name = "align_uniform"
    catalog_id = "align_uniform"
    citation = Citation(
        "Tongzhou Wang, Phillip Isola",
        "Understanding Contrastive Representation Learning through Alignment and Uniformity on the Hypersphere",
        2020,
        "ICML",
        "https://arxiv.org/abs/2005.10242",
    )

    class Hyperparameters(Base):
        """Arguments of :class:`armillary.losses.uniformity.AlignUniform`."""

        alpha: float = Field(2.0, ge=1, le=8, description="power of the distance of two views")
        t: float = Field(2.0, ge=0.1, le=20, description="sharpness of the Gaussian kernel")
        align_weight: float = Field(1.0, ge=0, le=100, description="weight of the alignment")
        uniform_weight: float = Field(1.0, ge=0, le=100, description="weight of the uniformity")

    def build(self, context: BuildContext) -> None:
        """Makes the loss."""
        self.loss = AlignUniform(**self.hyperparameters.model_dump())

    def forward(self, batch: Batch) -> Output:
        """The loss of the two views' embeddings."""
        metrics: dict[str, Tensor] = {}
        return Output(self.loss(*self.embedded(batch), metrics=metrics), metrics)


@register
class KoLeoObjective(_EmbeddedViews):
    """KoLeo: views of an image coincide, and every image keeps away from its nearest neighbour.

    ``L = mean_i |x_i - y_i|^2 + w (K(x) + K(y)) / 2`` of unit vectors, K of
    :class:`armillary.losses.self_distillation.KoLeo`. The regularizer is the paper's; the paper sets it beside a
    triplet loss over nearest neighbours of given descriptors, in whose place the distance of two views stands here
    (ours). Beside any other objective it is the term ``koleo``.
    """

    name = "koleo"
    catalog_id = "koleo"
    family = "decorrelation"
    citation = Citation(
        "Alexandre Sablayrolles, Matthijs Douze, Cordelia Schmid, Hervé Jégou",
        "Spreading vectors for similarity search",
        2019,
        "ICLR",
        "https://arxiv.org/abs/1806.03198",
    )
    needs = replace(_VIEWS)

    class Hyperparameters(Base):
        """Weight of the regularizer and its options."""

        spread: float = Field(0.1, ge=1e-5, le=10, description="w, weight of the regularizer")
        neighbours: int = Field(1, ge=1, le=16, description="nearest samples that count")
        eps: float = Field(1e-8, ge=1e-12, le=1e-2, description="floor of the distance")

    def build(self, context: BuildContext) -> None:
        """Makes the regularizer."""
        self.spread = KoLeo(self.hyperparameters.eps, self.hyperparameters.neighbours)
        self.align = AlignUniform(uniform_weight=0.0)

    def forward(self, batch: Batch) -> Output:
        """The loss of the two views' embeddings."""
        metrics: dict[str, Tensor] = {}
        view1, view2 = self.embedded(batch)
        align = self.align(view1, view2, metrics=metrics)
        spread = (self.spread(view1) + self.spread(view2)) / 2
        metrics["koleo"] = spread.detach()
        return Output(align + self.hyperparameters.spread * spread, metrics)
