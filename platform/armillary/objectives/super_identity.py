"""Super-identity: a network that sharpens small faces, judged by the face recogniser it is trained with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from armillary.components.modes import evaluating
from armillary.components.super_resolution import Sharpener
from armillary.losses.class_centers import CenterLoss
from armillary.losses.frozen import through_frozen
from armillary.losses.multiplied_angles import SphereFace
from armillary.losses.tensors import float32_math, normalize
from armillary.objectives import base
from armillary.objectives.base import Batch, BuildContext, Citation, Convergence, Needs, Output
from armillary.objectives.bases import ClassHeadObjective
from armillary.objectives.registry import register


@float32_math
def super_identity_loss(sharpened: Tensor, original: Tensor) -> Tensor:
    """``mean_i |r_i / |r_i| - t_i / |t_i||^2`` of features ``(batch, dim)``, in [0, 4]; no gradient to ``original``."""
    return (normalize(sharpened) - normalize(original.detach())).square().sum(dim=1).mean()


@register
class SuperIdentity(ClassHeadObjective):
    """Super-identity: small faces are sharpened so that the recogniser sees the same person in them.

    ::

        L_FR = A-Softmax of R on originals and sharpened faces,  H fixed
        L_SR = mean |H(I_LR) - I_HR|^2, pixels in [-1, 1],  per value
        L_SI = mean |R(H(I_LR)) / |.| - sg R(I_HR) / |.||^2,  R fixed
        H learns L_SR + alpha L_SI, R learns L_FR, each from the same state

    Before that, for ``pretrain`` of the epochs, R sees originals alone and H learns L_SR alone. R is in evaluation mode
    in L_SI, so that it judges as it will be used. H adds detail to the enlarged image, where the paper's network
    enlarges inside; the public re-implementation compares features that are not normalised. Steps of both networks are
    taken at once instead of in turn, with one learning rate.

    ``formulation: survey`` compares R(H(I_LR)), not normalised, with the running mean of R over the person's originals.
    Evaluated is R; the pictures show the enlarged, the sharpened and the original face.
    """

    name = "super_identity"
    family = "generative"
    catalog_id = "super_identity"
    citation = Citation(
        "Kaipeng Zhang, Zhanpeng Zhang, Chia-Wen Cheng, Winston H. Hsu, Yu Qiao, Wei Liu, Tong Zhang",
        "Super-Identity Convolutional Neural Network for Face Hallucination",
        2018,
        "ECCV",
        "https://arxiv.org/abs/1811.02328",
    )
    needs = Needs(
        views=2, recipe="low_res_pair", fields=("label",), components=("class_head", "low_res_pair", "super_resolution")
    )
    loss_class = SphereFace
    waivers: ClassVar[Mapping[str, str]] = {
        "gradcheck": "the originals' features are targets without gradient, and every pass moves the batch norm's "
        "statistics, which the next one judges by",
        "learns": "features that tell nobody apart agree at once; as they learn to, L_SI grows before it falls",
    }
    convergence = Convergence(
        margin=0.065,
        job={
            "objective.annealing_start": 5.0,
            "objective.width": 8,
            "objective.layers": 3,
            "objective.upscale": 4.0,
            "train.epochs": 6,
        },
    )

    class Hyperparameters(base.Hyperparameters):
        """Of the recogniser's A-Softmax, the sharpener, and their stages."""

        alpha: float = Field(8.0, ge=0, le=1000, description="weight of L_SI against the pixel loss")
        upscale: float = Field(8.0, ge=1.25, le=32, description="sides of the original over those of the small face")
        margin: float = Field(4.0, ge=1, le=8, description="m of A-Softmax, multiplies the angle")
        annealing_start: float = Field(1000.0, ge=0, le=1e6, description="weight of the plain logit at step 0")
        annealing_floor: float = Field(5.0, ge=0, le=1000, description="least weight of the plain logit")
        width: int = Field(32, ge=2, le=512, description="channels of the sharpener")
        layers: int = Field(5, ge=2, le=32, description="convolutions of the sharpener")
        pretrain: float = Field(0.25, ge=0, le=0.9, description="share of steps of the first stage")
        formulation: Literal["paper", "survey"] = Field("paper", description="same image, or the person's mean")

    @classmethod
    def needs_for(cls, hyperparameters: Any) -> Needs:
        """Both views, the second of the given resolution."""
        factor = hyperparameters.upscale
        return replace(cls.needs, recipe_options={"low_res": [[1.0, 1.0], [factor, factor]]})

    def build(self, context: BuildContext) -> None:
        """Makes the head and the sharpener."""
        options = self.hyperparameters
        self.loss = SphereFace(
            context.num_classes,
            context.embedding_dim,
            options.margin,
            annealing_start=options.annealing_start,
            annealing_floor=options.annealing_floor,
        )
        self.sharpener = Sharpener(context.in_channels, options.width, options.layers)
        self.joint_from = round(options.pretrain * context.epochs * context.steps_per_epoch)
        if options.formulation == "survey":
            self.prototypes = CenterLoss(context.num_classes, context.embedding_dim)

    def after_step(self, step: int) -> None:
        """Moves the survey's prototypes."""
        if self.hyperparameters.formulation == "survey":
            self.prototypes.update()

    def forward(self, batch: Batch) -> Output:
        """What both networks learn from the batch."""
        metrics: dict[str, Tensor] = {}
        (high, low), labels = batch.views, batch.label
        joint = self.step >= self.joint_from
        sharp = self.sharpener(low).to(high.dtype)
        seen = torch.cat([high, sharp.detach()]) if joint else high
        self.loss.get_buffer("iteration").fill_(self.step)
        loss = self.loss(self.encoder(seen), labels.repeat(1 + joint), metrics=metrics)
        pixels = 4 * (sharp - high).square().mean()
        metrics["pixel_loss"] = pixels.detach()
        metrics["enlarged_pixel_loss"] = 4 * (low - high).square().mean().detach()
        loss = loss + pixels
        if joint:
            with evaluating(self.encoder):
                identity = self._identity_loss(sharp, high, labels)
            metrics["identity_loss"] = identity.detach()
            loss = loss + self.hyperparameters.alpha * identity
        return Output(loss, metrics)

    def _identity_loss(self, sharp: Tensor, high: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            original = self.encoder(high)
        if self.hyperparameters.formulation == "paper":
            return through_frozen(lambda faces: super_identity_loss(self.encoder(faces), original), sharp)
        self.prototypes(original, labels)
        means = self.prototypes.centers[labels]
        return through_frozen(lambda faces: (self.encoder(faces) - means).square().sum(dim=1).mean(), sharp)

    def pictures(self, images: Tensor) -> dict[str, Tensor]:
        """``super_resolution``: a row of enlarged faces, one of them sharpened, one of originals."""
        size = images.shape[-2:]
        small = [max(1, round(side / self.hyperparameters.upscale)) for side in size]
        low = F.interpolate(F.interpolate(images, small, mode="area"), size, mode="bilinear", align_corners=False)
        return {"super_resolution": torch.stack([low, self.sharpener(low), images])}
