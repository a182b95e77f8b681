"""Every image a class of its own, remembered in a bank by its index."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from armillary.components.bank import MemoryBank
from armillary.components.counter import integers, key, sample_keys
from armillary.components.heads import Projector
from armillary.losses.instances import NoiseContrastive, NonParametricSoftmax, SampledInstances, cosines_at
from armillary.losses.tensors import float32_math, normalize, widen
from armillary.objectives import base
from armillary.objectives.base import Batch, BuildContext, Citation, Convergence, Needs, Objective, Output
from armillary.objectives.registry import register

_DRAW = 71


class BankObjective(Objective):
    """A linear head whose unit vectors are kept in a bank, and draws from the bank's rows.

    Rows start as random unit vectors. During the first epoch every row counts; later those do that were written, since
    the bank has rows for all indices of the dataset and not all of them need belong to the training part.
    """

    family = "contrastive_views"

    def build(self, context: BuildContext) -> None:
        """Makes head and bank."""
        options = self.hyperparameters
        self.seed = context.seed
        self.projector = Projector(context.embedding_dim, 0, options.projection_dim, 1, norm=False)
        self.bank = MemoryBank(context.dataset_size, (options.projection_dim,), host=options.bank_host)

    def counted(self) -> Tensor:
        """``(dataset_size,)`` bool: the rows that stand for images of the training part."""
        written = self.bank.written
        return written if self.epoch > 0 and bool(written.any()) else torch.ones_like(written)

    def draw(self, index: Tensor, count: int) -> Tensor:
        """``(batch, count)`` int64: rows for each sample, uniformly and with repetition, its own not excluded."""
        places = self.counted().to(index.device).nonzero()[:, 0]
        keys = sample_keys(key(_DRAW, self.seed, self.step), index)
        return places[integers(keys, count, len(places))]

    def after_step(self, step: int) -> None:
        """Mixes the step's vectors into their rows."""
        self.bank.write(self.hyperparameters.memory_momentum)


@register
class InstaDisc(BankObjective):
    """Instance discrimination: an image must find its own row in a memory of all images.

    ``estimator: noise`` compares with rows drawn as noise (:class:`armillary.losses.instances.NoiseContrastive`),
    ``softmax`` with all rows (:class:`armillary.losses.instances.NonParametricSoftmax`), which suits small data. To it
    comes ``lambda |v - v_i|^2``, v_i the row before this step, and after the step
    ``v_i <- normalize(mu v_i + (1 - mu) v)``.

    The paper's text has mu = 0 and the proximal term; its released code mu = 0.5 and no such term. Noise is drawn
    uniformly and may hit the image's own row, as in that code.
    """

    name = "instadisc"
    catalog_id = "instadisc"
    citation = Citation(
        "Zhirong Wu, Yuanjun Xiong, Stella Yu, Dahua Lin",
        "Unsupervised Feature Learning via Non-Parametric Instance Discrimination",
        2018,
        "CVPR",
        "https://arxiv.org/abs/1805.01978",
    )
    needs = Needs(views=1, recipe="moco_v1", components=("projector", "memory_bank"))
    waivers: ClassVar[Mapping[str, str]] = {
        "gradcheck[estimator=noise]": "the first batch's normaliser is a constant, and finite differences move it"
    }
    convergence = Convergence(
        margin=0.07,
        job={
            "objective.estimator": "softmax",
            "objective.temperature": 0.1,
            "objective.projection_dim": 64,
            "objective.proximal": 0.0,
        },
    )

    class Hyperparameters(base.Hyperparameters):
        """Temperature, estimator, memory, width of the head."""

        temperature: float = Field(0.07, ge=0.02, le=10, description="divides the cosines; 0.1 suits small data")
        estimator: Literal["noise", "softmax"] = Field("noise", description="against drawn rows, or against all")
        bank_samples: int = Field(4096, ge=1, le=1_048_576, description="m, rows drawn as noise")
        memory_momentum: float = Field(0.5, ge=0, le=1, description="mu, share of the old row that is kept")
        proximal: float = Field(30.0, ge=0, le=1000, description="lambda, weight of the distance to the old row")
        bank_host: bool = Field(False, description="keep the bank in main memory; costs a copy a step")
        projection_dim: int = Field(128, ge=2, le=8192, description="width of the rows")

    def build(self, context: BuildContext) -> None:
        """Makes head, bank and loss."""
        super().build(context)
        options = self.hyperparameters
        self.loss: nn.Module
        if options.estimator == "noise":
            self.loss = NoiseContrastive(options.temperature, context.num_samples)
        else:
            self.loss = NonParametricSoftmax(options.temperature)

    def forward(self, batch: Batch) -> Output:
        """The loss of the view's vectors."""
        metrics: dict[str, Tensor] = {}
        return Output(self._loss(self.projector(self.encoder(batch.views[0])), batch.index, metrics), metrics)

    @float32_math
    def _loss(self, projections: Tensor, index: Tensor, metrics: dict[str, Tensor]) -> Tensor:
        options = self.hyperparameters
        vectors = normalize(projections)
        own = self.bank.lookup(index)
        self.bank.hold(self.step, index, vectors)
        positive = (vectors * own).sum(1)
        metrics["own_cosine"] = positive.detach().mean()
        proximal: Tensor = options.proximal * (vectors - own).square().sum(1).mean()
        if options.estimator == "softmax":
            found: Tensor = self.loss(vectors, self.bank.rows, index, self.counted())
        else:
            found = self.loss(positive, cosines_at(vectors, self.bank.stored, self.draw(index, options.bank_samples)))
        return found + proximal

    def after_step(self, step: int) -> None:
        """Mixes the step's vectors into their rows; the first step's normaliser stays."""
        super().after_step(step)
        if isinstance(self.loss, NoiseContrastive):
            self.loss.freeze()


@register
class PIRL(BankObjective):
    """PIRL: an image and its jigsaw puzzle both find the image's row in a memory of all images.

    With m_I the image's row, v the image, the puzzle's nine tiles t in a random order, f a linear head, and g a linear
    head of each tile whose outputs side by side go through another::

        L = lambda L_NCE(m_I, g(t)) + (1 - lambda) L_NCE(m_I, f(v)),    m_I <- normalize(mu m_I + (1 - mu) f(v))

    L_NCE is :class:`armillary.losses.instances.SampledInstances`; ``denominator: constant`` takes
    :class:`armillary.losses.instances.NoiseContrastive`, as the released code does. Needs a network that takes tiles,
    smaller than the image.
    """

    name = "pirl"
    catalog_id = "pirl"
    citation = Citation(
        "Ishan Misra, Laurens van der Maaten",
        "Self-Supervised Learning of Pretext-Invariant Representations",
        2020,
        "CVPR",
        "https://arxiv.org/abs/1912.01991",
    )
    needs = Needs(views=2, recipe="pirl", components=("projector", "memory_bank"))
    tiles: ClassVar[int] = 3
    waivers: ClassVar[Mapping[str, str]] = {
        "gradcheck[denominator=constant]": "the first batch's normaliser is a constant, and finite differences move it"
    }
    convergence = Convergence(
        margin=0.04,
        job={
            "backbone.pool": "mean",
            "objective.bank_samples": 256,
            "objective.temperature": 0.1,
            "objective.projection_dim": 64,
        },
    )

    class Hyperparameters(base.Hyperparameters):
        """Weight of the puzzle, temperature, memory, width of the heads."""

        jigsaw_weight: float = Field(0.5, ge=0, le=1, description="lambda, share of the puzzle's loss")
        temperature: float = Field(0.07, ge=0.02, le=10, description="divides the cosines; 0.1 suits small data")
        denominator: Literal["drawn", "constant"] = Field("drawn", description="of drawn rows, or of the first batch's")
        bank_samples: int = Field(32000, ge=1, le=1_048_576, description="rows drawn as negatives; 1024 for small data")
        memory_momentum: float = Field(0.5, ge=0, le=1, description="mu, share of the old row that is kept")
        bank_host: bool = Field(False, description="keep the bank in main memory; costs a copy a step")
        projection_dim: int = Field(128, ge=2, le=8192, description="width of the rows")

    def build(self, context: BuildContext) -> None:
        """Makes heads, bank and loss; the two branches of a constant denominator have one each."""
        super().build(context)
        options = self.hyperparameters
        width = options.projection_dim
        self.tile_head = nn.Linear(context.embedding_dim, width)
        self.puzzle_head = nn.Linear(self.tiles**2 * width, width)
        made = (
            SampledInstances(options.temperature)
            if options.denominator == "drawn"
            else NoiseContrastive(options.temperature, context.num_samples)
            for _ in range(2)
        )
        self.losses = nn.ModuleList(made)

    def forward(self, batch: Batch) -> Output:
        """The loss of the image (first view) and of its puzzle (second view)."""
        image, puzzle = batch.views
        tiles = self.tile_head(self.encoder(cut_tiles(puzzle, self.tiles)))
        assembled = self.puzzle_head(tiles.view(len(image), -1))
        metrics: dict[str, Tensor] = {}
        return Output(self._loss(self.projector(self.encoder(image)), assembled, batch.index, metrics), metrics)

    @float32_math
    def _loss(self, image: Tensor, puzzle: Tensor, index: Tensor, metrics: dict[str, Tensor]) -> Tensor:
        options = self.hyperparameters
        own, drawn = self.bank.lookup(index), self.draw(index, options.bank_samples)
        terms = []
        for loss, projections in zip(self.losses, (puzzle, image), strict=True):
            vectors = normalize(projections)
            terms.append(loss((vectors * own).sum(1), cosines_at(vectors, self.bank.stored, drawn)))
        self.bank.hold(self.step, index, normalize(widen(image)))
        metrics.update(jigsaw=terms[0].detach(), image=terms[1].detach())
        loss_of_both: Tensor = options.jigsaw_weight * terms[0] + (1 - options.jigsaw_weight) * terms[1]
        return loss_of_both

    def after_step(self, step: int) -> None:
        """Mixes the images' vectors into their rows; the first step's normalisers stay."""
        super().after_step(step)
        for loss in self.losses:
            if isinstance(loss, NoiseContrastive):
                loss.freeze()


def cut_tiles(puzzle: Tensor, tiles: int) -> Tensor:
    """A puzzle ``(B, C, tiles * h, tiles * w)`` as its tiles ``(B * tiles ** 2, C, h, w)``, an image's in rows."""
    cut: Tensor = puzzle.unflatten(2, (tiles, -1)).unflatten(4, (tiles, -1))
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
