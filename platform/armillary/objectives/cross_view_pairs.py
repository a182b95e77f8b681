"""Objectives across poses and resolutions: versions of an image, and views of an identity, are brought together."""

from __future__ import annotations

from dataclasses import replace
from math import pi
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from armillary import losses
from armillary.components.counter import key, sample_keys, uniforms
from armillary.components.teacher import Teacher
from armillary.losses.cross_view import chosen_share, feature_consistence, identity_consistence
from armillary.losses.tensors import check_labels, float32_math, not_a_number_guard
from armillary.objectives import base
from armillary.objectives.base import Batch, BuildContext, Citation, Convergence, Needs, Output
from armillary.objectives.bases import ClassHeadObjective
from armillary.objectives.registry import register

_TURN, _LOWER = 4711, 4712


def turned_head(images: Tensor, degrees: Tensor) -> Tensor:
    """Images of heads as they would look turned about the vertical axis: the picture as the skin of a cylinder.

    A column at x in [-1, 1] shows the cylinder at the angle asin(x); after a turn by d it shows what stood at
    asin(x) - d. What was hidden repeats the last column that was seen.

    Args:
        images: ``(batch, channels, height, width)``, a head in the middle.
        degrees: ``(batch,)``, -90 to 90; above 0 turns to the right.
    """
    batch, _, height, width = images.shape
    x = (torch.arange(width, device=images.device, dtype=images.dtype) * 2 + 1) / width - 1
    y = (torch.arange(height, device=images.device, dtype=images.dtype) * 2 + 1) / height - 1
    angle = torch.asin(x)[None, :] - degrees.to(images.dtype)[:, None] * (pi / 180)
    source = torch.sin(angle.clamp(-pi / 2, pi / 2))
    grid = torch.stack(
        [source[:, None, :].expand(batch, height, width), y[None, :, None].expand(batch, height, width)], dim=-1
    )
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


@register
class SiamesePose(ClassHeadObjective):
    """Pose-robust siamese training: a survey's pair loss, or our reconstruction of the paper's two consistency terms.

    The paper's terms could not be had, so that the survey's formula is the default. ``pair``, with d the distance of
    unit vectors and y = 1 for two images of one person in any poses, over all pairs of the batch::

        1/(2 N) sum [y d^2 + (1 - y) max(0, margin - d)^2]

    ``consistence`` (ours, after the paper's abstract) adds to a CosFace loss the two terms of
    :mod:`armillary.losses.cross_view`: every image and its virtual pose, made by turning it as the skin of a cylinder
    by up to 45 degrees, keep one direction; profile faces (|yaw| above ``profile_yaw_deg``) stay near the mean of their
    identity's::

        L = L_id + lambda_fc L_FC + lambda_ic L_IC
    """

    name = "siamese_pose"
    family = "contrastive_views"
    catalog_id = "siamese_pose"
    citation = Citation(
        "Xiao Luan, Zibiao Ding, Linghui Liu, Weisheng Li, Xinbo Gao",
        "A Symmetrical Siamese Network Framework With Contrastive Learning for Pose-Robust Face Recognition",
        2023,
        "IEEE Transactions on Image Processing",
        "https://doi.org/10.1109/TIP.2023.3322593",
    )
    needs = Needs(
        recipe="faces", fields=("label", "pose"), sampler="class_balanced", samples_per_class=4, batch_coupled=True
    )
    convergence = Convergence(margin=0.1, job={"objective.mode": "consistence", "objective.scale": 16.0})

    class Hyperparameters(base.Hyperparameters):
        """Which loss, its weights, and the K of P x K batches."""

        mode: Literal["pair", "consistence"] = Field("pair", description="the survey's pairs, or our reconstruction")
        lambda_fc: float = Field(1.0, ge=0, le=100, description="weight of the agreement with the virtual pose")
        lambda_ic: float = Field(1.0, ge=0, le=100, description="weight of the agreement of an identity's profiles")
        profile_yaw_deg: float = Field(
            30.0, ge=0, le=90, description="yaw beyond which a face counts as profile, degrees"
        )
        margin: float = Field(1.0, gt=0, le=2, description="of pair mode, a distance of unit vectors")
        scale: float = Field(64.0, ge=0.01, le=1000, description="logit scale of the identity loss")
        id_margin: float = Field(0.35, ge=0, le=1, description="margin of the identity loss, a difference of cosines")
        samples_per_class: int = Field(4, ge=2, le=1024, description="images of each class in a batch")

    @classmethod
    def needs_for(cls, hyperparameters: Any) -> Needs:
        """Class-balanced batches with the wanted number of images per class."""
        return replace(cls.needs, samples_per_class=hyperparameters.samples_per_class)

    def build(self, context: BuildContext) -> None:
        """Makes the pair loss, or the identity head."""
        options = self.hyperparameters
        self.num_classes, self.seed = context.num_classes, context.seed
        if options.mode == "pair":
            self.pairs = losses.Contrastive(options.margin, normalize=True)
        else:
            size = (context.num_classes, context.embedding_dim)
            self.loss = losses.CosFace(*size, margin=options.id_margin, scale=options.scale)

    def forward(self, batch: Batch) -> Output:
        """The loss of the first view; metric ``profile_share``, and the terms by name."""
        profile = batch.fields["pose"][:, 0].abs() > self.hyperparameters.profile_yaw_deg
        metrics = {"profile_share": chosen_share(profile).to(batch.views[0].dtype)}
        if self.hyperparameters.mode == "consistence":
            return Output(self._consistence(batch, profile, metrics), metrics)
        check_labels(batch.label, self.num_classes)
        return Output(self.pairs(self.encoder(batch.views[0]), batch.label, metrics=metrics), metrics)

    def _consistence(self, batch: Batch, profile: Tensor, metrics: dict[str, Tensor]) -> Tensor:
        options, images = self.hyperparameters, batch.views[0]
        drawn = uniforms(sample_keys(key(_TURN, self.seed, self.step), batch.index), 1)[:, 0]
        features, virtual = self.encoder(torch.cat([images, turned_head(images, 90 * drawn - 45)])).chunk(2)
        identity = self.loss(features, batch.label, metrics=metrics)
        view = feature_consistence(features, virtual)
        pose = identity_consistence(features, batch.label, profile)
        metrics.update(
            identity=identity.detach(), feature_consistence=view.detach(), identity_consistence=pose.detach()
        )
        total: Tensor = identity + options.lambda_fc * view + options.lambda_ic * pose
        return total


@register
class SiameseLowRes(ClassHeadObjective):
    """Siamese training over resolutions: AM-softmax on every resolution, and batch-hard triplets across them.

    As the authors released it, over R versions of each of the B images, the first at full resolution::

        L = mean over all versions of CosFace + lambda_dist L_dist

    with L_dist of :class:`armillary.losses.CrossVersionTriplet`. The release calls every other image a negative, also
    of the same person; ``negatives: other_label`` does not. It resizes to 8, 12 and 16 of 128 pixels; here the view
    recipe draws each further version's factor. A survey prints a logistic loss whose sign is reversed, so that pairs of
    one person are pushed apart: a slip.
    """

    name = "siamese_low_res"
    family = "cross_resolution"
    catalog_id = "siamese_low_res"
    citation = Citation(
        "Shun-Cheung Lai, Kin-Man Lam",
        "Deep Siamese Network for Low-Resolution Face Recognition",
        2021,
        "APSIPA ASC",
        "https://github.com/johnnysclai/Deep-Siamese-network-for-LRFR",
    )
    needs = Needs(views=4, recipe="low_res_pair", fields=("label",), components=("class_head",), batch_coupled=True)
    convergence = Convergence(margin=0.06, job={"objective.resolutions": 2, "objective.s": 16.0})

    class Hyperparameters(base.Hyperparameters):
        """Weights and margins of both terms, and how many versions there are."""

        lambda_dist: float = Field(1.0, ge=0, le=100, description="weight of the triplets across resolutions")
        margin: float = Field(1.0, ge=0, le=2, description="of the triplets, a cosine distance")
        s: float = Field(30.0, ge=0.01, le=1000, description="logit scale of AM-softmax")
        m: float = Field(0.35, ge=0, le=1, description="margin of AM-softmax, a difference of cosines")
        negatives: Literal["other_image", "other_label"] = Field(
            "other_image", description="what a version is told from: other images, or images of other people"
        )
        resolutions: int = Field(4, ge=2, le=16, description="versions of each image, the original among them")

    @classmethod
    def needs_for(cls, hyperparameters: Any) -> Needs:
        """One view a version."""
        return replace(cls.needs, views=hyperparameters.resolutions)

    def build(self, context: BuildContext) -> None:
        """Makes the head, which all resolutions share, and the triplet loss."""
        options = self.hyperparameters
        self.loss = losses.CosFace(context.num_classes, context.embedding_dim, margin=options.m, scale=options.s)
        self.across = losses.CrossVersionTriplet(options.margin)

    def forward(self, batch: Batch) -> Output:
        """The loss of all versions, which pass the encoder in one batch."""
        metrics: dict[str, Tensor] = {}
        versions, options = len(batch.views), self.hyperparameters
        features, labels = self.encoder(torch.cat(batch.views)), batch.label.repeat(versions)
        identity = self.loss(features, labels, metrics=metrics)
        apart = labels if options.negatives == "other_label" else None
        distance = self.across(features, batch.index.repeat(versions), apart=apart, metrics=metrics)
        metrics.update(identity=identity.detach(), distance=distance.detach())
        return Output(identity + options.lambda_dist * distance, metrics)


@register
class CrossResolution(ClassHeadObjective):
    """Cross-resolution distillation: a student on lowered images keeps the features of a teacher on the originals.

    With phi the features (not normalised), h the classifier, x' the image at low resolution with probability p::

        L = CE(h(x'), y) + lam mean over samples and dimensions of (phi_S(x') - phi_T(x))^2

    The authors' teacher was trained before. Here the first ``teacher_share`` of the steps trains it, by CE on the
    originals; the student starts from it. 0 takes the encoder as the run found it. ``curriculum`` raises p from 0.1 by
    0.1 every ``curriculum_step_images`` images. How low a resolution is, the view recipe says (``views.low_res``).

    ``formulation="survey"``: one encoder for both, ``lam |f(x) - f(x')|^2 + ArcFace(f(x'))``; its first term alone
    would be content with one point for all images.
    """

    name = "cross_resolution"
    family = "cross_resolution"
    catalog_id = "cross_resolution"
    citation = Citation(
        "Fabio Valerio Massoli, Giuseppe Amato, Fabrizio Falchi",
        "Cross-resolution learning for Face Recognition",
        2020,
        "Image and Vision Computing",
        "https://doi.org/10.1016/j.imavis.2020.103927",
    )
    needs = Needs(views=2, recipe="low_res_pair", fields=("label",), components=("class_head", "teacher"))

    class Hyperparameters(base.Hyperparameters):
        """Weight of the features, how often images are lowered, and how the teacher comes about."""

        lam: float = Field(0.1, ge=0, le=100, description="weight of the agreement of features")
        downsampling_prob: float = Field(0.1, ge=0, le=1, description="p, without the curriculum")
        curriculum: bool = Field(False, description="raise p during the run, from 0.1 to 1")
        curriculum_step_images: int = Field(35000, ge=1, le=10**9, description="images after which p rises by 0.1")
        teacher_share: float = Field(0.5, ge=0, le=0.9, description="share of the steps that trains the teacher")
        formulation: Literal["paper", "survey"] = Field("paper", description="teacher and student, or one encoder")
        margin: float = Field(0.5, ge=0, le=pi / 2, description="of the survey's ArcFace, radians")
        scale: float = Field(64.0, ge=0.01, le=1000, description="of the survey's ArcFace")

    def build(self, context: BuildContext) -> None:
        """Makes the head and the teacher."""
        options, size = self.hyperparameters, (context.num_classes, context.embedding_dim)
        self.seed, self.batch_size = context.seed, context.batch_size
        self.teacher_steps = round(options.teacher_share * context.epochs * context.steps_per_epoch)
        if options.formulation == "paper":
            self.loss: losses.ClassHeadLoss = losses.Softmax(*size)
            self.teacher = Teacher(self, ("encoder",), lambda _: 0.0, buffers="copy")
        else:
            self.teacher_steps = 0
            self.loss = losses.ArcFace(*size, margin=options.margin, scale=options.scale)

    def after_step(self, step: int) -> None:
        """At the end of the teacher's training: its encoder is kept, the student goes on from there."""
        if step == self.teacher_steps - 1:
            self.teacher.reset(self)

    def lowered(self, index: Tensor) -> Tensor:
        """Which samples the student sees at low resolution in this step, ``(batch,)`` bool."""
        share = self.hyperparameters.downsampling_prob
        if self.hyperparameters.curriculum:
            seen = (self.step - self.teacher_steps) * self.batch_size
            share = min(1.0, 0.1 * (1 + seen // self.hyperparameters.curriculum_step_images))
        drawn = uniforms(sample_keys(key(_LOWER, self.seed, self.step), index), 1)[:, 0]
        lowered: Tensor = drawn < share
        return lowered

    def forward(self, batch: Batch) -> Output:
        """The loss of one step, the teacher's while it is being trained."""
        metrics: dict[str, Tensor] = {}
        high, low = batch.views
        if self.hyperparameters.formulation == "survey":
            features, lowered = self.encoder(torch.cat([high, low])).chunk(2)
            agreement = squared_difference(features, lowered) * features.shape[1]
        else:
            teaching = self.step < self.teacher_steps
            which = self.lowered(batch.index)[:, None, None, None]
            lowered = self.encoder(high if teaching else torch.where(which, low, high))
            guard = not_a_number_guard(low)
            agreement = guard if teaching else squared_difference(lowered, self.teacher.eval()(high)) + guard
        identity = self.loss(lowered, batch.label, metrics=metrics)
        metrics.update(identity=identity.detach(), agreement=agreement.detach())
        return Output(identity + self.hyperparameters.lam * agreement, metrics)


@float32_math
def squared_difference(features: Tensor, others: Tensor) -> Tensor:
    """The mean over samples and dimensions of ``(f - g)^2``, both ``(batch, dim)``."""
    return F.mse_loss(features, others)
