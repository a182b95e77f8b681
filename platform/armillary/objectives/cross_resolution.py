"""Faces of high and low resolution in one space: coupled alignment, transferable coupling, extended identities.

The papers' equations could not be found, neither their texts nor public code. What stands here is built from their
abstracts and from what a survey says of them; each class says which, and none claims to be the paper's loss.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from math import pi
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from armillary.components.counter import key, normals, sample_keys
from armillary.components.heads import Projector
from armillary.components.teacher import Teacher
from armillary.losses import ArcFace, CosFace, Softmax
from armillary.losses.cross_resolution import (
    CenterCalibrator,
    ManifoldAlignment,
    ThresholdPairs,
    TransferableTriplet,
)
from armillary.losses.frozen import through_frozen
from armillary.losses.tensors import normalize, widen
from armillary.objectives import base
from armillary.objectives.base import Batch, BuildContext, Citation, Convergence, Needs, Output
from armillary.objectives.bases import ClassHeadObjective
from armillary.objectives.margin_softmax import MAX_SCALE
from armillary.objectives.registry import register

_GENERATOR_NOISE = 71
_PAIR = Needs(
    views=2, recipe="low_res_pair", fields=("label",), components=("class_head", "low_res_pair"), batch_coupled=True
)


class CrossResolutionHyperparameters(base.Hyperparameters):
    """How small the low-resolution faces are."""

    downscale: float = Field(
        4.0, ge=1.25, le=64, description="sides of the image over those of the low-resolution face; 7 makes 16 of 112"
    )


class CrossResolutionObjective(ClassHeadObjective):
    """A face and its low-resolution version, made smaller by ``downscale`` and enlarged again, in view 0 and 1."""

    family = "cross_resolution"
    needs = _PAIR

    @classmethod
    def needs_for(cls, hyperparameters: Any) -> Needs:
        """Both views, the second of the given resolution."""
        factor = hyperparameters.downscale
        return replace(cls.needs, recipe_options={"low_res": [[1.0, 1.0], [factor, factor]]})


@register
class CoupledManifoldAlignment(CrossResolutionObjective):
    """Coupled manifold alignment: two encoders, one head, and features whose pairs, means and covariances agree.

    ::

        L = L_arc(f_H(x), y) + L_arc(f_L(x low), y) + lambda1 mean_i |f_H - f_L|^2
            + lambda2 (|mu_H - mu_L|^2 + |Sigma_H - Sigma_L|_F^2)

    A reconstruction: the survey names the parts (ArcFace, the pair distance, means and covariances); their weights, the
    shared head and the form of the moments are choices. Evaluated is f_H.
    """

    name = "coupled_manifold_alignment"
    catalog_id = "coupled_manifold_alignment"
    citation = Citation(
        "K. Zhang, D. Zheng, J. Li, X. Gao, J. Lu (not verified)",
        "Coupled discriminative manifold alignment for low-resolution face recognition",
        2024,
        "Pattern Recognition 147 (not verified)",
    )
    loss_class = ArcFace
    convergence = Convergence(margin=0.08, job={"objective.scale": 16, "objective.margin": 0.3, "train.epochs": 8})

    class Hyperparameters(CrossResolutionHyperparameters):
        """Of the head, the alignment, and the branches."""

        margin: float = Field(0.5, ge=0, le=pi / 2, description="ArcFace's margin in radians")
        scale: float = Field(64.0, ge=0.01, le=MAX_SCALE, description="logit scale")
        lambda1: float = Field(1.0, ge=0, le=100, description="weight of the pair distance")
        lambda2: float = Field(0.1, ge=0, le=100, description="weight of the moments' distance")
        branches: Literal["coupled", "shared"] = Field("coupled", description="two encoders, or one for both")

    def build(self, context: BuildContext) -> None:
        """Makes the head, the alignment, and the second encoder as a copy of the first."""
        options = self.hyperparameters
        self.loss = ArcFace(context.num_classes, context.embedding_dim, options.margin, options.scale)
        self.alignment = ManifoldAlignment(options.lambda1, options.lambda2)
        if options.branches == "coupled":
            self.low_encoder = copy.deepcopy(self.encoder)

    def forward(self, batch: Batch) -> Output:
        """Both branches, classified and aligned."""
        metrics: dict[str, Tensor] = {}
        if self.hyperparameters.branches == "coupled":
            high, low = self.encoder(batch.views[0]), self.low_encoder(batch.views[1])
        else:
            high, low = self.encoder(torch.cat(batch.views)).chunk(2)
        # The mean over both branches' samples is half the sum of the branches' means.
        classified = 2 * self.loss(torch.cat([high, low]), batch.label.repeat(2), metrics=metrics)
        return Output(classified + self.alignment(high, low, metrics=metrics), metrics)


@register
class TransferableCoupledNetwork(CrossResolutionObjective):
    """TCN: a low-resolution network is drawn to where a high-resolution one puts the same person.

    ``formulation: survey`` (the default, as the paper's equation is not known), one encoder f for both resolutions::

        L = mean_same [d^2 - delta]_+ + mean_different [delta + alpha - d^2]_+ + lambda L_softmax(f(x low), y)

    ``formulation: reconstruction``, from the abstract's "transferable triplet loss": for the first ``pretrain`` share
    of the steps the encoder learns high-resolution faces with softmax; a copy of it, f_H, is then frozen, and the
    encoder goes on as f_L::

        L = mean [ |f_L(a low) - f_H(p)|^2 - |f_L(a low) - f_H(n)|^2 + alpha ]_+ + lambda L_softmax(f_L(x low), y)

    Evaluated is f or f_L, for galleries too, where the paper would take f_H.
    """

    name = "transferable_coupled_network"
    catalog_id = "transferable_coupled_network"
    citation = Citation(
        "Juan Zha, Hongyang Chao (not verified)",
        "TCN: Transferable Coupled Network for Cross-Resolution Face Recognition",
        2019,
        "ICASSP",
    )
    needs = replace(_PAIR, sampler="class_balanced", samples_per_class=4)
    loss_class = Softmax
    waivers: ClassVar[Mapping[str, str]] = {
        "gradcheck[transferable_coupled_network-formulation=reconstruction]": "the learned branch is a constant"
    }
    convergence = Convergence(margin=0.1, job={"train.epochs": 8})

    class Hyperparameters(CrossResolutionHyperparameters):
        """Of the tuples and the softmax term."""

        alpha: float = Field(0.3, ge=0, le=4, description="margin, of squared distances of unit vectors")
        delta: float = Field(0.5, ge=0, le=4, description="survey: squared distance that equal people may have")
        softmax: float = Field(1.0, ge=0, le=100, description="lambda, weight of the softmax term")
        mining: Literal["hard", "semi_hard"] = Field("hard", description="reconstruction: which negatives")
        pretrain: float = Field(0.5, ge=0, le=0.9, description="reconstruction: share of steps at high resolution")
        formulation: Literal["survey", "reconstruction"] = Field("survey", description="thresholds, or triplets")

    def build(self, context: BuildContext) -> None:
        """Makes the head, the tuple loss, and the frozen branch."""
        options = self.hyperparameters
        self.loss = Softmax(context.num_classes, context.embedding_dim)
        self.coupled = options.formulation == "reconstruction"
        self.coupling: torch.nn.Module = ThresholdPairs(options.delta, options.alpha)
        self.switch = 0
        if self.coupled:
            self.coupling = TransferableTriplet(options.alpha, options.mining)
            self.switch = round(options.pretrain * context.epochs * context.steps_per_epoch)
            self.high_branch = Teacher(self, ("encoder",), lambda _: 1.0)

    def after_step(self, step: int) -> None:
        """Freezes f_H when the first stage ends."""
        if self.coupled and step + 1 == self.switch:
            self.high_branch.reset(self)

    def forward(self, batch: Batch) -> Output:
        """The stage's loss."""
        metrics: dict[str, Tensor] = {}
        high_view, low_view = batch.views
        if self.step < self.switch:
            return Output(self.loss(self.encoder(high_view), batch.label, metrics=metrics), metrics)
        if self.coupled:
            low, high = self.encoder(low_view), self.high_branch.eval()(high_view)
        else:
            low, high = self.encoder(torch.cat([low_view, high_view])).chunk(2)
        classified = self.loss(low, batch.label, metrics=metrics)
        coupled = self.coupling(low, high, batch.label, metrics=metrics)
        return Output(coupled + self.hyperparameters.softmax * classified, metrics)


@register
class IdeaNet(ClassHeadObjective):
    """IDEA-Net: low-resolution faces learned beside generated features, or beside further identities.

    u is the feature's direction, z noise that depends on seed, step and sample. ``formulation: survey`` (the default,
    as the paper's equation is not known) generates features of the same identity::

        u' = G(u, z);   L = L_arc({x, u'}, y) + w_id L_softmax({sg u, u'}, y) + w_adv (L_D + L_G)
        L_D = mean log(1 + e^-D(sg u)) + log(1 + e^D(sg u')),   L_G = mean log(1 + e^-D(G(sg u, z))), D fixed

    The paper's abstract says the opposite: no generator, but further identities and a calibrator.
    ``formulation: reconstruction`` is that, with a stand-in for the calibrator: all identities of the dataset, the
    auxiliary ones among them, share one head, and ``L = L_arc(x, y) + lambda_c L_cal`` with
    :class:`armillary.losses.cross_resolution.CenterCalibrator`.
    """

    name = "idea_net"
    family = "cross_resolution"
    catalog_id = "idea_net"
    citation = Citation(
        "Cheng-Yaw Low, Andrew Beng-Jin Teoh (not verified)",
        "An Implicit Identity-Extended Data Augmentation for Low-Resolution Face Representation Learning",
        2022,
        "IEEE Transactions on Information Forensics and Security 17",
        "https://openreview.net/forum?id=Qb_GMN7AVy",
    )
    needs = Needs(recipe="faces", fields=("label",), components=("class_head", "generator", "discriminator"))
    loss_class = ArcFace
    waivers: ClassVar[Mapping[str, str]] = {
        "gradcheck[idea_net]": "centres and noise are constants",
        "gradcheck[idea_net-base=cos]": "centres and noise are constants",
    }
    convergence = Convergence(margin=0.12, job={"objective.scale": 16, "objective.margin": 0.2, "train.epochs": 10})

    class Hyperparameters(CrossResolutionHyperparameters):
        """Of the head, of the generator (survey), of the calibrator (reconstruction)."""

        margin: float = Field(0.35, ge=0, le=1, description="radians (arc) or a difference of cosines (cos)")
        scale: float = Field(32.0, ge=0.01, le=MAX_SCALE, description="logit scale")
        base: Literal["arc", "cos"] = Field("arc", description="margin on the angle or on the cosine")
        formulation: Literal["survey", "reconstruction"] = Field("survey", description="generator, or calibrator")
        adversarial: float = Field(0.1, ge=0, le=10, description="w_adv, weight of the adversarial terms")
        identity: float = Field(0.5, ge=0, le=10, description="w_id, weight of the identity classifier")
        hidden: int = Field(256, ge=4, le=8192, description="width of generator and discriminator")
        lambda_c: float = Field(0.1, ge=0, le=10, description="weight of the calibrator")
        beta: float = Field(1.0, ge=0, le=100, description="weight of the centers' separation")
        rho: float = Field(0.0, ge=-1, le=1, description="cosine that centers may have")

    @classmethod
    def needs_for(cls, hyperparameters: Any) -> Needs:
        """Faces at resolutions down to the given one; centers couple the samples of a batch."""
        calibrated = hyperparameters.formulation == "reconstruction"
        options = {"low_res": [1.0, hyperparameters.downscale]}
        return replace(cls.needs, recipe_options=options, batch_coupled=calibrated)

    def build(self, context: BuildContext) -> None:
        """Makes the head, and generator, discriminator and classifier or the calibrator."""
        options, dim = self.hyperparameters, context.embedding_dim
        head = ArcFace if options.base == "arc" else CosFace
        self.loss, self.seed = head(context.num_classes, dim, options.margin, options.scale), context.seed
        if options.formulation == "reconstruction":
            self.calibrator = CenterCalibrator(context.num_classes, dim, options.beta, options.rho)
            return
        self.generator = Projector(2 * dim, options.hidden, dim, norm=False)
        self.discriminator = Projector(dim, options.hidden, 1, norm=False)
        self.identity = Softmax(context.num_classes, dim)

    def after_step(self, step: int) -> None:
        """Moves the calibrator's centers."""
        if self.hyperparameters.formulation == "reconstruction":
            self.calibrator.update()

    def forward(self, batch: Batch) -> Output:
        """The formulation's loss."""
        metrics: dict[str, Tensor] = {}
        features, labels, options = self.encoder(batch.views[0]), batch.label, self.hyperparameters
        if options.formulation == "reconstruction":
            classified = self.loss(features, labels, metrics=metrics)
            calibration = self.calibrator(features, labels)
            metrics["calibration"] = calibration.detach()
            return Output(classified + options.lambda_c * calibration, metrics)
        units, both = normalize(widen(features)), labels.repeat(2)
        noise = normals(sample_keys(key(_GENERATOR_NOISE, self.seed, self.step), batch.index), units.shape[1])
        made = self.generate(units, noise)
        classified = self.loss(torch.cat([units, made]), both, metrics=metrics)
        identified = self.identity(torch.cat([units.detach(), made]), both)
        judged, deceived = self._adversarial(units.detach(), noise)
        metrics |= {"discriminator": judged.detach(), "generator": deceived.detach()}
        metrics["generated_cosine"] = (units * made).sum(dim=1).mean().detach()
        return Output(classified + options.identity * identified + options.adversarial * (judged + deceived), metrics)

    def generate(self, units: Tensor, noise: Tensor) -> Tensor:
        """G: unit features ``(batch, dim)`` near the given ones, moved by a network that sees feature and noise."""
        return normalize(units + self.generator(torch.cat([units, noise.to(units)], dim=1)))

    def _adversarial(self, units: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        made = self.generate(units, noise)
        judged = F.softplus(-self.discriminator(units)).mean() + F.softplus(self.discriminator(made.detach())).mean()
        return judged, through_frozen(lambda features: F.softplus(-self.discriminator(features)).mean(), made)
