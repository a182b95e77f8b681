"""Spherical confidence learning: how sharply an embedding knows its class."""

from __future__ import annotations

from collections.abc import Mapping
from math import pi
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from armillary.components.encoders import MapEncoder
from armillary.components.teacher import Teacher
from armillary.losses import ArcFace
from armillary.losses.sample_margins import ProbabilityArcFace
from armillary.losses.tensors import normalize
from armillary.losses.von_mises_fisher import SphericalConfidence
from armillary.objectives import base
from armillary.objectives.base import Batch, BuildContext, Citation, Convergence, Needs, Output, Samples
from armillary.objectives.bases import ClassHeadObjective
from armillary.objectives.margin_softmax import MAX_SCALE
from armillary.objectives.registry import register

KAPPA_FLOOR, LOG_KAPPA_MAX = 1e-6, 14.0


class ConfidenceBranch(nn.Module):
    """The last feature map to kappa: two hidden layers of half and a quarter of the embedding's width, then log kappa.

    ``kappa = 1e-6 + exp(.)``, at most exp(14). The hidden layers have at least 16 channels.
    """

    def __init__(self, inputs: int, embedding_dim: int) -> None:
        super().__init__()
        first, second = max(16, embedding_dim // 2), max(16, embedding_dim // 4)
        self.layers = nn.Sequential(
            nn.Linear(inputs, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, 1)
        )

    def forward(self, maps: Tensor) -> Tensor:
        """``(batch, channels, height, width)`` to ``(batch,)``, float32 or better."""
        logarithm: Tensor = self.layers(maps.flatten(1)).squeeze(1)
        logarithm = logarithm.float() if logarithm.dtype in (torch.float16, torch.bfloat16) else logarithm
        return KAPPA_FLOOR + logarithm.clamp_max(LOG_KAPPA_MAX).exp()


@register
class SphericalConfidenceObjective(ClassHeadObjective):
    """SCF: ArcFace first; then, on frozen features, a branch learns each image's von Mises-Fisher concentration.

    Stage one trains encoder and head by ArcFace, for all but the last ``frozen_share`` of the epochs. In stage two the
    features are those of a copy of the encoder as it was then, which is also what is exported, and the class rows get
    no gradient. The branch's loss is :class:`armillary.losses.von_mises_fisher.SphericalConfidence`; it never reaches
    encoder or head. The authors train the stages one after the other; here the branch already learns during stage one
    (from features that still move), so that it enters stage two warm. The class rows are not copied: what is left of
    the optimizer's momentum still moves them for some steps.

    ``formulation: survey`` is a margin that shrinks with the own class's probability, in one stage and without a
    branch: :class:`armillary.losses.sample_margins.ProbabilityArcFace`.
    """

    name = "scf_arcface"
    family = "probabilistic"
    catalog_id = "scf_arcface"
    citation = Citation(
        "Shen Li, Jianqing Xu, Xiaqing Xu, Pengcheng Shen, Shaoxin Li, Bryan Hooi",
        "Spherical Confidence Learning for Face Recognition",
        2021,
        "CVPR",
        "https://openaccess.thecvf.com/content/CVPR2021/papers/Li_Spherical_Confidence_Learning_for_Face_Recognition_CVPR_2021_paper.pdf",
    )
    needs = Needs(
        recipe="faces", fields=("label",), components=("class_head", "confidence_branch", "teacher"), encoder="maps"
    )
    waivers: ClassVar[Mapping[str, str]] = {
        "gradcheck": "the branch's loss, and the survey's probability, give encoder and head no gradient"
    }
    convergence = Convergence(
        margin=0.14, job={"objective.scale": 16, "objective.margin": 0.3, "objective.frozen_share": 0.25}
    )

    class Hyperparameters(base.Hyperparameters):
        """ArcFace's, the sphere's, and the share of the second stage."""

        margin: float = Field(0.5, ge=0, le=pi / 2, description="ArcFace's margin, radians; survey: at probability 0")
        scale: float = Field(64.0, ge=0.01, le=MAX_SCALE, description="logit scale")
        radius: float = Field(64.0, gt=0, le=1000, description="r of the sphere; it shifts the loss and nothing else")
        frozen_share: float = Field(0.5, ge=0, le=1, description="share of the epochs in which only the branch learns")
        formulation: Literal["paper", "survey"] = Field("paper", description="survey: margin falls with probability")
        decay: float = Field(1.0, ge=0, le=100, description="survey: k, how fast the margin falls")

    @classmethod
    def needs_for(cls, hyperparameters: Any) -> Needs:
        """The survey's needs no feature maps."""
        if hyperparameters.formulation == "paper":
            return cls.needs
        return Needs(recipe="faces", fields=("label",), components=("class_head",))

    def build(self, context: BuildContext) -> None:
        """Makes head, branch, and the copy of the encoder."""
        options, size = self.hyperparameters, (context.num_classes, context.embedding_dim)
        if options.formulation == "survey":
            self.loss: Any = ProbabilityArcFace(*size, options.margin, options.scale, options.decay)
            return
        self.loss = ArcFace(*size, options.margin, options.scale)
        self.confidence = SphericalConfidence(context.embedding_dim, options.radius)
        images = torch.zeros(1, context.in_channels, *context.image_size)
        with torch.no_grad():
            training = self.encoder.training
            inputs = cast(MapEncoder, self.encoder.eval()).stages(images)[-1].numel()
            self.encoder.train(training)
        self.branch = ConfidenceBranch(inputs, context.embedding_dim)
        # There is a first stage even in a run of one epoch: without it the features would be random.
        self.second_stage = max(1, context.epochs - round(options.frozen_share * context.epochs))
        self.frozen = Teacher(self, ("encoder",), lambda _: 1.0)

    @property
    def is_frozen(self) -> bool:
        """Whether this is stage two."""
        return bool(self.hyperparameters.formulation == "paper" and self.epoch >= self.second_stage)

    def before_epoch(self, epoch: int, samples: Samples) -> None:
        """Takes the copy when stage two begins."""
        if self.hyperparameters.formulation == "paper" and epoch == self.second_stage:
            self.frozen.reset(self)

    def exported(self) -> nn.Module:
        """The encoder; in stage two its copy."""
        return self.frozen["encoder"] if self.is_frozen else self.encoder

    def forward(self, batch: Batch) -> Output:
        """``L_ArcFace + L_vMF``, in stage two ``L_vMF`` alone."""
        if self.hyperparameters.formulation == "survey":
            return super().forward(batch)
        metrics: dict[str, Tensor] = {}
        encoder = self.frozen["encoder"].eval() if self.is_frozen else self.encoder
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_frozen):
            last_map = cast(MapEncoder, encoder).stages(batch.views[0])[-1]
            embeddings = cast(MapEncoder, encoder).embed_map(last_map)
            recognition = self.loss(embeddings, batch.label, metrics=metrics)
            rows = self.loss.rows_of(batch.label).to(embeddings.dtype)
        cosine = (normalize(embeddings.detach()) * normalize(rows)).sum(dim=1)
        kappa = self.branch(last_map.detach())
        confidence = self.confidence(kappa, cosine.to(kappa.dtype))
        metrics.update(kappa=kappa.detach().mean(), confidence_loss=confidence.detach())
        return Output(confidence if self.is_frozen else recognition + confidence, metrics)
