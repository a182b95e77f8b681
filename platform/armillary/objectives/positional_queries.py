"""Self-distillation that asks for places: PQ and CR2PQ tell from one crop what lies where another crop was cut out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from armillary.components.center import Center
from armillary.components.encoders import Tokens, token_encoder
from armillary.components.patches import crop_coordinates, grid_coordinates, sincos_positions
from armillary.components.rotary import QueryToken, RotaryDecoder
from armillary.losses import self_distillation as losses
from armillary.losses.patch_contrast import ConceptContrast, PatchContrast
from armillary.losses.soft_targets import soft_cross_entropy
from armillary.losses.tensors import widen
from armillary.objectives.base import Batch, BuildContext, Citation, Needs, Output
from armillary.objectives.dense import PatchDistillation, PatchHyperparameters, embed_each, patch_grid
from armillary.objectives.registry import register
from armillary.objectives.self_distillation import (
    MOVING_TARGETS,
    PrototypeDistillation,
    PrototypeHyperparameters,
    small_tokens,
    target_entropy,
    with_local_crops,
)

_NEEDS = Needs(
    views=2, recipe="multicrop", encoder="tokens", components=("projector", "teacher", "center", "positional_query")
)


def places_in(
    parameters: Mapping[str, Tensor],
    grid: tuple[int, int],
    reference: Mapping[str, Tensor],
    reference_grid: tuple[int, int],
) -> Tensor:
    """Where the patches of one crop lie in the patch grid of another crop of the same image, as both are shown.

    Args:
        parameters: the crop's ``box (batch, 4)`` and ``flip (batch,)``, as views report them.
        grid: rows and columns of its patches.
        reference: the other crop's.
        reference_grid: rows and columns of the other crop's patches.

    Returns:
        ``(batch, T, 2)``, x then y of upper left corners in patches of the other crop. A mirrored crop's patches are
        counted from its right edge, and places in a mirrored other crop from that one's.
    """
    box, other = parameters["box"], reference["box"]
    places = crop_coordinates(box, grid, other, reference_grid).unflatten(1, grid)
    mirrored = (parameters["flip"] > 0.5)[:, None, None, None]
    x, y = torch.where(mirrored, places.flip(2), places).unbind(-1)
    # Mirrored, a patch's left edge is where its right one was.
    width = ((box[:, 2] - box[:, 0]) / grid[1]) / ((other[:, 2] - other[:, 0]) / reference_grid[1])
    other_mirrored = (reference["flip"] > 0.5)[:, None, None]
    x = torch.where(other_mirrored, reference_grid[1] - width.float()[:, None, None] - x, x)
    return torch.stack([x, y], dim=-1).flatten(1, 2)


@register
class PQ(PatchDistillation):
    """PQ (PQCL): iBOT, and of every patch of small crops the student says what it is, told only where it lies.

    Zhang et al. 2023: ``L = L_CLS + lambda_2 L_patch + lambda_3 L_q``. A query is a learned vector plus the sine-cosine
    position of a small crop's patch in a large crop's grid; it attends to the large crop's tokens, none of which
    attends to it. Its target is the teacher's view of the real patch, against a centre of its own (L_q is the mean
    over both large crops and all queries). L_CLS pairs the two large crops only. Taken from the released code
    (PQCL's loss and transformer); that code mirrors large crops without mirroring the queries' places, which is
    mended here, and asks at upper left corners, as here.

    ``formulation: survey`` replaces L_q by ``-sum_k log softmax_k cos(A_1k, A_2j)``: K learned concepts attend to the
    patches of both large crops, and a concept's two attention maps are contrasted with the other concepts'.
    """

    name = "pq"
    family = "dense"
    catalog_id = "pq"
    citation = Citation(
        "Shaofeng Zhang, Qiang Zhou, Zhibin Wang, Fan Wang, Junchi Yan",
        "Patch-level Contrastive Learning via Positional Query for Visual Pre-training",
        2023,
        "ICML",
        "https://proceedings.mlr.press/v202/zhang23bd.html",
    )
    needs = with_local_crops(_NEEDS, 4)
    convergence = small_tokens(0.05, falls="image_divergence", reason=MOVING_TARGETS + "0.06 to 0.15")

    class Hyperparameters(PatchHyperparameters):
        """Weight and form of the queries' loss."""

        prototypes: int = Field(8192, ge=2, le=262144, description="K, outputs of the head; 256 to 1024 on small data")
        local_crops: int = Field(4, ge=1, le=20, description="n, small crops that are asked for")
        query_weight: float = Field(1.0, ge=0, le=10, description="lambda_3, weight of the queries' loss")
        concepts: int = Field(16, ge=2, le=1024, description="learned concepts (survey)")
        formulation: Literal["paper", "survey"] = Field("paper", description="survey: contrast of learned concepts")

    def add_parts(self, context: BuildContext) -> None:
        """Adds query and centre, or concepts."""
        super().add_parts(context)
        width = token_encoder(self.encoder).token_dim
        if self.hyperparameters.formulation == "survey":
            self.concepts = ConceptContrast(width, self.hyperparameters.concepts)
        else:
            self.query = QueryToken(width)
            self.query_center = Center(self.hyperparameters.prototypes, self.hyperparameters.center_momentum)

    def forward(self, batch: Batch) -> Output:
        """Image, patch and query loss."""
        options, survey = self.hyperparameters, self.hyperparameters.formulation == "survey"
        logits, patches = self.teacher_tokens(torch.cat(batch.views[:2]))
        targets = self.image_targets(logits.unflatten(0, (2, -1)))
        seen = self.see(batch, None if survey else self.queries(batch))
        image = self.image_term(seen, targets, ())
        patch = self.patch_term(seen, self.centered_patch_targets(patches, seen.masked))
        query = self.concepts(*seen.tokens.patches.chunk(2)) if survey else self.query_term(batch, seen.tokens)
        metrics = {
            "image_divergence": image.detach() - target_entropy(targets),
            "patch_loss": patch.detach(),
            "query_loss": query.detach(),
        }
        return Output(image + options.patch_weight * patch + options.query_weight * query, metrics)

    def queries(self, batch: Batch) -> Tensor:
        """The small crops' patches as queries to each large crop, ``(2B, n * P, token_dim)``."""
        encoder = token_encoder(self.encoder)
        small, large = (patch_grid(encoder, view) for view in (batch.views[2], batch.views[0]))
        places = [
            torch.cat([places_in(crop, small, batch.parameters[view], large) for crop in batch.parameters[2:]], dim=1)
            for view in range(2)
        ]
        positions = sincos_positions(torch.cat(places), encoder.token_dim).to(batch.views[0].dtype)
        queries: Tensor = positions + self.query(tuple(positions.shape[:2]), positions)
        return queries

    def query_term(self, batch: Batch, tokens: Tokens) -> Tensor:
        """L_q: answers at the queries against the teacher's view of the small crops."""
        assert tokens.queries is not None
        with torch.no_grad():
            seen = token_encoder(self.teacher["encoder"]).tokens(torch.cat(batch.views[2:])).patches
            # (n * B, P, dim) to (B, n * P, dim), the order of the queries.
            wanted = seen.unflatten(0, (len(batch.views) - 2, -1)).transpose(0, 1).flatten(1, 2)
        logits = self.teacher_patch_logits(wanted)
        self.query_center.hold(self.step, logits)
        targets = losses.centered_targets(logits, self.query_center.value, self.teacher_temperature)
        answers = self.patch_logits(tokens.queries).unflatten(0, (2, -1))
        return soft_cross_entropy(widen(answers), targets, self.hyperparameters.student_temperature).mean()

    def after_step(self, step: int) -> None:
        """Moves the queries' centre and the rest."""
        if self.hyperparameters.formulation == "paper":
            self.query_center.update()
        super().after_step(step)


@register
class CR2PQ(PrototypeDistillation):
    """CR2PQ: DINO on two crops, and patches of one crop are told from the other; the survey's reading by default.

    Neither paper nor code of "Continuous Relative Rotary Positional Query" could be read; what follows is no claim to
    be its loss. ``formulation: survey`` (default) is the survey's formula
    ``-log exp(cos(q * k_i, q * k'_i) / tau) / sum_j exp(cos(q * k_i, q * k'_j) / tau)``: patches k_i of one large crop
    against the patch k'_i of the other that lies at the same place, with all patches of that crop as alternatives, both
    weighted channel by channel with a learned query q. (As a rotation of both sides, which is how the survey names it,
    q would cancel.) Patches whose place the other crop does not show are left out.

    ``formulation: reconstruction`` is built from what is remembered of the abstract: a decoder with rotary positions
    looks from the place of a patch of crop B, in real coordinates relative to crop A, into A's tokens and predicts the
    teacher's token of that patch; A and B in both roles.
    """

    name = "cr2pq"
    family = "dense"
    catalog_id = "cr2pq"
    citation = Citation(
        "Shaofeng Zhang, Qiang Zhou, Sitong Wu, Haoru Tan, Zhibin Wang, Jinfa Huang, Junchi Yan",
        "CR2PQ: Continuous Relative Rotary Positional Query for Dense Visual Representation Learning",
        2025,
        "ICLR",
        "https://openreview.net/forum?id=3l6PwssLNY",
    )
    needs = with_local_crops(_NEEDS, 0)
    convergence = small_tokens(0.1, falls="patch_loss", reason=MOVING_TARGETS + "0.13 to 0.21")

    class Hyperparameters(PrototypeHyperparameters):
        """Form and weight of the patches' loss."""

        prototypes: int = Field(8192, ge=2, le=262144, description="K, outputs of the head; 256 to 1024 on small data")
        local_crops: int = Field(0, ge=0, le=20, description="small crops, of the image loss alone")
        patch_weight: float = Field(1.0, ge=0, le=10, description="weight of the patches' loss beside the image loss")
        temperature: float = Field(0.2, ge=0.01, le=10, description="tau of the patches' cosines (survey)")
        decoder_depth: int = Field(2, ge=1, le=12, description="layers of the decoder (reconstruction)")
        rope_base: float = Field(100.0, ge=2, le=1e6, description="of the rotary frequencies (reconstruction)")
        distance: Literal["cosine", "smooth_l1"] = Field("cosine", description="of tokens (reconstruction)")
        formulation: Literal["survey", "reconstruction"] = Field("survey", description="which loss of patches")

    def add_parts(self, context: BuildContext) -> None:
        """Makes the contrast, or the decoder."""
        options = self.hyperparameters
        if options.formulation == "survey":
            self.contrast = PatchContrast(context.embedding_dim, options.temperature)
        else:
            width = token_encoder(self.encoder).token_dim
            self.decoder = RotaryDecoder(width, options.decoder_depth, options.rope_base)

    def forward(self, batch: Batch) -> Output:
        """Image loss and patch loss."""
        encoder, large, small = token_encoder(self.encoder), torch.cat(batch.views[:2]), batch.views[2:]
        with torch.no_grad():
            following = token_encoder(self.teacher["encoder"])
            followed = following.tokens(large)
            target_logits = self.teacher["head"](following.embed_tokens(followed))
        targets = self.image_targets(target_logits.unflatten(0, (2, -1)))
        tokens = encoder.tokens(large)
        embeddings = encoder.embed_tokens(tokens)
        self.collapse.update(embeddings)
        logits = self.head(embeddings, self.frozen)
        if small:
            logits = torch.cat([logits, self.local_logits(small)])
        image = self.image_loss(logits.unflatten(0, (len(batch.views), -1)), targets)
        # Row i of the first half: crop 1's places in crop 0; of the second: crop 0's places in crop 1.
        grid, (first, second) = patch_grid(encoder, large), batch.parameters[:2]
        places = torch.cat([places_in(second, grid, first, grid), places_in(first, grid, second, grid)])
        if self.hyperparameters.formulation == "survey":
            patch = self.contrast(embed_each(encoder, tokens.patches), places, grid)
        else:
            patch = self.predicted(tokens.patches, followed.patches, places, grid)
        metrics = {"image_divergence": image.detach() - target_entropy(targets), "patch_loss": patch.detach()}
        return Output(image + self.hyperparameters.patch_weight * patch, metrics)

    def predicted(self, patches: Tensor, targets: Tensor, places: Tensor, grid: tuple[int, int]) -> Tensor:
        """How far the decoder's tokens are from the teacher's of the other crop; all ``(2B, T, token_dim)``."""
        decoded = self.decoder(patches, grid_coordinates(grid, patches.device), places)
        wanted = targets.roll(len(targets) // 2, dims=0)
        return token_distance(decoded, wanted, self.hyperparameters.distance)


def token_distance(predicted: Tensor, target: Tensor, kind: str) -> Tensor:
    """Mean of ``1 - cos``, or smooth L1 to the standardised target, in float32 at least."""
    with torch.autocast(predicted.device.type, enabled=False):
        predicted, target = widen(predicted), widen(target)
        if kind == "cosine":
            return losses.cosine_distance(predicted, target).mean()
        return F.smooth_l1_loss(predicted, F.layer_norm(target, target.shape[-1:]))
