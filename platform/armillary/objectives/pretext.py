"""Pretext tasks: which way up an image is, how its tiles were shuffled, whether frames are in order."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from armillary.components.counter import key, sample_keys, uniforms
from armillary.components.encoders import check_sizes
from armillary.components.heads import Projector
from armillary.losses.pretext import WhichWasApplied
from armillary.losses.tensors import not_a_number_guard
from armillary.objectives import base
from armillary.objectives.base import Batch, BuildContext, Citation, Convergence, Needs, Objective, Output
from armillary.objectives.registry import register

_FRAMES = 84
_FAMILY = "pretext"
_EPS = 1e-5


@register
class Rotation(Objective):
    """Rotation: a linear classifier on the encoder tells by how many quarters of a circle an image was turned.

    ``L = -1/N sum_i 1/K sum_{y < K} log F_y(g(X_i | y))``, g turns by ``360 y / K`` degrees without interpolation
    (:func:`torch.rot90`). All K copies of an image are in the batch; ``all_copies: false`` is the survey's print, one
    copy turned at random, which the paper found worse. Images without a right way up (a zero, a ball) bound the
    accuracy. Eight directions would need interpolation and are left out.
    """

    name = "rotation"
    family = _FAMILY
    catalog_id = "rotation"
    citation = Citation(
        "Spyros Gidaris, Praveer Singh, Nikos Komodakis",
        "Unsupervised Representation Learning by Predicting Image Rotations",
        2018,
        "ICLR",
        "https://arxiv.org/abs/1803.07728",
    )
    needs = Needs(views=4, recipe="rotation_all", components=("classifier",))
    convergence = Convergence(margin=0.05, job={"backbone.pool": "mean", "train.epochs": 5})

    class Hyperparameters(base.Hyperparameters):
        """How many directions, and whether all are seen in a step."""

        half_turns: bool = Field(False, description="K = 2, upright and upside down, in place of four directions")
        all_copies: bool = Field(True, description="every rotation of an image in each step, or one at random (K = 4)")

        @field_validator("all_copies")
        @classmethod
        def _drawn_from_four(cls, all_copies: bool, info: ValidationInfo) -> bool:
            if not all_copies and info.data.get("half_turns"):
                raise ValueError("one copy at random is drawn from four rotations")
            return all_copies

    @classmethod
    def needs_for(cls, hyperparameters: Any) -> Needs:
        """One view where one copy is drawn; three where the half turn is the last."""
        if not hyperparameters.all_copies:
            return Needs(recipe="rotation", components=("classifier",))
        return Needs(3, "rotation_all", components=("classifier",)) if hyperparameters.half_turns else cls.needs

    def build(self, context: BuildContext) -> None:
        """Makes the classifier."""
        self.classifier = nn.Linear(context.embedding_dim, 2 if self.hyperparameters.half_turns else 4)
        self.loss = WhichWasApplied()

    def forward(self, batch: Batch) -> Output:
        """The loss over all copies."""
        metrics: dict[str, Tensor] = {}
        options = self.hyperparameters
        if options.all_copies:
            # View v is turned v quarters: with two directions every other view.
            views = batch.views[:: 2 if options.half_turns else 1]
            turns = torch.arange(len(views), device=batch.index.device).repeat_interleave(len(batch.index))
        else:
            views, turns = batch.views, batch.parameters[0]["rotation_class"]
        logits = self.classifier(self.encoder(torch.cat(views)))
        return Output(self.loss(logits, turns, metrics=metrics), metrics)


@register
class Jigsaw(Objective):
    """Jigsaw: from the tiles of an image, seen one by one, a classifier tells in which of a set of orders they are.

    ``L = -log p(s | F(T_1), ..., F(T_9))``. The encoder, the same for all tiles, sees each tile less its mean and over
    its standard deviation; embeddings in the order shown go through a hidden layer. Orders are far from each other in
    Hamming distance (:func:`armillary.data.views.patches.permutations`, greedy as the paper's algorithm 1) and the same
    on every worker; tiles are cut at random places of their cells, so that edges do not give the order away. The
    paper's jitter of single colour channels is left out. The encoder must take images of a tile's size.

    The survey's reading, an image and its puzzle as a positive pair, is PIRL's and stands there.
    """

    name = "jigsaw"
    family = _FAMILY
    catalog_id = "jigsaw"
    citation = Citation(
        "Mehdi Noroozi, Paolo Favaro",
        "Unsupervised Learning of Visual Representations by Solving Jigsaw Puzzles",
        2016,
        "ECCV",
        "https://arxiv.org/abs/1603.09246",
    )
    needs = Needs(recipe="jigsaw", components=("classifier",))
    convergence = Convergence(
        margin=0.01,
        job={
            "backbone.pool": "mean",
            "objective.tiles": 2,
            "objective.permutations": 24,
            "objective.hidden": 256,
            "train.epochs": 6,
        },
        reason="puzzles of four tiles are soon solved without knowing faces: more epochs gain less",
    )

    class Hyperparameters(base.Hyperparameters):
        """The puzzle and the classifier."""

        tiles: int = Field(3, ge=2, le=4, description="tiles a side; 2 for images below 32 px")
        permutations: int = Field(
            1000, ge=2, le=10_000, validate_default=True, description="|S|, orders to tell apart; 100 suit small data"
        )
        tile_ratio: float = Field(0.85, ge=0.3, le=1, description="side of a tile over that of its cell")
        hidden: int = Field(4096, ge=2, le=65536, description="width of the classifier's hidden layer")

        @field_validator("permutations")
        @classmethod
        def _exist(cls, permutations: int, info: ValidationInfo) -> int:
            if info.data.get("tiles") == 2 and permutations > 24:
                raise ValueError("four tiles have 24 orders")
            return permutations

    @classmethod
    def needs_for(cls, hyperparameters: Any) -> Needs:
        """The recipe cuts the puzzle."""
        options = hyperparameters.model_dump(include={"tiles", "permutations", "tile_ratio"})
        return Needs(recipe="jigsaw", recipe_options=options, components=("classifier",))

    def build(self, context: BuildContext) -> None:
        """Makes the classifier.

        Raises:
            UserError: the encoder takes whole images only.
        """
        options = self.hyperparameters
        sides = [max(1, round(side // options.tiles * options.tile_ratio)) for side in context.image_size]
        check_sizes(self.encoder, [context.image_size, (sides[0], sides[1])], "this encoder")
        count = options.tiles**2
        self.classifier = Projector(
            count * context.embedding_dim, options.hidden, options.permutations, norm=False, last_bias=True
        )
        self.loss = WhichWasApplied()

    def forward(self, batch: Batch) -> Output:
        """The loss of the orders."""
        metrics: dict[str, Tensor] = {}
        count = self.hyperparameters.tiles**2
        features = self.encoder(self.tiles_of(batch.views[0])).unflatten(0, (-1, count)).flatten(1)
        logits = self.classifier(features)
        return Output(self.loss(logits, batch.parameters[0]["permutation"], metrics=metrics), metrics)

    def tiles_of(self, puzzle: Tensor) -> Tensor:
        """The tiles of ``(batch, C, n t, n t')``, image by image, ``(batch * n ** 2, C, t, t')``, each standardised.

        Encoders expect values about 1/2 with a deviation about 1/4.
        """
        number = self.hyperparameters.tiles
        cut = puzzle.unflatten(2, (number, -1)).unflatten(4, (number, -1))
        tiles = cut.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        mean = tiles.mean(dim=(1, 2, 3), keepdim=True)
        variance = (tiles - mean).square().mean(dim=(1, 2, 3), keepdim=True)
        standard: Tensor = (tiles - mean) / (variance + _EPS).sqrt()
        return 0.5 + 0.25 * standard


@register
class FrameOrder(Objective):
    """Shuffle and learn: from three frames of a video, a classifier tells whether they are in order.

    Five frames a < b < c < d < e are drawn from a clip; (b, c, d) is in order, (b, a, d) and (b, e, d) are not, and
    ``L`` is the cross-entropy of the two cases on the three embeddings side by side. Half of the triples are read
    backwards, which changes nothing: an order is the same in both directions. The paper draws clips with much motion
    (optical flow); here all clips count, and those that stand still cannot be decided. The sampling of triples is
    recalled from the paper, not checked against code. In the survey's print a shuffled sequence is a positive of the
    original; papers on order have it as a negative.
    """

    name = "frame_order"
    family = _FAMILY
    catalog_id = "frame_order"
    citation = Citation(
        "Ishan Misra, C. Lawrence Zitnick, Martial Hebert",
        "Shuffle and Learn: Unsupervised Learning using Temporal Order Verification",
        2016,
        "ECCV",
        "https://arxiv.org/abs/1603.08561",
    )
    needs = Needs(views=5, recipe="frames", components=("classifier",))
    convergence = Convergence(
        dataset="identities_video",
        margin=0.015,
        job={"backbone.pool": "mean", "train.epochs": 6},
        reason="seconds of training hardly begin to tell order: the loss falls from 0.70 to 0.64",
    )

    class Hyperparameters(base.Hyperparameters):
        """How triples are drawn."""

        negative_share: float = Field(0.75, ge=0.1, le=0.9, description="share of triples that are out of order")
        window: int = Field(5, ge=5, le=121, description="frames of a clip that the five are drawn from")

    _TRIPLES: ClassVar[tuple[tuple[int, int, int], ...]] = ((1, 2, 3), (1, 0, 3), (1, 4, 3))

    @classmethod
    def needs_for(cls, hyperparameters: Any) -> Needs:
        """As many views as a clip has frames."""
        return Needs(views=hyperparameters.window, recipe="frames", components=("classifier",))

    def build(self, context: BuildContext) -> None:
        """Makes the classifier."""
        self.seed = context.seed
        self.classifier = nn.Linear(3 * context.embedding_dim, 2)
        self.loss = WhichWasApplied()

    def triples(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The frames of each sample's triple, ``(batch, 3)`` places in the clip, and whether they are in order."""
        options = self.hyperparameters
        u = uniforms(sample_keys(key(_FRAMES, self.seed, self.step), index), 3 + options.window)
        five = u[:, 3:].argsort(dim=1, stable=True)[:, :5].sort(dim=1).values
        which = torch.where(u[:, 0] < options.negative_share, 1 + (u[:, 1] < 0.5).long(), 0)
        triples = torch.tensor(self._TRIPLES, device=index.device)[which]
        backwards = (u[:, 2] < 0.5)[:, None]
        return five.gather(1, torch.where(backwards, triples.flip(1), triples)), (which == 0).long()

    def forward(self, batch: Batch) -> Output:
        """The loss of the triples."""
        metrics: dict[str, Tensor] = {}
        frames, in_order = self.triples(batch.index)
        clips = torch.stack(batch.views, dim=1)
        chosen = clips[torch.arange(len(clips), device=clips.device)[:, None], frames]
        features = self.encoder(chosen.flatten(0, 1)).unflatten(0, (-1, 3)).flatten(1)
        loss = self.loss(self.classifier(features), in_order, metrics=metrics)
        # Frames that were not drawn may be broken too.
        return Output(loss + not_a_number_guard(clips), metrics)
