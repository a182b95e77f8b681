"""Objectives that bound mutual information: between past and future (CPC), vectors and places (DIM), views (AMDIM)."""

from __future__ import annotations

import copy
import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from armillary import collectives
from armillary.components.counter import integers, key, sample_keys, uniforms
from armillary.components.encoders import check_sizes, map_encoder
from armillary.losses.future_contrast import FutureContrast
from armillary.losses.mutual_information import AcrossScales, InformationBound, PriorMatching, scores_of_places
from armillary.losses.tensors import widen
from armillary.objectives import base
from armillary.objectives.base import Batch, BuildContext, Citation, Convergence, Needs, Objective, Output
from armillary.objectives.registry import register

_FAMILY = "mutual_information"
_PRIOR, _PLACE = 85, 86


class RowContext(nn.Module):
    """What is known from the patches in and above each row: masked convolutions, as in PixelCNN.

    Args:
        dim: width of the patches' vectors.
        context_dim: width of the contexts.
        layers: convolutions, each of which looks one row up and one column to either side.
    """

    def __init__(self, dim: int, context_dim: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(dim, context_dim, 1)
        self.look = nn.ModuleList(nn.Conv2d(context_dim, context_dim, (2, 3)) for _ in range(layers))

    def forward(self, patches: Tensor) -> Tensor:
        """Vectors ``(batch, dim, rows, columns)`` to contexts ``(batch, context_dim, rows, columns)``."""
        hidden = self.embed(patches)
        for layer in self.look:
            hidden = hidden + layer(F.pad(F.silu(hidden), (1, 1, 1, 0)))
        context: Tensor = hidden
        return context


@register
class CPC(Objective):
    """CPC: what is seen of an image down to a row predicts the patches some rows below, among all other patches.

    The image is cut into ``patches x patches`` squares that overlap by half; each is embedded by itself. With z their
    vectors, c the contexts of :class:`RowContext`, W_k one matrix for each k::

        L = sum_{k <= horizon} mean_{r,s} -log( exp(z_{r+k,s}.W_k c_{r,s}) / sum_{all z} exp(z.W_k c_{r,s}) )

    ``log N - L / horizon`` bounds the information between context and future, ``bound`` of the metrics. The denominator
    is that of all patches of the global batch, where the paper draws some of them, and contexts look down only, where
    the paper's second version looks in four directions. The authors have released no code for images. Batch norm in the
    encoder lets patches know of each other; the second version puts layer norm in its place, a matter of the backbone.
    The encoder must take images of a patch's size; an image's embedding is what it makes of the whole.
    """

    name = "cpc"
    family = _FAMILY
    catalog_id = "cpc"
    citation = Citation(
        "Aäron van den Oord, Yazhe Li, Oriol Vinyals",
        "Representation Learning with Contrastive Predictive Coding",
        2018,
        "arXiv",
        "https://arxiv.org/abs/1807.03748",
    )
    needs = Needs(
        recipe="mae", recipe_options={"crop_scale": (0.5, 1.0)}, components=("context", "predictor"), batch_coupled=True
    )
    convergence = Convergence(
        job={
            "backbone.pool": "mean",
            "objective.patches": 5,
            "objective.horizon": 2,
            "objective.context_dim": 64,
            "objective.context_layers": 2,
            "train.epochs": 4,
        },
        margin=0.01,
        reason="batch norm tells patches of each other, which makes the task easier; three seeds gained 0.02 to 0.06",
    )

    class Hyperparameters(base.Hyperparameters):
        """The grid of patches, the context and how far it predicts."""

        patches: int = Field(
            7, ge=3, le=16, description="patches a side, each of 2 / (patches + 1) of the image's side"
        )
        horizon: int = Field(
            5, ge=1, le=12, validate_default=True, description="rows ahead that are predicted; fewer than patches"
        )
        context_dim: int = Field(256, ge=4, le=4096, description="width of the contexts")
        context_layers: int = Field(3, ge=1, le=12, description="masked convolutions")

        @field_validator("horizon")
        @classmethod
        def _inside(cls, horizon: int, info: ValidationInfo) -> int:
            if horizon >= info.data.get("patches", 16):
                raise ValueError("a grid has no row that far below its first")
            return horizon

    def build(self, context: BuildContext) -> None:
        """Makes context network and predictors.

        Raises:
            UserError: the encoder takes whole images only.
        """
        options = self.hyperparameters
        self.side = [max(1, 2 * length // (options.patches + 1)) for length in context.image_size]
        check_sizes(self.encoder, [context.image_size, (self.side[0], self.side[1])], "this encoder")
        self.context = RowContext(context.embedding_dim, options.context_dim, options.context_layers)
        self.predictors = nn.ModuleList(
            nn.Linear(options.context_dim, context.embedding_dim, bias=False) for _ in range(options.horizon)
        )
        self.loss = FutureContrast()

    def patches_of(self, images: Tensor) -> Tensor:
        """The overlapping patches, ``(batch, patches, patches, channels, side, side)``, row by row."""
        count = self.hyperparameters.patches
        starts = [
            [round(place * (length - side) / (count - 1)) for place in range(count)]
            for length, side in zip(images.shape[2:], self.side, strict=True)
        ]
        rows = torch.stack([images[:, :, start : start + self.side[0]] for start in starts[0]], dim=1)
        return torch.stack([rows[..., start : start + self.side[1]] for start in starts[1]], dim=2)

    def forward(self, batch: Batch) -> Output:
        """The loss of all predictions."""
        metrics: dict[str, Tensor] = {}
        cut = self.patches_of(batch.views[0])
        z = self.encoder(cut.flatten(0, 2)).unflatten(0, cut.shape[:3])
        context = self.context(z.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        # Every column of an image is a sequence of rows.
        sequences, contexts = (item.transpose(1, 2).flatten(0, 1) for item in (z, context))
        predicted = [w(contexts[:, : -k or None]) for k, w in enumerate(self.predictors, start=1)]
        loss = self.loss(sequences, predicted, metrics=metrics)
        candidates = sequences.shape[0] * sequences.shape[1] * collectives.world_size()
        metrics["bound"] = math.log(candidates) - loss.detach() / len(self.predictors)
        return Output(loss, metrics)


class PlaceScores(nn.Module):
    """Maps vectors and places into the space where their product is the score: one perceptron each.

    Args:
        vector_dim: width of the vectors.
        place_dim: channels of the places.
        score_dim: d.
    """

    def __init__(self, vector_dim: int, place_dim: int, score_dim: int) -> None:
        super().__init__()
        self.vector, self.place = (
            nn.Sequential(nn.Linear(width, score_dim), nn.SiLU(), nn.Linear(score_dim, score_dim))
            for width in (vector_dim, place_dim)
        )

    def forward(self, vectors: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """``(batch, vector_dim)`` and ``(batch, P, place_dim)`` to ``(batch, d)`` and ``(batch, P, d)``."""
        return widen(self.vector(vectors)), widen(self.place(places))


def places_of(feature_map: Tensor) -> Tensor:
    """``(batch, channels, height, width)`` to ``(batch, height * width, channels)``."""
    return feature_map.flatten(2).transpose(1, 2)


@register
class DIM(Objective):
    """Deep InfoMax: an image's vector is told apart from others' by what stands at the places of its own feature map.

    ::

        max alpha I(X; E(X)) + beta mean_p I(C_p(X); E(X)),     min_E max_D gamma (E_v log D(v) + E_x log(1 - D(E(x))))

    I by :class:`armillary.losses.mutual_information.InformationBound`: scores are products of two embeddings (the
    paper's dot-product critic; DV takes one logarithm over all places). C is the map of the encoder's stage before the
    last, E the embedding; for alpha the whole map is one place. The prior of y = sigmoid(E(x)) is uniform on the cube;
    its discriminator is trained in the same step by turning the gradient round. DIM(L) is the default, DIM(G) is
    ``alpha: 1, beta: 0, gamma: 1``. Bounds agree with the authors' released functions up to their constants.
    """

    name = "dim"
    family = _FAMILY
    catalog_id = "dim"
    citation = Citation(
        "R Devon Hjelm, Alex Fedorov, Samuel Lavoie-Marchildon, Karan Grewal, Phil Bachman, Adam Trischler, "
        "Yoshua Bengio",
        "Learning deep representations by mutual information estimation and maximization",
        2019,
        "ICLR",
        "https://arxiv.org/abs/1808.06670",
    )
    needs = Needs(recipe="none", encoder="maps", components=("critic", "discriminator"), batch_coupled=True)
    convergence = Convergence(
        job={
            "views.name": "simclr",
            "backbone.pool": "mean",
            "objective.critic_dim": 128,
            "objective.measure": "infonce",
            "objective.gamma": 0.0,
            "train.epochs": 3,
        },
        reason="with the default bound and no crops, places that remember an image make faces no better known",
    )

    class Hyperparameters(base.Hyperparameters):
        """Weights of the terms, the bound and the critic."""

        alpha: float = Field(0.0, ge=0, le=10, description="weight of the bound for the whole map")
        beta: float = Field(1.0, ge=0, le=10, description="weight of the bound for single places")
        gamma: float = Field(0.1, ge=0, le=10, description="weight of the prior; 0 for none")
        measure: Literal["jsd", "infonce", "dv"] = Field("jsd", description="which bound")
        critic_dim: int = Field(2048, ge=2, le=8192, description="width of the critic; 256 suits small images")
        discriminator_hidden: int = Field(200, ge=4, le=4096, description="width of the discriminator's hidden layers")

        @field_validator("beta")
        @classmethod
        def _something(cls, beta: float, info: ValidationInfo) -> float:
            if not beta and not info.data.get("alpha"):
                raise ValueError("alpha and beta are both 0: there is nothing to maximise")
            return beta

    def build(self, context: BuildContext) -> None:
        """Makes critics and discriminator."""
        options, dim = self.hyperparameters, context.embedding_dim
        self.seed = context.seed
        self.loss = InformationBound(options.measure)
        if options.beta:
            channels = map_encoder(self.encoder).stage_channels
            self.local_critic = PlaceScores(dim, channels[max(-2, -len(channels))], options.critic_dim)
        if options.alpha:
            self.global_critic = PlaceScores(dim, self._map_size(context), options.critic_dim)
        if options.gamma:
            width = options.discriminator_hidden
            layers = [nn.Linear(dim, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)]
            self.prior = PriorMatching(nn.Sequential(*layers))

    @torch.no_grad()
    def _map_size(self, context: BuildContext) -> int:
        """Numbers of C, asked of a copy: a forward pass moves statistics."""
        encoder = map_encoder(copy.deepcopy(self.encoder).eval())
        blank = torch.zeros(1, context.in_channels, *context.image_size)
        return self.stage(encoder.stages(blank)).numel()

    @staticmethod
    def stage(stages: tuple[Tensor, ...]) -> Tensor:
        """C: the map before the last, or the only one."""
        return stages[max(-2, -len(stages))]

    def forward(self, batch: Batch) -> Output:
        """The bounds' and the prior's loss."""
        metrics: dict[str, Tensor] = {}
        options = self.hyperparameters
        encoder = map_encoder(self.encoder)
        stages = encoder.stages(batch.views[0])
        local, vectors = self.stage(stages), encoder.embed_map(stages[-1])
        terms = []
        if options.beta:
            scores = scores_of_places(*self.local_critic(vectors, places_of(local)))
            terms.append(options.beta * self.loss(scores, metrics=metrics))
        if options.alpha:
            scores = scores_of_places(*self.global_critic(vectors, local.flatten(1)[:, None]))
            terms.append(options.alpha * self.loss(scores, metrics={} if options.beta else metrics))
        if options.gamma:
            cube = uniforms(sample_keys(key(_PRIOR, self.seed, self.step), batch.index), vectors.shape[1])
            y = torch.sigmoid(widen(vectors))
            told = self.prior(y, cube.to(y.dtype))
            metrics["prior"] = told.detach()
            terms.append(options.gamma * told)
        return Output(torch.stack(terms).sum(), metrics)


@register
class AMDIM(Objective):
    """AMDIM: vectors and places of one view are told apart from others' by the places of the other view, at two scales.

    ::

        L = 1/2 sum_{v -> v'} [ l(f_1^v -> f_5^v') + l(f_1^v -> f_7^v') + l(f_5^v -> f_5^v') ]

    l is :class:`armillary.losses.mutual_information.AcrossScales`, f_1 the embedding, f_5 the last map of the encoder,
    f_7 the one before; as a source f_5 is one place an image, drawn at random. Each scale has one embedding into the
    space of scores. The authors' network (5 x 5 and 7 x 7 places, no padding) gives way to the job's backbone. Loss and
    regulariser agree with their released code, which clips at 10 where the paper may say 20. Views are flipped each by
    itself, theirs are flipped alike.
    """

    name = "amdim"
    family = _FAMILY
    catalog_id = "amdim"
    citation = Citation(
        "Philip Bachman, R Devon Hjelm, William Buchwalter",
        "Learning Representations by Maximizing Mutual Information Across Views",
        2019,
        "NeurIPS",
        "https://arxiv.org/abs/1906.00910",
    )
    needs = Needs(
        views=2,
        recipe="simclr",
        recipe_options={"crop_scale": (0.3, 1.0), "gray_p": 0.25},
        encoder="maps",
        components=("critic",),
        batch_coupled=True,
    )
    convergence = Convergence(
        margin=0.015,
        job={"objective.score_dim": 64, "train.epochs": 6},
        reason="six epochs of small batches; three seeds gained 0.052, 0.026 and -0.045, the last from the best start",
    )

    class Hyperparameters(base.Hyperparameters):
        """Clipping, penalty and width of the scores."""

        tanh_clip: float = Field(10.0, ge=1, le=100, description="c, bound of the scores")
        score_penalty: float = Field(
            0.04, ge=0, le=1, description="lambda, weight of the scores' mean square; 0 for none"
        )
        score_dim: int = Field(1024, ge=2, le=8192, description="d, width of the scores' space; 256 suits small images")

    def build(self, context: BuildContext) -> None:
        """Makes an embedding for each scale."""
        options = self.hyperparameters
        channels = map_encoder(self.encoder).stage_channels
        widths = (context.embedding_dim, channels[-1], channels[max(-2, -len(channels))])
        self.embeddings = nn.ModuleList(
            nn.Sequential(
                nn.Linear(width, options.score_dim), nn.SiLU(), nn.Linear(options.score_dim, options.score_dim)
            )
            for width in widths
        )
        self.seed = context.seed
        self.loss = AcrossScales(options.tanh_clip, options.score_penalty)

    def scales(self, view: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """f_1 ``(batch, d)``, f_5 and f_7 ``(batch, places, d)``."""
        encoder = map_encoder(self.encoder)
        stages = encoder.stages(view)
        f1, f5, f7 = encoder.embed_map(stages[-1]), stages[-1], stages[max(-2, -len(stages))]
        return tuple(
            widen(embed(item)) for embed, item in zip(self.embeddings, (f1, places_of(f5), places_of(f7)), strict=True)
        )

    def one_place(self, places: Tensor, index: Tensor, view: int) -> Tensor:
        """A place of each image, ``(batch, d)``, drawn by step, view and index."""
        keys = sample_keys(key(_PLACE, self.seed, self.step, view), index)
        chosen = integers(keys, 1, places.shape[1])
        return places.gather(1, chosen[..., None].expand(-1, 1, places.shape[2]))[:, 0]

    def forward(self, batch: Batch) -> Output:
        """The six terms."""
        views = [self.scales(view) for view in batch.views]
        terms: list[Tensor] = []
        parts: list[dict[str, Tensor]] = []
        for view, ((f1, f5, _), (_, other5, other7)) in enumerate(((views[0], views[1]), (views[1], views[0]))):
            for source, target in ((f1, other5), (f1, other7), (self.one_place(f5, batch.index, view), other5)):
                parts.append({})
                terms.append(self.loss(source, target, metrics=parts[-1]) / 2)
        metrics = {name: torch.stack([part[name] for part in parts]).sum() / 2 for name in parts[0]}
        return Output(torch.stack(terms).sum(), metrics)
