"""Objectives that predict hidden patches: masked autoencoders (pixels) and MaskFeat (histograms of gradients)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from armillary.components.counter import key, sample_keys
from armillary.components.encoders import token_encoder
from armillary.components.heads import MaskedDecoder
from armillary.components.hog import hog, hog_of_patches
from armillary.components.masks import block_mask, random_keep
from armillary.components.patches import patchify, unpatchify
from armillary.losses.masked import MaskedPatches
from armillary.losses.tensors import widen
from armillary.objectives import base
from armillary.objectives.base import Batch, BuildContext, Citation, Convergence, Needs, Objective, Output
from armillary.objectives.registry import register
from armillary.spec.errors import UserError

_MASK = 83
_FAMILY = "masked_modelling"
# Digits of 16 pixels in patches of 4, judged by the mean of the patches: people need far longer trainings.
_SHORT: dict[str, Any] = {
    "data.split": "sample",
    "data.image_size": [16, 16],
    "backbone.patch": 4,
    "backbone.pool": "mean",
    "backbone.width": 48,
    "backbone.depth": 2,
    "views.crop_scale": [0.7, 1.0],
    "views.flip": 0,
}
_NECK = "the layer from tokens to the embedding is behind what is trained: it keeps its random start until fine-tuning"


class MaskedObjective(Objective):
    """One view, some of whose patches are hidden: which ones depends on seed, step and the image's index."""

    family = _FAMILY

    def build(self, context: BuildContext) -> None:
        """Finds the grid of patches."""
        self.seed = context.seed
        self.patch_size = token_encoder(self.encoder).patch_size
        self.channels = context.in_channels
        self.grid = (context.image_size[0] // self.patch_size[0], context.image_size[1] // self.patch_size[1])

    def keys(self, index: Tensor) -> Tensor:
        """A key for each image's mask at this step."""
        return sample_keys(key(_MASK, self.seed, self.step), index)


@register
class MAE(MaskedObjective):
    """Masked autoencoder: of the few patches it sees, the encoder tells a decoder what the others look like.

    The encoder gets the visible patches alone, the decoder puts a learned token in place of the others; the loss is
    :class:`armillary.losses.masked.MaskedPatches`. ``formulation: survey`` takes the survey's mean over all patches,
    seen ones too. Loss and masking agree with the authors' released code. Batches of flat patches (digits) are better
    predicted as they are: ``norm_pix: false``.
    """

    name = "mae"
    catalog_id = "mae"
    citation = Citation(
        "Kaiming He, Xinlei Chen, Saining Xie, Yanghao Li, Piotr Dollár, Ross Girshick",
        "Masked Autoencoders Are Scalable Vision Learners",
        2022,
        "CVPR",
        "https://arxiv.org/abs/2111.06377",
    )
    needs = Needs(recipe="mae", encoder="tokens", components=("decoder",))
    waivers: ClassVar[Mapping[str, str]] = {
        "every_parameter_learns": f"{_NECK}; the encoder sees no masked patch, so that its mask token waits too"
    }
    convergence = Convergence(
        dataset="digits",
        metric="knn/top1",
        margin=0.04,
        job={
            **_SHORT,
            "objective.decoder_dim": 48,
            "objective.decoder_depth": 1,
            "objective.decoder_heads": 3,
            "objective.mask_ratio": 0.6,
            "objective.norm_pix": False,
            "optimizer.lr": 4e-3,
            "train.epochs": 12,
        },
        reason="masked models need long trainings, and the layer to the embedding is random",
    )

    class Hyperparameters(base.Hyperparameters):
        """Share of hidden patches, kind of target, shape of the decoder."""

        mask_ratio: float = Field(0.75, ge=0.05, le=0.95, description="r, share of patches that are hidden")
        norm_pix: bool = Field(True, description="predict patches standardised each by itself")
        decoder_dim: int = Field(512, ge=4, le=4096, description="width of the decoder; 96 suits small images")
        decoder_depth: int = Field(8, ge=1, le=24, description="layers of the decoder; 2 suit small images")
        decoder_heads: int = Field(
            16, ge=1, le=64, validate_default=True, description="attention heads of the decoder, which divide its width"
        )
        formulation: Literal["paper", "survey"] = Field("paper", description="survey: visible patches count too")

        @field_validator("decoder_heads")
        @classmethod
        def _divides(cls, heads: int, info: ValidationInfo) -> int:
            width = info.data.get("decoder_dim", heads)
            if width % heads or width % 4:
                raise ValueError(f"decoder_dim {width} must be a multiple of 4 and of decoder_heads")
            return heads

    def build(self, context: BuildContext) -> None:
        """Makes decoder and loss."""
        super().build(context)
        options = self.hyperparameters
        out_features = self.patch_size[0] * self.patch_size[1] * context.in_channels
        width = token_encoder(self.encoder).token_dim
        self.decoder = MaskedDecoder(
            width, self.grid, out_features, options.decoder_dim, options.decoder_depth, options.decoder_heads
        )
        self.loss = MaskedPatches(options.norm_pix, "hidden" if options.formulation == "paper" else "all")

    def forward(self, batch: Batch) -> Output:
        """The loss of the hidden patches."""
        metrics: dict[str, Tensor] = {}
        predicted, hidden = self.reconstruct(batch.views[0], batch.index)
        target = patchify(batch.views[0], self.patch_size)
        return Output(self.loss(predicted, target, hidden, metrics=metrics), metrics)

    def reconstruct(self, images: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Every patch as predicted, ``(batch, T, D)``, and which ones were hidden, ``(batch, T)``."""
        count = self.grid[0] * self.grid[1]
        keep, hidden = random_keep(self.keys(index), count, self.hyperparameters.mask_ratio)
        tokens = token_encoder(self.encoder).tokens(images, keep=keep)
        return self.decoder(tokens.cls, tokens.patches, keep), hidden

    def pictures(self, images: Tensor) -> dict[str, Tensor]:
        """Each image, what is seen of it, and the hidden patches as predicted."""
        target = widen(patchify(images, self.patch_size))
        predicted, hidden = self.reconstruct(images, torch.arange(len(images), device=images.device))
        predicted = widen(predicted)
        if self.hyperparameters.norm_pix:
            deviation = (target.var(dim=2, keepdim=True) + MaskedPatches.EPS).sqrt()
            predicted = predicted * deviation + target.mean(dim=2, keepdim=True)
        seen = target.masked_fill(hidden[..., None], 0.5)
        filled = torch.where(hidden[..., None], predicted, target)
        size = (images.shape[2], images.shape[3])
        shown = [unpatchify(patches, self.patch_size, size) for patches in (target, seen, filled)]
        return {"reconstruction": torch.stack(shown, dim=1).clamp(0, 1)}


@register
class MaskFeat(MaskedObjective):
    """MaskFeat: the encoder sees a learned token in place of hidden patches and predicts their gradients' histograms.

    Targets are :func:`armillary.components.hog.hog` of the view, without gradient; one linear layer predicts them, the
    loss is the mean square over hidden patches. Target, head and loss follow the authors' released layer and the paper;
    blocks of hidden patches are drawn as BEiT draws them. ``formulation: survey`` has the survey's target (gradients
    are scaled before they are counted, histograms are not) and sums squares over its numbers; the survey's decoder,
    which sees visible patches only, would make it another network and is left out.
    """

    name = "maskfeat"
    catalog_id = "maskfeat"
    citation = Citation(
        "Chen Wei, Haoqi Fan, Saining Xie, Chao-Yuan Wu, Alan Yuille, Christoph Feichtenhofer",
        "Masked Feature Prediction for Self-Supervised Visual Pre-Training",
        2022,
        "CVPR",
        "https://arxiv.org/abs/2112.09133",
    )
    needs = Needs(recipe="mae", encoder="tokens", components=("head",))
    waivers: ClassVar[Mapping[str, str]] = {
        "every_parameter_learns": _NECK,
        "gradcheck": "the histograms are constants: no gradient passes through them",
    }
    convergence = Convergence(
        dataset="digits",
        metric="knn/top1",
        margin=0.03,
        job={
            **_SHORT,
            "objective.cell": 2,
            "objective.gaussian_window": 0,
            "objective.mask_ratio": 0.6,
            "optimizer.lr": 5e-3,
            "train.epochs": 20,
        },
        reason="masked models need long trainings, and the layer to the embedding is random",
    )

    class Hyperparameters(base.Hyperparameters):
        """Share of hidden patches and the histograms' shape."""

        mask_ratio: float = Field(0.4, ge=0.05, le=0.95, description="share of patches that are hidden, in blocks")
        bins: int = Field(9, ge=2, le=36, description="orientations")
        cell: int | None = Field(
            None, ge=1, le=32, description="side of a cell in pixels, divides patches; null: half a patch, as the paper"
        )
        gaussian_window: int = Field(16, ge=0, le=64, description="side of the window of weights; 0 for none")
        formulation: Literal["paper", "survey"] = Field("paper", description="survey: gradients scaled before counting")

    def build(self, context: BuildContext) -> None:
        """Makes head and loss.

        Raises:
            UserError: cells do not divide patches.
        """
        super().build(context)
        options = self.hyperparameters
        self.cell = options.cell or max(1, min(self.patch_size) // 2)
        if any(side % self.cell for side in self.patch_size):
            raise UserError(
                f"cells of {self.cell} px do not divide patches of {' x '.join(map(str, self.patch_size))} px",
                key="objective.cell",
                allowed="a divisor of the encoder's patch",
            )
        self.cells = (self.patch_size[0] // self.cell, self.patch_size[1] // self.cell)
        out_features = self.cells[0] * self.cells[1] * options.bins * context.in_channels
        self.head = nn.Linear(token_encoder(self.encoder).token_dim, out_features)
        self.loss = MaskedPatches(patches="hidden" if options.formulation == "paper" else "summed")

    def forward(self, batch: Batch) -> Output:
        """The loss of the hidden patches' histograms."""
        metrics: dict[str, Tensor] = {}
        images = batch.views[0]
        count = round(self.hyperparameters.mask_ratio * self.grid[0] * self.grid[1])
        keys = self.keys(batch.index)
        hidden = block_mask(keys, self.grid, torch.full_like(keys, max(count, 1)))
        tokens = token_encoder(self.encoder).tokens(images, masked=hidden)
        predicted = self.head(tokens.patches)
        return Output(self.loss(predicted, self.target(images), hidden, metrics=metrics), metrics)

    @torch.no_grad()
    def target(self, images: Tensor) -> Tensor:
        """Every patch's histograms, ``(batch, T, channels * bins * cells)``."""
        options = self.hyperparameters
        kind: Literal["sobel", "scaled"] = "sobel" if options.formulation == "paper" else "scaled"
        found = hog(images, bins=options.bins, cell=self.cell, window=options.gaussian_window, kind=kind)
        return hog_of_patches(found, self.cells)
