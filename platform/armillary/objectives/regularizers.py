"""The terms there are: regularizers of embeddings that any objective can take along."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from armillary.components.counter import key, normals, sample_keys, uniforms
from armillary.losses.class_centers import CenterLoss, RingLoss
from armillary.losses.coding_rate import CodingRate
from armillary.losses.embedding_dropout import SampleGuidedContrast
from armillary.losses.global_batch import global_rows
from armillary.losses.graph_constraint import SampleGraphConstraint
from armillary.losses.information_bottleneck import InformationLowerBound, VariationalBottleneck
from armillary.losses.range_loss import RangeLoss
from armillary.losses.self_distillation import KoLeo
from armillary.losses.tensors import float32_math, normalize, widen
from armillary.losses.uniformity import Uniformity
from armillary.objectives import base
from armillary.objectives.base import BuildContext
from armillary.objectives.terms import Embedded, Term, register_term
from armillary.spec.errors import UserError

_NOISE, _DROP = 81, 82


def _mean_over_views(loss: nn.Module, seen: Embedded) -> Tensor:
    total: Tensor = torch.stack([loss(view) for view in seen.views]).mean()
    return total


@register_term
class KoLeoTerm(Term):
    """Every sample keeps away from its nearest neighbour (Sablayrolles et al. 2019); mean over views."""

    name = "koleo"
    batch_coupled = True

    class Hyperparameters(base.Hyperparameters):
        """Arguments of :class:`armillary.losses.self_distillation.KoLeo`."""

        neighbours: int = Field(1, ge=1, le=16, description="nearest samples that count")
        eps: float = Field(1e-8, ge=1e-12, le=1e-2, description="floor of the distance")

    def build(self, context: BuildContext) -> None:
        """Makes the loss."""
        self.loss = KoLeo(self.hyperparameters.eps, self.hyperparameters.neighbours)

    def forward(self, seen: Embedded) -> Tensor:
        """Of each view by itself, as DINOv2 does (which sums where this averages)."""
        return _mean_over_views(self.loss, seen)


@register_term
class UniformityTerm(Term):
    """Directions cover the sphere evenly (Wang and Isola 2020); mean over views."""

    name = "uniformity"
    batch_coupled = True

    class Hyperparameters(base.Hyperparameters):
        """Argument of :class:`armillary.losses.uniformity.Uniformity`."""

        t: float = Field(2.0, ge=0.1, le=20, description="sharpness of the Gaussian kernel")

    def build(self, context: BuildContext) -> None:
        """Makes the loss."""
        self.loss = Uniformity(self.hyperparameters.t)

    def forward(self, seen: Embedded) -> Tensor:
        """Of each view by itself."""
        return _mean_over_views(self.loss, seen)


@register_term
class CodingRateTerm(Term):
    """Directions tell as much as they can through noise (Linsker 1988, infomax); mean over views."""

    name = "coding_rate"
    batch_coupled = True

    class Hyperparameters(base.Hyperparameters):
        """Argument of :class:`armillary.losses.CodingRate`."""

        noise_variance: float = Field(0.5, ge=1e-4, le=100, description="sigma^2 of the channel's noise")

    def build(self, context: BuildContext) -> None:
        """Makes the loss."""
        self.loss = CodingRate(self.hyperparameters.noise_variance)

    def forward(self, seen: Embedded) -> Tensor:
        """Of each view's unit vectors by itself: of longer ones it would only make longer ones still."""
        return torch.stack([self.loss(normalize(widen(view))) for view in seen.views]).mean()


@register_term
class CenterTerm(Term):
    """Embeddings gather around moving class centres (Wen et al. 2016)."""

    name = "center_loss"
    needs_labels = True

    class Hyperparameters(base.Hyperparameters):
        """Argument of :class:`armillary.losses.CenterLoss`."""

        alpha: float = Field(0.5, gt=0, le=1, description="rate at which centres move")

    def build(self, context: BuildContext) -> None:
        """Makes the centres."""
        self.loss = CenterLoss(context.num_classes, context.embedding_dim, self.hyperparameters.alpha)

    def forward(self, seen: Embedded) -> Tensor:
        """Over all views."""
        value: Tensor = self.loss(seen.embeddings, seen.labels)
        return value

    def after_step(self) -> None:
        """Moves the centres."""
        self.loss.update()


@register_term
class RingTerm(Term):
    """Embeddings take one, learned length (Zheng et al. 2018)."""

    name = "ring_loss"

    def build(self, context: BuildContext) -> None:
        """Makes the radius."""
        self.loss = RingLoss()

    def forward(self, seen: Embedded) -> Tensor:
        """Over all views."""
        value: Tensor = self.loss(seen.embeddings)
        return value


@register_term
class RangeTerm(Term):
    """The widest distances inside classes shrink, the nearest class centres part (X. Zhang et al. 2017)."""

    name = "range_loss"
    needs_labels = True
    batch_coupled = True

    class Hyperparameters(base.Hyperparameters):
        """Arguments of :class:`armillary.losses.RangeLoss`."""

        k: int = Field(2, ge=1, le=64, description="ranges of each class")
        margin: float = Field(1.0, gt=0, le=1e6, description="least squared distance of two class centres")
        alpha: float = Field(0.5, ge=0, le=10, description="weight of the ranges")
        beta: float = Field(0.5, ge=0, le=10, description="weight of the centres' hinge")

    def build(self, context: BuildContext) -> None:
        """Makes the loss."""
        self.loss = RangeLoss(**self.hyperparameters.model_dump())

    def forward(self, seen: Embedded) -> Tensor:
        """Over all views as one batch."""
        value: Tensor = self.loss(seen.embeddings, seen.labels)
        return value


@register_term
class CoReFaceTerm(Term):
    """Two dropout draws of an embedding agree against other identities (Song and Wang 2023).

    The paper drops values of the feature map in front of the embedding, as the objective ``coreface`` does; a term has
    the embedding alone.
    """

    name = "coreface"
    needs_labels = True
    batch_coupled = True

    class Hyperparameters(base.Hyperparameters):
        """Dropout, and arguments of :class:`armillary.losses.embedding_dropout.SampleGuidedContrast`."""

        dropout: float = Field(0.6, ge=0, le=0.9, description="share of an embedding's values that a draw drops")
        scale: float = Field(64.0, ge=0.1, le=1000, description="s, of the cosines")
        ema: float = Field(0.99, gt=0, le=1, description="weight of the current batch in the margin")

    def build(self, context: BuildContext) -> None:
        """Makes the loss with its margin."""
        self.loss = SampleGuidedContrast(self.hyperparameters.scale, self.hyperparameters.ema)

    def forward(self, seen: Embedded) -> Tensor:
        """Of the first view."""
        assert seen.label is not None
        first, share = seen.views[0], self.hyperparameters.dropout
        keys = [sample_keys(key(_DROP, seen.seed, seen.step, draw), seen.index) for draw in range(2)]
        draws = [first * (uniforms(drawn, first.shape[1]) >= share) / (1 - share) for drawn in keys]
        value: Tensor = self.loss(draws[0], draws[1], seen.label)
        return value

    def after_step(self) -> None:
        """Keeps the margin."""
        self.loss.update()


class _Bottleneck(Term):
    kind: ClassVar[str]
    needs_labels = True

    def build(self, context: BuildContext) -> None:
        """Makes stochastic head and classifier."""
        options = self.hyperparameters.model_dump()
        options["weight"] = options.pop("beta" if self.kind == "vib" else "gamma")
        self.loss = VariationalBottleneck(context.embedding_dim, context.num_classes, self.kind, **options)

    def forward(self, seen: Embedded) -> Tensor:
        """Over all views, one latent sample each."""
        noise = normals(seen.keys(_NOISE), self.hyperparameters.size)
        value: Tensor = self.loss(seen.embeddings, seen.labels, noise)
        return value


@register_term
class VIBTerm(_Bottleneck):
    """A classifier behind a noisy channel with a standard normal prior (Alemi et al. 2017)."""

    name = "vib"
    kind = "vib"

    class Hyperparameters(base.Hyperparameters):
        """Arguments of :class:`armillary.losses.information_bottleneck.VariationalBottleneck`."""

        beta: float = Field(1e-3, ge=0, le=10, description="price of a nat through the channel")
        size: int = Field(256, ge=2, le=4096, description="K, width of the bottleneck")
        sigma_shift: float = Field(5.0, ge=0, le=20, description="subtracted before the softplus of sigma")


@register_term
class CEBTerm(_Bottleneck):
    """A classifier behind a noisy channel with a learned normal for each class (Fischer 2020)."""

    name = "ceb"
    kind = "ceb"

    class Hyperparameters(base.Hyperparameters):
        """Arguments of :class:`armillary.losses.information_bottleneck.VariationalBottleneck`."""

        gamma: float = Field(1.0, ge=0, le=1e4, description="weight of the classification")
        size: int = Field(64, ge=2, le=4096, description="K, width of the bottleneck")
        backward_variance: Literal["unit", "learned"] = Field("unit", description="variance of the class normals")


@register_term
class SufficientContrastiveTerm(Term):
    """Embeddings keep what a view does not share with others (H. Wang et al. 2022): rebuilt, or by a lower bound.

    ``RC``: a decoder rebuilds the view's pixels from the embedding; the mean squared error over elements, summed over
    views. ``LBE``: minus the released estimate of the information in ``z = f(v) + noise``, over all views, on the
    embedding alone (the paper also takes earlier layers).
    """

    name = "sufficient_contrastive"
    batch_coupled = True

    class Hyperparameters(base.Hyperparameters):
        """Variant and its options."""

        variant: Literal["RC", "LBE"] = Field("RC", description="reconstruction, or lower bound estimate")
        score_scale: float = Field(20.0, ge=0.1, le=1000, description="c of LBE; 80 on ImageNet")
        noise_variance: float = Field(0.1, ge=1e-4, le=10, description="of z in LBE")
        decoder_hidden: int = Field(512, ge=2, le=65536, description="width of RC's decoder")

    def build(self, context: BuildContext) -> None:
        """Makes the decoder or the bound."""
        options = self.hyperparameters
        if options.variant == "LBE":
            self.bound = InformationLowerBound(options.score_scale)
            return
        height, width = context.image_size
        self.decoder = nn.Sequential(
            nn.Linear(context.embedding_dim, options.decoder_hidden),
            nn.GELU(),
            nn.Linear(options.decoder_hidden, context.in_channels * height * width),
        )

    def forward(self, seen: Embedded) -> Tensor:
        """The reconstruction error, or minus the bound."""
        if self.hyperparameters.variant == "RC":
            errors = [self._error(view, image) for view, image in zip(seen.views, seen.images, strict=True)]
            return torch.stack(errors).sum()
        means = seen.embeddings
        noise = normals(seen.keys(_NOISE), means.shape[1]) * self.hyperparameters.noise_variance**0.5
        value: Tensor = -self.bound(means, means + noise.to(means.dtype))
        return value

    def _error(self, embeddings: Tensor, images: Tensor) -> Tensor:
        rebuilt = self.decoder(embeddings)
        if rebuilt.shape[1] != images[0].numel():
            raise UserError(
                f"the views are {images.shape[2]} x {images.shape[3]} px, not of the images' size",
                key="objective.terms",
                hint="sufficient_contrastive with variant: LBE takes views of any size",
            )
        return _squared_error(rebuilt, images.flatten(1))


@float32_math
def _squared_error(rebuilt: Tensor, images: Tensor) -> Tensor:
    return (rebuilt - images).square().mean()


@register_term
class GraphConstraintTerm(Term):
    """Who is related to whom shows in the embeddings: Con2R's graph term (Reiss et al. 2022) between samples.

    The dataset says who: its table ``sample_graph`` joins samples, its table ``graph`` classes, whose samples are then
    as near as their classes, and those of one class at 1. The posteriors, which alpha below 1 compares too, are those
    of a linear classifier of its own, trained by cross-entropy that does not reach the embeddings. Mean over views.
    """

    name = "graph_constraint"
    needs_labels = True
    batch_coupled = True
    needs_graph = True

    class Hyperparameters(base.Hyperparameters):
        """Arguments of :class:`armillary.losses.graph_constraint.SampleGraphConstraint`."""

        alpha: float = Field(0.5, ge=0, le=1, description="the graph (1) against agreement of the posteriors (0)")
        formulation: Literal["paper", "survey"] = Field(
            "paper", description="survey: squared distances along edges; alone, it wants all embeddings equal"
        )

    keys: Tensor
    weights: Tensor

    def build(self, context: BuildContext) -> None:
        """Keeps the graph; makes the loss and perhaps the classifier."""
        options, tables = self.hyperparameters, context.tables
        self.of_samples = "sample_graph" in tables
        kind = "sample_graph" if self.of_samples else "class_graph"
        self.size = max(context.dataset_size if self.of_samples else context.num_classes, 1)
        source, target = tables[kind]
        keys, order = (source * self.size + target).sort()
        self.register_buffer("keys", keys)
        self.register_buffer("weights", tables[f"{kind}_weight"][order])
        self.loss = SampleGraphConstraint(options.alpha, options.formulation)
        classified = options.alpha < 1 and options.formulation == "paper"
        self.head = nn.Linear(context.embedding_dim, context.num_classes) if classified else None

    def forward(self, seen: Embedded) -> Tensor:
        """Of each view by itself."""
        assert seen.label is not None
        own = seen.index if self.of_samples else seen.label
        near, values = self.near(own, global_rows(own)), []
        for view in seen.views:
            if self.head is None:
                values.append(self.loss(view, near))
                continue
            logits = widen(self.head(view.detach()))
            fit = nn.functional.cross_entropy(logits, seen.label)
            values.append(self.loss(view, near, logits.softmax(dim=1)) + fit)
        return torch.stack(values).mean()

    def near(self, first: Tensor, second: Tensor) -> Tensor:
        """Weights ``(n, m)`` of the edges between nodes ``(n,)`` and ``(m,)``: 1 from one to itself, 0 for none."""
        pairs = first[:, None] * self.size + second[None]
        same = (first[:, None] == second[None]).to(self.weights.dtype)
        if not len(self.keys):
            return same
        place = torch.searchsorted(self.keys, pairs).clamp_max(len(self.keys) - 1)
        joined = torch.where(self.keys[place] == pairs, self.weights[place], 0)
        nearness: Tensor = torch.maximum(same, joined)
        return nearness
