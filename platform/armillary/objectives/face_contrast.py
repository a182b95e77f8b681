"""Faces classified and contrasted at once: two dropout draws (CoReFace), with and without a mask (FocusFace)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from armillary import losses
from armillary.collectives import all_gather, gather_no_grad
from armillary.components.counter import key, sample_keys
from armillary.components.dropout import CounterDropout
from armillary.components.encoders import map_encoder
from armillary.losses.embedding_dropout import SampleGuidedContrast
from armillary.losses.tensors import check_labels, float32_math, normalize
from armillary.objectives.base import Batch, BuildContext, Citation, Convergence, Needs, Output
from armillary.objectives.base import Hyperparameters as Base
from armillary.objectives.bases import ClassHeadObjective
from armillary.objectives.registry import register

_DRAW = 95
_CODE = 32
_MAP_SIDE = 7
# Pixels that differ by less than this are the same, a quarter of a step of 8 bits.
_SAME = 1e-3


@register
class CoReFace(ClassHeadObjective):
    """CoReFace: ArcFace on two dropout draws of each image, which must also agree against other identities.

    ::

        L = 1/2 L_arc(z) + 1/2 L_arc(z') + lambda L_C(z, z')

    L_C and its moving margin: :class:`armillary.losses.embedding_dropout.SampleGuidedContrast`. Both draws drop values
    of the same feature map in front of the embedding layer: one pass through the backbone. Until ``start_share`` of the
    epochs is over there is no L_C and less dropout, as in the authors' schedule, which switches at the first drop of
    the learning rate.
    """

    name = "coreface"
    family = "contrastive_supervised"
    catalog_id = "coreface"
    citation = Citation(
        "Youzhe Song, Feng Wang",
        "CoReFace: Sample-Guided Contrastive Regularization for Deep Face Recognition",
        2023,
        "arXiv",
        "https://arxiv.org/abs/2304.11668",
    )
    needs = Needs(recipe="faces", fields=("label",), components=("class_head",), encoder="maps", batch_coupled=True)
    waivers: ClassVar[Mapping[str, str]] = {
        f"gradcheck[coreface{option}]": "the margin follows the cosines and is a constant for the gradient"
        for option in ("", "-mask=zero_cosine", "-direction=both")
    }
    convergence = Convergence(job={"objective.scale": 16.0, "objective.margin": 0.3})

    class Hyperparameters(Base):
        """Head, dropout and the contrastive term."""

        scale: float = Field(64.0, ge=0.01, le=1000, description="s, of head and contrastive term")
        margin: float = Field(0.5, ge=0, le=1.57, description="ArcFace's angular margin in radians")
        contrast_weight: float = Field(0.05, ge=0, le=10, description="lambda")
        ema: float = Field(0.99, gt=0, le=1, description="weight of the current batch in the moving margin")
        dropout_warm: float = Field(0.4, ge=0, le=0.9, description="dropout before the contrastive phase")
        dropout: float = Field(0.6, ge=0, le=0.9, description="dropout in the contrastive phase")
        start_share: float = Field(0.25, ge=0, le=1, description="share of the epochs before the contrastive phase")
        mask: Literal["exclude", "zero_cosine"] = Field("exclude", description="what becomes of the identity's others")
        direction: Literal["forward", "both"] = Field("forward", description="which draw is compared with which")
        formulation: Literal["paper", "survey"] = Field("paper", description="survey: the K nearest negatives alone")
        hardest: int = Field(16, ge=1, le=65536, description="K of the survey's form")

    def build(self, context: BuildContext) -> None:
        """Makes head, dropout and contrastive term."""
        options = self.hyperparameters
        self.seed, self.first_epoch = context.seed, options.start_share * context.epochs
        size = (context.num_classes, context.embedding_dim)
        self.loss = losses.ArcFace(*size, margin=options.margin, scale=options.scale)
        self.contrast = SampleGuidedContrast(
            options.scale, options.ema, options.mask, options.direction, options.formulation, options.hardest
        )
        self.drop = CounterDropout(options.dropout)

    def forward(self, batch: Batch) -> Output:
        """The loss of both draws of the first view."""
        metrics: dict[str, Tensor] = {}
        options, contrasting = self.hyperparameters, self.epoch >= self.first_epoch
        self.drop.p = options.dropout if contrasting else options.dropout_warm
        encoder = map_encoder(self.encoder)
        last = encoder.stages(batch.views[0])[-1]
        z, other = encoder.embed_map(torch.cat([self._dropped(last, batch.index, draw) for draw in range(2)])).chunk(2)
        loss = (self.loss(z, batch.label, metrics=metrics) + self.loss(other, batch.label)) / 2
        if contrasting:
            loss = loss + options.contrast_weight * self.contrast(z, other, batch.label, metrics=metrics)
        return Output(loss, metrics)

    def _dropped(self, features: Tensor, index: Tensor, draw: int) -> Tensor:
        self.drop.keys = sample_keys(key(_DRAW, self.seed, self.step, draw), index)
        dropped: Tensor = self.drop(features)
        self.drop.keys = None
        return dropped

    def after_step(self, step: int) -> None:
        """Keeps the moving margin."""
        self.contrast.update()


class MaskHead(nn.Sequential):
    """Whether a face wears a mask, from the last feature map: a code of 32 numbers, two logits.

    As in FocusFace's code the code is a convolution as large as a map of 7 x 7, to which other maps are averaged.

    Args:
        channels: of the map.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(
            nn.AdaptiveAvgPool2d(_MAP_SIDE),
            nn.Conv2d(channels, _CODE, _MAP_SIDE, bias=False),
            nn.Flatten(),
            nn.BatchNorm1d(_CODE),
            nn.ReLU6(),
            nn.Linear(_CODE, 2),
        )


@register
class FocusFace(ClassHeadObjective):
    """FocusFace: one identity head for a face and its masked copy, whose embeddings agree, and one that sees the mask.

    ``paper``, from the authors' released code (the paper's equations were not read), u the face, m its masked copy::

        L = 1/2 [L_arc(e_u) + L_arc(e_m)] + lambda_m/2 [CE(h(x_u), 0) + CE(h(x_m), 1)] + lambda_c mean (e_u - e_m)^2

    That code multiplies h(x_u) by zero, so that its term is log 2 (``unmasked_term: constant``).

    ``survey`` is another method under this name: supervised contrast of both views, and at the places p that the mask
    leaves free, with an attention w_p over them that is learned, local features of unit length f are drawn to those of
    the masked copy and away from those of the next other identity::

        L = L_SupCon + sum_p w_p (|f_p^u - f_p^m|^2 - |f_p^u - f_p^n|^2)
    """

    name = "focusface"
    family = "contrastive_supervised"
    catalog_id = "focusface"
    citation = Citation(
        "Pedro C. Neto, Fadi Boutros, João Ribeiro Pinto, Naser Damer, Ana F. Sequeira, Jaime S. Cardoso",
        "FocusFace: Multi-task Contrastive Learning for Masked Face Recognition",
        2021,
        "FG",
        "https://arxiv.org/abs/2110.14940",
    )
    needs = Needs(
        views=2, recipe="masked_face", fields=("label",), components=("class_head",), encoder="maps", batch_coupled=True
    )
    convergence = Convergence(job={"objective.scale": 16.0, "objective.margin": 0.3})

    class Hyperparameters(Base):
        """Head and weights."""

        scale: float = Field(64.0, ge=0.01, le=1000, description="s of the identity head")
        margin: float = Field(0.5, ge=0, le=1.57, description="angular margin of the identity head, radians")
        mask_weight: float = Field(0.1, ge=0, le=10, description="lambda_m, weight of seeing the mask")
        agreement_weight: float = Field(1 / 3, ge=0, le=100, description="lambda_c, weight of the embeddings' distance")
        unmasked_term: Literal["constant", "learned"] = Field("constant", description="of the face without a mask")
        formulation: Literal["paper", "survey"] = Field("paper", description="released code, or the survey's triplet")
        temperature: float = Field(0.1, ge=0.005, le=10, description="of the survey's supervised contrast")

    def build(self, context: BuildContext) -> None:
        """Makes identity and mask head, or the survey's contrast and attention."""
        options, channels = self.hyperparameters, map_encoder(context.encoder).stage_channels[-1]
        self.num_classes = context.num_classes
        if options.formulation == "paper":
            size = (context.num_classes, context.embedding_dim)
            self.loss = losses.ArcFace(*size, margin=options.margin, scale=options.scale)
            self.mask_head = MaskHead(channels)
        else:
            self.supcon = losses.SupCon(options.temperature)
            self.attention = nn.Conv2d(channels, 1, 1, bias=False)

    def forward(self, batch: Batch) -> Output:
        """The loss of the face (first view) and its masked copy (second view)."""
        metrics: dict[str, Tensor] = {}
        encoder = map_encoder(self.encoder)
        maps = encoder.stages(torch.cat(batch.views))[-1]
        embeddings = encoder.embed_map(maps)
        if self.hyperparameters.formulation == "survey":
            check_labels(batch.label, self.num_classes)
            loss = self.supcon(embeddings, batch.label.repeat(2), metrics=metrics)
            local = self._local_triplet(maps, self.attention(maps), batch)
            metrics["local_triplet"] = local.detach()
            return Output(loss + local, metrics)
        return Output(self._multi_task(maps, embeddings, batch, metrics), metrics)

    def _multi_task(self, maps: Tensor, embeddings: Tensor, batch: Batch, metrics: dict[str, Tensor]) -> Tensor:
        options = self.hyperparameters
        bare, masked = embeddings.chunk(2)
        identity = (self.loss(bare, batch.label, metrics=metrics) + self.loss(masked, batch.label)) / 2
        agreement = _mean_squared(bare, masked)
        logits = self.mask_head(maps).float() if maps.dtype != torch.float64 else self.mask_head(maps)
        of_bare, of_masked = logits.chunk(2)
        if options.unmasked_term == "constant":
            of_bare = 0 * of_bare
        wears = torch.ones_like(batch.label)
        seen = (F.cross_entropy(of_bare, 0 * wears) + F.cross_entropy(of_masked, wears)) / 2
        metrics.update(agreement=agreement.detach(), mask_entropy=seen.detach())
        loss: Tensor = identity + options.mask_weight * seen + options.agreement_weight * agreement
        return loss

    @staticmethod
    @float32_math
    def _local_triplet(maps: Tensor, attention: Tensor, batch: Batch) -> Tensor:
        local = normalize(maps.flatten(2).transpose(1, 2))
        anchor, positive = local.chunk(2)
        # Views differ by the mask alone: a place is free where both show the same pixels.
        hidden = (batch.views[0] - batch.views[1]).abs().amax(dim=1, keepdim=True) > _SAME
        free = F.adaptive_avg_pool2d(1 - hidden.to(maps.dtype), (maps.shape[2], maps.shape[3])).flatten(1)
        weight = attention.chunk(2)[0].flatten(1).softmax(dim=1) * free
        weight = weight / weight.sum(dim=1, keepdim=True).clamp_min(1e-6)
        everyone, labels = all_gather(anchor), gather_no_grad(batch.label)
        likeness = torch.einsum("bpc,npc->bn", anchor.detach(), everyone.detach())
        likeness = likeness.masked_fill(batch.label[:, None] == labels, -torch.inf)
        negative = everyone[likeness.argmax(dim=1)]
        near, far = ((anchor - other).square().sum(dim=2) for other in (positive, negative))
        has_other = torch.isfinite(likeness).any(dim=1, keepdim=True)
        return (weight * (near - torch.where(has_other, far, 0))).sum(dim=1).mean()


@float32_math
def _mean_squared(one: Tensor, two: Tensor) -> Tensor:
    return (one - two).square().mean()
