"""Momentum contrast: queries against the keys of a slowly moving copy of the encoder."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from armillary.components.heads import Projector
from armillary.components.queue import Queue
from armillary.components.schedules import Schedule
from armillary.components.shuffled_keys import ShuffledKeys
from armillary.components.teacher import Teacher
from armillary.losses.key_contrast import BatchKeyContrast, KeyContrast
from armillary.losses.tensors import normalize, widen
from armillary.objectives import base
from armillary.objectives.base import Batch, BuildContext, Citation, Convergence, Needs, Output
from armillary.objectives.bases import Export, Exports
from armillary.objectives.registry import register


def _temperature(default: float) -> float:
    value: float = Field(default, ge=0.005, le=10, description="divides the cosines")
    return value


class NormHyperparameters(base.Hyperparameters):
    """The batch norm of methods whose keys are shuffled."""

    batch_norm: Literal["shuffled", "sync"] = Field(
        "shuffled", description="keys are normalised in other company than their queries, or all of a batch together"
    )
    norm_samples: int = Field(32, ge=2, le=65536, description="shuffled: samples normalised together; a GPU's share")


# Which samples stand beside each other is what shuffling is about.
SHUFFLED_WAIVER = {"batch_order[batch_norm=shuffled]": "queries are normalised together with their neighbours"}


class QueueHyperparameters(NormHyperparameters):
    """What the methods with a queue have in common."""

    temperature: float = _temperature(0.2)
    queue_size: int = Field(65536, ge=1, le=1_048_576, description="K, past keys; 4096 suits small data")
    queue_host: bool = Field(False, description="keep the queue in main memory; costs a copy a step")
    momentum: float = Field(0.999, ge=0, le=1, description="share of the old key encoder a step keeps; 0.99 if short")
    projection_dim: int = Field(128, ge=2, le=8192, description="width of queries and keys")
    export: Export = Field("student", description="whose encoder is evaluated and kept; teacher: the keys'")


def shuffled_keys(options: NormHyperparameters, context: BuildContext) -> ShuffledKeys:
    """What makes the keys under these options."""
    return ShuffledKeys(options.norm_samples if options.batch_norm == "shuffled" else 0, context.seed)


_SMALL = {"objective.queue_size": 256, "objective.momentum": 0.99, "objective.projection_dim": 64}


class MomentumQueueObjective(Exports):
    """A query of one view, a key of the other by the teacher, negatives from a queue.

    A step in the paper's order: keys by the teacher as it is, the loss against the old queue, the optimizer, then here
    the teacher moves and the keys enter the queue. The released code moves the teacher at the start of the next step
    instead, with the same keys.

    ``batch_norm: shuffled``, the papers' way, normalises ``norm_samples`` at a time and the keys in other company than
    their queries: the negatives are of earlier batches, and statistics that queries and keys of a batch have in common
    would tell the key from them (:mod:`armillary.components.shuffled_keys`). ``sync`` has them in common, over all
    workers. The default is the papers', and N workers still equal one where a worker's share of the batch is a multiple
    of ``norm_samples``; a smaller share is normalised as a whole, as on a GPU of the papers.
    """

    family = "contrastive_views"
    waivers: ClassVar[Mapping[str, str]] = SHUFFLED_WAIVER

    def make_projector(self, context: BuildContext) -> nn.Module:
        """The head behind the encoder."""
        raise NotImplementedError(f"{type(self).__name__} does not define make_projector")

    def build(self, context: BuildContext) -> None:
        """Makes projector, key encoder, queue and loss."""
        options = self.hyperparameters
        self.projector = self.make_projector(context)
        self.make_keys = shuffled_keys(options, context)
        self.make_keys.convert(self.encoder, self.projector)
        momentum = Schedule(options.momentum, options.momentum, 0, "constant")
        self.teacher = Teacher(self, ("encoder", "projector"), momentum)
        self.queue = Queue(options.queue_size, (options.projection_dim,), host=options.queue_host)
        self.loss = KeyContrast(options.temperature)

    def forward(self, batch: Batch) -> Output:
        """The loss of the first view's queries with the second view's keys."""
        metrics: dict[str, Tensor] = {}
        queries, keys = self.queries_and_keys(batch)
        return Output(self.loss(queries, keys, self.queue.rows, metrics=metrics), metrics)

    def queries_and_keys(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The first view's projections and the teacher's of the second, of unit length; keys wait for the queue."""
        queries, keys = self.query_and_key(batch)
        self.queue.hold(self.step, keys)
        return queries, keys

    def query_and_key(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The same, and nothing waits."""
        (keys,) = self.make_keys(self.teacher, batch.views[1:], batch.index, self.step)
        return self.projector(self.encoder(batch.views[0])), normalize(widen(keys))

    def after_step(self, step: int) -> None:
        """Moves the key encoder, puts the step's keys into the queue."""
        self.teacher.update(self, step)
        self.queue.write()


@register
class MoCoV1(MomentumQueueObjective):
    """MoCo: a query must find its key among the keys of earlier batches, which a slow copy of the encoder made.

    Equation and shapes: :class:`armillary.losses.key_contrast.KeyContrast`. The survey calls it SimCLR's loss with a
    memory bank; that describes no other loss, and there is no ``formulation``.
    """

    name = "moco_v1"
    catalog_id = "moco_v1"
    citation = Citation(
        "Kaiming He, Haoqi Fan, Yuxin Wu, Saining Xie, Ross Girshick",
        "Momentum Contrast for Unsupervised Visual Representation Learning",
        2020,
        "CVPR",
        "https://arxiv.org/abs/1911.05722",
    )
    needs = Needs(views=2, recipe="moco_v1", components=("projector", "teacher", "queue"))
    convergence = Convergence(margin=0.03, job={**_SMALL, "objective.temperature": 0.1})

    class Hyperparameters(QueueHyperparameters):
        """Temperature, queue, momentum, width of the linear head."""

        temperature: float = _temperature(0.07)

    def make_projector(self, context: BuildContext) -> nn.Module:
        """A linear map."""
        return Projector(context.embedding_dim, 0, self.hyperparameters.projection_dim, 1, norm=False)


@register
class MoCoV2(MomentumQueueObjective):
    """MoCo v2: MoCo with a perceptron behind the encoder, blur among the augmentations and a softer temperature.

    Equation and shapes: :class:`armillary.losses.key_contrast.KeyContrast`. The paper's cosine learning rate is the
    job's ``optimizer.schedule``.
    """

    name = "moco_v2"
    catalog_id = "moco_v2"
    citation = Citation(
        "Xinlei Chen, Haoqi Fan, Ross Girshick, Kaiming He",
        "Improved Baselines with Momentum Contrastive Learning",
        2020,
        "arXiv",
        "https://arxiv.org/abs/2003.04297",
    )
    needs = Needs(views=2, recipe="moco_v2", components=("projector", "teacher", "queue"))
    convergence = Convergence(margin=0.03, job={**_SMALL, "objective.projection_hidden": 256, "views.blur": 0.0})

    class Hyperparameters(QueueHyperparameters):
        """Temperature, queue, momentum, shape of the perceptron."""

        projection_hidden: int = Field(2048, ge=2, le=65536, description="width of the hidden layer")

    def make_projector(self, context: BuildContext) -> nn.Module:
        """Two layers without batch norm."""
        options = self.hyperparameters
        return Projector(context.embedding_dim, options.projection_hidden, options.projection_dim, 2, norm=False)


@register
class MoCoV3(Exports):
    """MoCo v3: both views are query and key, the batch is the dictionary, and a predictor follows the projector.

    ``L = ctr(q_1, k_2) + ctr(q_2, k_1)`` with :class:`armillary.losses.key_contrast.BatchKeyContrast`;
    ``q_v = predictor(projector(encoder(x_v)))``, ``k_v`` the teacher's projection of view v. The teacher's momentum
    rises to 1 over the run. A transformer's patch projection stays as it was drawn, which keeps training stable. The
    released recipe takes temperature 0.2 and three layers for transformers, 1 and two layers for ResNets.
    """

    name = "moco_v3"
    family = "contrastive_views"
    catalog_id = "moco_v3"
    citation = Citation(
        "Xinlei Chen, Saining Xie, Kaiming He",
        "An Empirical Study of Training Self-Supervised Vision Transformers",
        2021,
        "ICCV",
        "https://arxiv.org/abs/2104.02057",
    )
    needs = Needs(
        views=2,
        recipe="byol",
        recipe_options={"crop_scale": [0.2, 1.0]},
        components=("projector", "predictor", "teacher"),
        batch_coupled=True,
    )
    waivers: ClassVar[Mapping[str, str]] = {
        "gradcheck": "the keys of a view are constants, and finite differences move them with its queries",
    }
    convergence = Convergence(
        margin=0.03,
        job={
            "objective.projection_dim": 128,
            "objective.projection_hidden": 256,
            "objective.projection_layers": 2,
            "views.blur": 0.0,
        },
    )

    class Hyperparameters(base.Hyperparameters):
        """Temperature, momentum, shape of the heads."""

        temperature: float = _temperature(0.2)
        momentum: float = Field(0.99, ge=0, le=1, description="share of the old key encoder kept by the first step")
        momentum_end: float = Field(1.0, ge=0, le=1, description="the same at the end of the run")
        projection_dim: int = Field(256, ge=2, le=8192, description="width of queries and keys")
        projection_hidden: int = Field(4096, ge=2, le=65536, description="width of the heads' hidden layers")
        projection_layers: int = Field(3, ge=1, le=8, description="linear layers of the projector; 2 for ResNets")
        predictor_layers: int = Field(2, ge=1, le=8, description="linear layers of the predictor")
        export: Export = Field("student", description="whose encoder is evaluated and kept; teacher: the keys'")
        freeze_patches: bool = Field(True, description="do not train a transformer's patch projection")

    def build(self, context: BuildContext) -> None:
        """Makes the heads, the key encoder and the loss."""
        options = self.hyperparameters
        hidden, width = options.projection_hidden, options.projection_dim
        patches = getattr(getattr(self.encoder, "body", None), "patch_embed", None)
        if options.freeze_patches and isinstance(patches, nn.Module):
            patches.requires_grad_(False)
        # Batch norm behind every layer, the last without a scale.
        head = partial(Projector, last_norm=True, last_scale=False)
        self.projector = head(context.embedding_dim, hidden, width, options.projection_layers)
        self.predictor = head(width, hidden, width, options.predictor_layers)
        steps = context.epochs * context.steps_per_epoch
        self.teacher = Teacher(
            self, ("encoder", "projector"), Schedule(options.momentum, options.momentum_end, steps, "cosine")
        )
        self.loss = BatchKeyContrast(options.temperature)

    def forward(self, batch: Batch) -> Output:
        """The loss of both directions."""
        views = torch.cat(batch.views)
        q1, q2 = self.predictor(self.projector(self.encoder(views))).chunk(2)
        k1, k2 = self.teacher(views).chunk(2)
        loss = self.loss(q1, k2) + self.loss(q2, k1)
        return Output(loss, {"contrast": loss.detach() / (4 * self.hyperparameters.temperature)})

    def after_step(self, step: int) -> None:
        """Moves the key encoder."""
        self.teacher.update(self, step)


class _Heads(nn.Module):
    """Several perceptrons side by side: ``(batch, in)`` to ``(batch, count, out)``."""

    def __init__(self, count: int, in_features: int, hidden: int, out_features: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Projector(in_features, hidden, out_features, 2, norm=False) for _ in range(count))

    def forward(self, embeddings: Tensor) -> Tensor:
        """Every head's projection."""
        return torch.stack([head(embeddings) for head in self.heads], dim=1)


@register
class LooC(Exports):
    """Leave-one-out contrast: a space of its own for each augmentation, blind to all of them but that one.

    Views of an image: a query, a key 0 that shares nothing with it, and keys i = 1..n that share augmentation i (here
    turns by 90 degrees, and colours). Space 0 is invariant to all; in space i the key that shares augmentation i is the
    positive and the image's other keys are negatives. With z of unit length, queue_i the past keys i in space i::

        E_ij = exp(z_i^q . z_i^{k_j} / tau),   N_i = sum_{k in queue_i} exp(z_i^q . k / tau)
        L = -1/(n + 1) [ log E_00 / (E_00 + N_0) + sum_{i >= 1} log E_ii / (sum_{j = 0..n} E_ij + N_i) ]

    Each term is :class:`armillary.losses.key_contrast.KeyContrast`. A reconstruction: no released code is known, the
    structure is the paper's as remembered, the temperature MoCo v2's. The paper's LooC++, which puts the heads' hidden
    features side by side for evaluation, is not offered: the encoder is what is kept. SynCLR for speech (catalog:
    synclr_speech) is this loss on views of a speech synthesiser that share one factor each, which is not part of this.
    """

    name = "looc"
    family = "contrastive_views"
    catalog_id = "looc"
    citation = Citation(
        "Tete Xiao, Xiaolong Wang, Alexei A. Efros, Trevor Darrell",
        "What Should Not Be Contrastive in Contrastive Learning",
        2021,
        "ICLR",
        "https://arxiv.org/abs/2008.05659",
    )
    needs = Needs(views=4, recipe="looc", components=("projector", "teacher", "queue"))
    waivers: ClassVar[Mapping[str, str]] = {
        "learns": "thirty steps do not tell apart an image's three keys by an encoder that was never trained",
        **SHUFFLED_WAIVER,
    }
    convergence = Convergence(
        margin=0.02,
        job={**_SMALL, "objective.projection_hidden": 256, "views.blur": 0.0},
        reason="four views a step, and turned faces are harder to recognise",
    )

    class Hyperparameters(QueueHyperparameters):
        """Temperature, queues, momentum, shape of each head."""

        queue_size: int = Field(16384, ge=1, le=1_048_576, description="past keys of each space")
        projection_hidden: int = Field(2048, ge=2, le=65536, description="width of each head's hidden layer")

    def build(self, context: BuildContext) -> None:
        """Makes the heads, the key encoder, the queues (one, of rows for all spaces) and the loss."""
        options = self.hyperparameters
        self.spaces = self.needs.views - 1
        self.heads = _Heads(self.spaces, context.embedding_dim, options.projection_hidden, options.projection_dim)
        self.make_keys = shuffled_keys(options, context)
        self.make_keys.convert(self.encoder, self.heads)
        momentum = Schedule(options.momentum, options.momentum, 0, "constant")
        self.teacher = Teacher(self, ("encoder", "heads"), momentum)
        self.queue = Queue(options.queue_size, (self.spaces, options.projection_dim), host=options.queue_host)
        self.loss = KeyContrast(options.temperature)

    def forward(self, batch: Batch) -> Output:
        """The mean of the spaces' losses."""
        metrics: dict[str, Tensor] = {}
        queries = self.heads(self.encoder(batch.views[0]))
        # (batch, keys, spaces, dim)
        made = self.make_keys(self.teacher, batch.views[1:], batch.index, self.step)
        keys = normalize(widen(torch.stack(made, dim=1)))
        terms = []
        for space in range(self.spaces):
            others = [key for key in range(self.spaces) if key != space] if space else []
            terms.append(
                self.loss(
                    queries[:, space],
                    keys[:, space, space],
                    self.queue.rows[:, space],
                    own_negatives=keys[:, others, space],
                )
            )
            metrics[f"space{space}"] = terms[-1].detach()
        matching = torch.arange(self.spaces, device=keys.device)
        self.queue.hold(self.step, keys[:, matching, matching])
        return Output(torch.stack(terms).mean(), metrics)

    def after_step(self, step: int) -> None:
        """Moves the key encoder, puts key i in space i into the queues."""
        self.teacher.update(self, step)
        self.queue.write()
