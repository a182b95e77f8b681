"""Softmax classification with a second term on the features: center loss, ring loss, DeepID2, DeepID2+; and DeepID."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from armillary import losses
from armillary.components.encoders import MapEncoder
from armillary.losses.class_centers import CenterLoss, PairVerification, RingLoss
from armillary.objectives import base
from armillary.objectives.base import Batch, BuildContext, Citation, Needs, Output
from armillary.objectives.bases import ClassHeadObjective
from armillary.objectives.registry import register
from armillary.spec.errors import UserError

_LABELS = Needs(recipe="faces", fields=("label",), components=("class_head",))
_PAIRS = Needs(
    recipe="faces",
    fields=("label",),
    sampler="class_balanced",
    samples_per_class=4,
    components=("class_head",),
    batch_coupled=True,
)
_MAPS = replace(_LABELS, encoder="maps")


@register
class CenterLossObjective(ClassHeadObjective):
    """Center loss: softmax, and the squared distance to a moving centre of the own class.

    ``L = L_softmax + lambda / 2 mean_i |x_i - c_{y_i}|^2``: :class:`armillary.losses.CenterLoss`. The survey prints the
    second term alone, without lambda or a rule that moves the centres: nothing to choose.
    """

    name = "center_loss"
    family = "softmax"
    catalog_id = "center_loss"
    citation = Citation(
        "Yandong Wen, Kaipeng Zhang, Zhifeng Li, Yu Qiao",
        "A Discriminative Feature Learning Approach for Deep Face Recognition",
        2016,
        "ECCV",
    )
    needs = Needs(recipe="faces", fields=("label",), components=("class_head", "centers"))

    class Hyperparameters(base.Hyperparameters):
        """Weight and rate of the centres."""

        weight: float = Field(0.003, ge=0, le=10, description="lambda, weight of the distance")
        alpha: float = Field(0.5, gt=0, le=1, description="rate at which centres move")

    def build(self, context: BuildContext) -> None:
        """Makes classifier and centres."""
        self.loss = losses.Softmax(context.num_classes, context.embedding_dim)
        self.centers = CenterLoss(context.num_classes, context.embedding_dim, self.hyperparameters.alpha)

    def forward(self, batch: Batch) -> Output:
        """``L_softmax + lambda L_C``."""
        metrics: dict[str, Tensor] = {}
        embeddings = self.encoder(batch.views[0])
        softmax = self.loss(embeddings, batch.label, metrics=metrics)
        distance = self.centers(embeddings, batch.label)
        metrics["center_distance"] = distance.detach()
        return Output(softmax + self.hyperparameters.weight * distance, metrics)

    def after_step(self, step: int) -> None:
        """Moves the centres of the batch's classes."""
        self.centers.update()


@register
class RingLossObjective(ClassHeadObjective):
    """Ring loss: softmax on raw features whose lengths are drawn to one learned radius.

    ``L = L_primary + lambda / 2 mean_i (|x_i| - R)^2``: :class:`armillary.losses.RingLoss`. The survey puts it on
    ArcFace, behind the scaling to unit length, where the term has no gradient: a slip, not offered.
    """

    name = "ring_loss"
    family = "softmax"
    catalog_id = "ring_loss"
    citation = Citation(
        "Yutong Zheng, Dipan K. Pal, Marios Savvides",
        "Ring loss: Convex Feature Normalization for Face Recognition",
        2018,
        "CVPR",
        "https://arxiv.org/abs/1803.00130",
    )
    needs = _LABELS

    class Hyperparameters(base.Hyperparameters):
        """Weight of the ring, start of its radius, and the loss beside it."""

        weight: float = Field(0.01, ge=0, le=10, description="lambda, weight of the ring")
        radius: float = Field(0.0, ge=0, le=1000, description="start of R; 0 takes the first batch's mean length")
        primary: Literal["softmax", "sphereface"] = Field("softmax", description="the classifier beside it")

    def build(self, context: BuildContext) -> None:
        """Makes classifier and ring."""
        size = (context.num_classes, context.embedding_dim)
        sphere = self.hyperparameters.primary == "sphereface"
        self.loss = losses.SphereFace(*size) if sphere else losses.Softmax(*size)
        self.ring = RingLoss(self.hyperparameters.radius or None)

    def forward(self, batch: Batch) -> Output:
        """``L_primary + lambda L_R``."""
        metrics: dict[str, Tensor] = {}
        embeddings = self.encoder(batch.views[0])
        if isinstance(self.loss, losses.SphereFace):
            self.loss.iteration.fill_(self.step)
        primary = self.loss(embeddings, batch.label, metrics=metrics)
        ring = self.ring(embeddings)
        metrics.update(ring=ring.detach(), radius=self.ring.radius.detach().squeeze())
        return Output(primary + self.hyperparameters.weight * ring, metrics)


class VerificationHyperparameters(base.Hyperparameters):
    """The pair term of DeepID2 and DeepID2+."""

    weight: float = Field(0.05, ge=0, le=10, description="lambda, weight of the pairs")
    margin: float = Field(1.0, gt=0, le=1000, description="start of m, in units of feature distance")
    margin_pairs: int = Field(200_000, ge=0, le=10**9, description="pairs between updates of m; 0 keeps it")
    negative_fraction: float = Field(0.5, gt=0, lt=1, description="weight of pairs of different people")


def _verification(options: Any, distance: str = "l2") -> PairVerification:
    return PairVerification(distance, options.margin, options.margin_pairs, options.negative_fraction)


@register
class DeepID2(ClassHeadObjective):
    """DeepID2: identification by softmax, and verification of the batch's pairs.

    The survey prints the verification term alone, which the objective ``contrastive`` is.
    """

    name = "deepid2"
    family = "softmax"
    catalog_id = "deepid2"
    citation = Citation(
        "Yi Sun, Yuheng Chen, Xiaogang Wang, Xiaoou Tang",
        "Deep Learning Face Representation by Joint Identification-Verification",
        2014,
        "NIPS",
        "https://arxiv.org/abs/1406.4773",
    )
    needs = _PAIRS

    class Hyperparameters(VerificationHyperparameters):
        """Weight, distance and margin of the pairs."""

        distance: Literal["l2", "l1", "cosine"] = Field("l2", description="how pairs are compared")

    def build(self, context: BuildContext) -> None:
        """Makes classifier and pair term."""
        self.loss = losses.Softmax(context.num_classes, context.embedding_dim)
        self.pairs = _verification(self.hyperparameters, self.hyperparameters.distance)

    def forward(self, batch: Batch) -> Output:
        """``Ident + lambda Verif``."""
        metrics: dict[str, Tensor] = {}
        embeddings = self.encoder(batch.views[0])
        identification = self.loss(embeddings, batch.label, metrics=metrics)
        verification = self.pairs(embeddings, batch.label, metrics=metrics)
        metrics.update(verification=verification.detach(), margin=self.pairs.margin.detach().clone())
        return Output(identification + self.hyperparameters.weight * verification, metrics)


@register
class DeepID2Plus(ClassHeadObjective):
    """DeepID2+: identification and verification behind every stage of the network.

    ``L = sum_n (Ident(f_n) + lambda Verif(f_n; m_n))`` over branches ``f_n = FC_n(pooled stage n)``; the last branch is
    the embedding itself and the only one that is kept. ``stages`` names those before the last that have a branch, all
    by default. ``formulation: survey`` has softmax alone at the earlier stages.
    """

    name = "deepid2_plus"
    family = "softmax"
    catalog_id = "deepid2_plus"
    citation = Citation(
        "Yi Sun, Xiaogang Wang, Xiaoou Tang",
        "Deeply Learned Face Representations Are Sparse, Selective, and Robust",
        2015,
        "CVPR",
        "https://arxiv.org/abs/1412.1265",
    )
    needs = replace(_PAIRS, encoder="maps")

    class Hyperparameters(VerificationHyperparameters):
        """The branches, and the pair term."""

        stage_weight: float = Field(1.0, ge=0, le=10, description="weight of the earlier stages; 1 in the paper")
        stages: tuple[int, ...] = Field((), description="earlier stages with a branch, counted from 1; none named: all")
        branch_dim: int = Field(512, ge=2, le=8192, description="width of the earlier stages' branches")
        formulation: Literal["paper", "survey"] = Field("paper", description="survey: earlier stages have no pairs")

    def build(self, context: BuildContext) -> None:
        """Makes a branch, a classifier and a pair term for every chosen stage.

        Raises:
            UserError: the encoder lacks a stage, or one is named twice.
        """
        options, channels = self.hyperparameters, cast(MapEncoder, self.encoder).stage_channels
        last, stages = len(channels), options.stages
        wrong = [stage for stage in stages if not 1 <= stage < last]
        if wrong or len(set(stages)) < len(stages):
            raise UserError(
                f"the backbone has no earlier stage {wrong[0]}" if wrong else "names a stage twice",
                key="objective.stages",
                allowed=f"1 to {last - 1}, each once" if last > 1 else "none, as it has one stage",
            )
        self.last = len(channels)
        self.early = sorted(options.stages) or list(range(1, self.last))
        self.branches = nn.ModuleList(nn.Linear(channels[stage - 1], options.branch_dim) for stage in self.early)
        widths = [*(options.branch_dim for _ in self.early), context.embedding_dim]
        self.heads = nn.ModuleList(losses.Softmax(context.num_classes, width) for width in widths)
        self.pairs = nn.ModuleList(_verification(options) for _ in widths)

    def forward(self, batch: Batch) -> Output:
        """The weighted sum over stages."""
        options, metrics = self.hyperparameters, dict[str, Tensor]()
        encoder = cast(MapEncoder, self.encoder)
        maps = encoder.stages(batch.views[0])
        chosen = [maps[stage - 1].mean(dim=(2, 3)) for stage in self.early]
        features = [branch(pooled) for branch, pooled in zip(self.branches, chosen, strict=True)]
        features.append(encoder.embed_map(maps[-1]))
        total = features[-1].new_zeros(())
        parts = zip([*self.early, self.last], features, self.heads, self.pairs, strict=True)
        for stage, feature, head, pairs in parts:
            loss = head(feature, batch.label, metrics=metrics)
            if stage == self.last or options.formulation == "paper":
                loss = loss + options.weight * pairs(feature, batch.label)
            metrics[f"stage{stage}_loss"] = loss.detach()
            total = total + (1.0 if stage == self.last else options.stage_weight) * loss
        return Output(total, metrics)


@register
class DeepID(ClassHeadObjective):
    """DeepID: softmax on a hidden layer that sees the last two stages of the network.

    ``h = max(0, A u3 + B u4 + c)`` with u3, u4 the outputs of the last two stages, averaged over places here; softmax
    over h. The encoder's own embedding takes the place of ``B u4 + c``, so that it stays a job's backbone; the bypass
    ``A u3`` and the rectifier belong to training, as the paper's ensemble of 60 patch networks, PCA and joint Bayesian
    verification belong to its test: none of them is part of the exported encoder.
    """

    name = "deepid"
    family = "softmax"
    catalog_id = "deepid"
    citation = Citation(
        "Yi Sun, Xiaogang Wang, Xiaoou Tang",
        "Deep Learning Face Representation from Predicting 10,000 Classes",
        2014,
        "CVPR",
    )
    needs = _MAPS

    class Hyperparameters(base.Hyperparameters):
        """The bypass."""

        bypass: bool = Field(True, description="the hidden layer sees the stage before the last too")

    def build(self, context: BuildContext) -> None:
        """Makes bypass and classifier."""
        # A network of one stage shows that one twice.
        before = cast(MapEncoder, self.encoder).stage_channels[-2:][0]
        self.bypass = nn.Linear(before, context.embedding_dim, bias=False) if self.hyperparameters.bypass else None
        self.loss = losses.Softmax(context.num_classes, context.embedding_dim)

    def forward(self, batch: Batch) -> Output:
        """The loss of h."""
        metrics: dict[str, Tensor] = {}
        encoder = cast(MapEncoder, self.encoder)
        stages = encoder.stages(batch.views[0])
        hidden = encoder.embed_map(stages[-1])
        if self.bypass is not None:
            hidden = hidden + self.bypass(stages[-2:][0].mean(dim=(2, 3)))
        return Output(self.loss(torch.relu(hidden), batch.label, metrics=metrics), metrics)
