"""Objectives on images and their captions: the job's backbone embeds images, a transformer of the objective texts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from armillary.components.encoders import Tokens, token_encoder
from armillary.components.text import TextTransformer
from armillary.components.towers import TwoTowers
from armillary.losses.info_nce import SymmetricInfoNCE
from armillary.losses.transport import TokenTransport, TransportCLIP
from armillary.objectives import base
from armillary.objectives.base import Batch, BuildContext, Citation, Convergence, Needs, Objective, Output
from armillary.objectives.registry import register

_NEEDS = Needs(
    recipe="none", modality="image_text", fields=("caption",), components=("text_tower",), batch_coupled=True
)


class TextTowerHyperparameters(base.Hyperparameters):
    """The text encoder's shape; its embedding is as wide as the backbone's."""

    text_width: int = Field(64, ge=4, le=1024, multiple_of=4, description="width of the text transformer's tokens")
    text_depth: int = Field(2, ge=1, le=24, description="layers of the text transformer")


class ImageTextObjective(Objective):
    """Base: two towers; what is kept and judged are both."""

    family = "image_text"
    needs = _NEEDS
    text: TextTransformer

    def build(self, context: BuildContext) -> None:
        """Makes the text tower for the training part's vocabulary."""
        options, tables = self.hyperparameters, context.tables
        self.text = TextTransformer(
            len(tables["token_counts"]),
            int(tables["caption_length"]),
            context.embedding_dim,
            width=options.text_width,
            depth=options.text_depth,
            heads=4 if options.text_width % 4 == 0 else 1,
            pool="mean",
        )

    def exported(self) -> nn.Module:
        """Both encoders."""
        return TwoTowers(self.encoder, self.text)


@register
class CLIP(ImageTextObjective):
    """CLIP: in a batch every image picks its caption and every caption its image, at a learned temperature.

    ``L = 1/2 [ mean_i (lse_j S_ij - S_ii) + mean_j (lse_i S_ij - S_jj) ]``, ``S = e^t cos(u_i, v_j)``, with u, v the
    encoders' embeddings (their last linear layers are the paper's projections), t learned from log(1/0.07), e^t held
    at ``max_logit_scale`` at most by a clamp that stops the gradient there. Certain; the survey's formula is the same.
    Equal captions in a batch count as negatives, as in the paper.
    """

    name = "clip"
    catalog_id = "clip"
    citation = Citation(
        "Alec Radford, Jong Wook Kim, Chris Hallacy, and others",
        "Learning Transferable Visual Models From Natural Language Supervision",
        2021,
        "ICML",
        "https://arxiv.org/abs/2103.00020",
    )
    convergence = Convergence(metric="cross_retrieval/mean_recall", margin=0.1)

    class Hyperparameters(TextTowerHyperparameters):
        """The temperature and the text tower."""

        init_logit_scale: float = Field(1 / 0.07, gt=0, le=1000, description="e^t at the start")
        max_logit_scale: float = Field(100.0, gt=0, le=1000, description="largest e^t")
        learn_scale: bool = Field(True, description="train t")

    def build(self, context: BuildContext) -> None:
        """Makes text tower, scale and loss."""
        super().build(context)
        # Not a scalar: engines share parameters out by their first dimension.
        start = torch.full((1,), math.log(self.hyperparameters.init_logit_scale))
        self.log_scale = nn.Parameter(start, requires_grad=self.hyperparameters.learn_scale)
        self.loss = SymmetricInfoNCE()

    def forward(self, batch: Batch) -> Output:
        """The loss of images and captions."""
        metrics: dict[str, Tensor] = {}
        scale = self.log_scale.exp().clamp_max(self.hyperparameters.max_logit_scale)
        images, texts = self.encoder(batch.views[0]), self.text(batch.fields["caption"])
        loss = self.loss(images, texts, scale, metrics=metrics)
        return Output(loss, metrics | {"logit_scale": scale.detach().squeeze()})


@register
class OTCLIP(ImageTextObjective):
    """OT-CLIP: an optimal transport plan between a batch's images and captions should match each with its own.

    Equations: :class:`armillary.losses.transport.TransportCLIP`; ``variant: clip`` is CLIP at a fixed temperature. That
    reading of CLIP and the list of variants are the paper's; weights, bounds and numbers of sweeps are not to be had
    and are guesses, as is the pairing of ``unbalanced`` with the Gromov term. The authors' released training file
    feeds plans to a cross-entropy as if they were logits, and uses undefined names: not followed.

    ``token_ot`` is a survey's score, no loss of the paper: the transport cost between an image's patches and a text's
    words, uniform masses, cost 1 - cos, entropic with ``token_epsilon``; its negative over ``epsilon`` is put through
    CLIP's loss. Patches and words pass the encoders' last layers one by one. It needs an encoder with patch tokens.
    """

    name = "ot_clip"
    catalog_id = "ot_clip"
    citation = Citation(
        "Liangliang Shi, Jack Fan, Junchi Yan",
        "OT-CLIP: Understanding and Generalizing CLIP via Optimal Transport",
        2024,
        "ICML",
        "https://proceedings.mlr.press/v235/shi24b.html",
    )
    waivers: ClassVar[Mapping[str, str]] = {
        "every_parameter_learns[ot_clip-variant=token_ot]": "no patch is masked: the token for masked ones stays"
    }
    convergence = Convergence(metric="cross_retrieval/mean_recall", margin=0.1, job={"objective.variant": "sinkhorn"})

    class Hyperparameters(TextTowerHyperparameters):
        """The inner problem."""

        variant: Literal["clip", "sinkhorn", "double_bounded", "fused_gromov", "unbalanced", "token_ot"] = Field(
            "clip", description="the inner problem"
        )
        epsilon: float = Field(0.07, gt=0, le=10, description="weight of the plan's entropy; token_ot: temperature")
        iters: int = Field(5, ge=1, le=200, description="inner sweeps")
        alpha: float = Field(0.1, ge=0, le=10, description="weight of the Gromov term")
        b_lo_factor: float = Field(0.9, gt=0, le=1, description="lower bound of a column's mass, times n")
        b_hi_factor: float = Field(1.1, ge=1, le=10, description="upper bound of a column's mass, times n")
        marginal_weight: float = Field(1.0, gt=0, le=100, description="rho: how hard unbalanced holds the marginals")
        token_epsilon: float = Field(0.1, gt=0, le=10, description="entropic weight between patches and words")

    @classmethod
    def needs_for(cls, hyperparameters: Hyperparameters) -> Needs:
        """``token_ot`` needs patch tokens."""
        if hyperparameters.variant != "token_ot":
            return cls.needs
        return Needs(
            recipe="none",
            modality="image_text",
            fields=("caption",),
            encoder="tokens",
            components=("text_tower",),
            batch_coupled=True,
        )

    def build(self, context: BuildContext) -> None:
        """Makes text tower and loss."""
        super().build(context)
        options = self.hyperparameters
        if options.variant == "token_ot":
            self.token_loss = TokenTransport(options.epsilon, options.token_epsilon, options.iters)
            return
        self.loss = TransportCLIP(
            options.variant,
            options.epsilon,
            options.iters,
            options.alpha,
            (options.b_lo_factor, options.b_hi_factor),
            options.marginal_weight,
        )

    def forward(self, batch: Batch) -> Output:
        """The loss of images and captions."""
        metrics: dict[str, Tensor] = {}
        ids = batch.fields["caption"]
        if self.hyperparameters.variant != "token_ot":
            return Output(self.loss(self.encoder(batch.views[0]), self.text(ids), metrics=metrics), metrics)
        encoder = token_encoder(self.encoder)
        patches = encoder.tokens(batch.views[0]).patches
        # Each patch through the encoder's last layer, as if it were the whole image.
        single = patches.flatten(0, 1)
        embedded = encoder.embed_tokens(Tokens(single, single[:, None])).unflatten(0, patches.shape[:2])
        return Output(self.token_loss(embedded, self.text.embed_words(ids), ids > 0, metrics=metrics), metrics)
