"""Self-distillation of images and patches: iBOT, DINOv2, and DINOv3's Gram anchoring."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from armillary import collectives
from armillary.components.center import Center
from armillary.components.counter import key, mix, sample_keys, uniforms
from armillary.components.encoders import TokenEncoder, Tokens, token_encoder
from armillary.components.masks import block_mask
from armillary.components.schedules import Schedule
from armillary.components.sinkhorn import sinkhorn
from armillary.components.teacher import Teacher
from armillary.losses import self_distillation as losses
from armillary.losses.tensors import widen
from armillary.objectives.base import Batch, BuildContext, Citation, Needs, Output
from armillary.objectives.registry import register
from armillary.objectives.self_distillation import (
    MOVING_TARGETS,
    PrototypeDistillation,
    PrototypeHyperparameters,
    small_tokens,
    target_entropy,
    with_local_crops,
)

_MASK, _BLOCKS = 81, 82


def embed_each(encoder: TokenEncoder, tokens: Tensor) -> Tensor:
    """Tokens ``(..., token_dim)`` as embeddings ``(..., embedding_dim)``: each as if it were an image's only patch.

    So one head can take images and patches, and the layer behind the tokens learns from both.
    """
    flat = tokens.flatten(0, -2)
    embeddings: Tensor = encoder.embed_tokens(Tokens(flat, flat[:, None])).unflatten(0, tokens.shape[:-1])
    return embeddings


def independent_masks(keys: Tensor, grid: tuple[int, int], share: float, ratio: tuple[float, float]) -> Tensor:
    """Masks of iBOT, ``(crops, T)`` bool: each crop is masked by chance, its hidden share uniform within ``ratio``.

    Args:
        keys: ``(crops,)`` int64.
        grid: rows and columns of patches.
        share: probability that a crop is masked.
        ratio: smallest and largest hidden share of a masked crop.
    """
    chance, place = uniforms(keys, 2).unbind(1)
    hidden = ratio[0] + (ratio[1] - ratio[0]) * place
    return _blocks(keys, grid, hidden * (chance < share))


def spread_masks(keys: Tensor, grid: tuple[int, int], share: float, ratio: tuple[float, float]) -> Tensor:
    """DINOv2's masks: of the crops of all workers exactly ``share`` are masked, their ratios spread evenly.

    The n masked crops get one draw from each of n equal parts of ``ratio``, in the order of the crops' keys. See
    :func:`independent_masks` for the arguments.
    """
    everyone = collectives.gather_no_grad(keys)
    rank = torch.searchsorted(everyone.sort().values, keys)
    count = max(round(share * len(everyone)), 1)
    place = (rank + uniforms(keys, 1)[:, 0]) / count
    hidden = ratio[0] + (ratio[1] - ratio[0]) * place
    return _blocks(keys, grid, hidden * (rank < round(share * len(everyone))))


def _blocks(keys: Tensor, grid: tuple[int, int], hidden: Tensor) -> Tensor:
    count = (hidden * (grid[0] * grid[1])).long()
    return block_mask(mix(keys ^ key(_BLOCKS)), grid, count)


class PatchHyperparameters(PrototypeHyperparameters):
    """What the methods with masked patches add to DINO's."""

    patch_weight: float = Field(1.0, ge=0, le=10, description="lambda_2, weight of the masked patches' loss")
    mask_share: float = Field(0.5, ge=0, le=1, description="share of the large crops that are masked")
    mask_ratio_min: float = Field(0.1, ge=0, le=0.9, description="least hidden share of a masked crop")
    mask_ratio_max: float = Field(0.5, ge=0, le=0.9, description="largest hidden share of a masked crop")
    shared_head: bool = Field(True, description="one head for images and patches, or one each")


@dataclass(frozen=True)
class Seen:
    """What the student makes of the large crops: hidden places ``(2B, T)``, tokens and embeddings ``(2B, dim)``."""

    masked: Tensor
    tokens: Tokens
    embeddings: Tensor


class PatchDistillation(PrototypeDistillation):
    """Two large crops, which the student sees with patches hidden and the teacher whole."""

    def add_parts(self, context: BuildContext) -> None:
        """Makes the patches' head, where they have one of their own, their centre and their loss."""
        options = self.hyperparameters
        if not options.shared_head:
            self.patch_head = self.make_head(context)
        self.patch_center = Center(options.prototypes, options.center_momentum)
        self.patch_loss = losses.MaskedPatchEntropy(options.student_temperature)

    def parts(self) -> tuple[str, ...]:
        """The teacher copies the patches' head too."""
        return ("encoder", "head") if self.hyperparameters.shared_head else ("encoder", "head", "patch_head")

    @property
    def patch_part(self) -> str:
        """Name of the head that patches go through."""
        return self.parts()[-1]

    def masks(self, batch: Batch, grid: tuple[int, int]) -> Tensor:
        """Hidden places of the two large crops of each image, ``(2B, T)``, new in every step."""
        options = self.hyperparameters
        keys = [sample_keys(key(_MASK, self.seed, self.step, view), batch.index) for view in range(2)]
        draw = spread_masks if self.spread else independent_masks
        return draw(torch.cat(keys), grid, options.mask_share, (options.mask_ratio_min, options.mask_ratio_max))

    # Whether masks are dealt out over the global batch or drawn crop by crop.
    spread: ClassVar[bool] = False

    def see(self, batch: Batch, queries: Tensor | None = None) -> Seen:
        """The student's side of the large crops."""
        encoder, images = token_encoder(self.encoder), torch.cat(batch.views[:2])
        masked = self.masks(batch, patch_grid(encoder, images))
        tokens = encoder.tokens(images, masked=masked, queries=queries)
        embeddings = encoder.embed_tokens(tokens)
        self.collapse.update(embeddings)
        return Seen(masked, tokens, embeddings)

    def image_term(self, seen: Seen, targets: Tensor, small: tuple[Tensor, ...]) -> Tensor:
        """DINO's loss: large crops (as masked) and small ones against the other large crops' targets."""
        logits = self.head(seen.embeddings, self.frozen)
        if small:
            logits = torch.cat([logits, self.local_logits(small)])
        loss: Tensor = self.image_loss(logits.unflatten(0, (2 + len(small), -1)), targets)
        return loss

    def patch_logits(self, tokens: Tensor) -> Tensor:
        """What the student's head says of tokens ``(..., token_dim)``."""
        logits: Tensor = self.get_submodule(self.patch_part)(
            embed_each(token_encoder(self.encoder), tokens), self.frozen
        )
        return logits

    def patch_term(self, seen: Seen, targets: Tensor) -> Tensor:
        """The loss of the masked patches, as in iBOT; targets are theirs, ``(N, K)``."""
        loss: Tensor = self.patch_loss(self.patch_logits(seen.tokens.patches[seen.masked]), targets, seen.masked)
        return loss

    @staticmethod
    def patch_entropy(seen: Seen, targets: Tensor) -> Tensor:
        """The least value that :meth:`patch_term` can take with these targets."""
        entropies = torch.special.entr(targets).sum(dim=-1)
        least: Tensor = (losses.MaskedPatchEntropy.weights(seen.masked, targets.dtype) * entropies).sum()
        return least

    @torch.no_grad()
    def teacher_tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's logits of whole crops, and their patches."""
        encoder = token_encoder(self.teacher["encoder"])
        tokens = encoder.tokens(images)
        return self.teacher["head"](encoder.embed_tokens(tokens)), tokens.patches

    @torch.no_grad()
    def teacher_patch_logits(self, patches: Tensor) -> Tensor:
        """The teacher's logits of its patches ``(..., token_dim)``."""
        logits: Tensor = self.teacher[self.patch_part](embed_each(token_encoder(self.teacher["encoder"]), patches))
        return logits

    def centered_patch_targets(self, patches: Tensor, masked: Tensor) -> Tensor:
        """Targets of the masked patches; all patches count towards their centre."""
        logits = self.teacher_patch_logits(patches)
        self.patch_center.hold(self.step, logits)
        return losses.centered_targets(logits[masked], self.patch_center.value, self.teacher_temperature)

    def after_step(self, step: int) -> None:
        """Moves both centres and the teacher."""
        self.patch_center.update()
        super().after_step(step)


def patch_grid(encoder: TokenEncoder, images: Tensor) -> tuple[int, int]:
    """Rows and columns of patches of images."""
    return images.shape[2] // encoder.patch_size[0], images.shape[3] // encoder.patch_size[1]


_TOKENS = Needs(
    views=10,
    recipe="multicrop",
    recipe_options={"local_crops": 8},
    encoder="tokens",
    components=("projector", "teacher", "center"),
)


@register
class IBOT(PatchDistillation):
    """iBOT: DINO, and of every hidden patch the student says what the teacher says who sees it.

    Zhou et al. 2022, equations 2 and 3: ``L = L_CLS + lambda_2 L_MIM``. Hidden patches pair the same crop, images
    different crops. In the released code (main_ibot.py) the centre of the patches counts all of them and the CLS loss
    sees the masked crops, as here. Patches pass the layer behind the encoder's tokens like the image's token, which
    makes the shared head fit both.
    """

    name = "ibot"
    family = "masked_modelling"
    catalog_id = "ibot"
    citation = Citation(
        "Jinghao Zhou, Chen Wei, Huiyu Wang, Wei Shen, Cihang Xie, Alan Yuille, Tao Kong",
        "iBOT: Image BERT Pre-Training with Online Tokenizer",
        2022,
        "ICLR",
        "https://arxiv.org/abs/2111.07832",
    )
    needs = with_local_crops(_TOKENS, 10)
    convergence = small_tokens(
        0.06,
        falls="image_divergence",
        reason=MOVING_TARGETS + "0.06 to 0.10",
        objective__center_momentum=0.9,
        objective__teacher_temperature=0.03,
        optimizer__lr=2e-3,
    )

    class Hyperparameters(PatchHyperparameters):
        """iBOT has fewer prototypes and more small crops than DINO."""

        prototypes: int = Field(8192, ge=2, le=262144, description="K, outputs of the head; 256 to 1024 on small data")
        local_crops: int = Field(10, ge=0, le=20, description="M, small crops beside the two large ones")

    def forward(self, batch: Batch) -> Output:
        """Image and patch loss."""
        logits, patches = self.teacher_tokens(torch.cat(batch.views[:2]))
        targets = self.image_targets(logits.unflatten(0, (2, -1)))
        seen = self.see(batch)
        image = self.image_term(seen, targets, batch.views[2:])
        patch_targets = self.centered_patch_targets(patches, seen.masked)
        patch = self.patch_term(seen, patch_targets)
        metrics = {
            "image_divergence": image.detach() - target_entropy(targets),
            "patch_divergence": patch.detach() - self.patch_entropy(seen, patch_targets),
            "patch_loss": patch.detach(),
        }
        return Output(image + self.hyperparameters.patch_weight * patch, metrics)


class DINOv2Hyperparameters(PatchHyperparameters):
    """What DINOv2 and DINOv3 share."""

    momentum: float = Field(0.992, ge=0, le=1, description="of the teacher at the start; 0.9 for hundreds of steps")
    koleo_weight: float = Field(0.1, ge=0, le=10, description="w_K, of each large crop's spreading term; 0: off")
    sinkhorn_iterations: int = Field(3, ge=1, le=100, description="passes that balance the prototypes' use")
    shared_head: bool = Field(False, description="one head for images and patches, or one each")


class BalancedDistillation(PatchDistillation):
    """DINOv2's loss: image and patch terms with targets that use all prototypes equally, and spread embeddings."""

    spread = True

    def add_parts(self, context: BuildContext) -> None:
        """Adds the spreading term."""
        super().add_parts(context)
        self.koleo = losses.KoLeo()

    def balanced_targets(self, logits: Tensor) -> Tensor:
        """Targets ``(..., K)`` that use all prototypes equally, over the logits of all workers."""
        iterations = self.hyperparameters.sinkhorn_iterations
        return sinkhorn(logits.flatten(0, -2), self.teacher_temperature, iterations).view_as(logits)

    def terms(self, batch: Batch, seen: Seen, balanced: bool = True) -> Output:
        """The three terms' weighted sum."""
        options = self.hyperparameters
        logits, patches = self.teacher_tokens(torch.cat(batch.views[:2]))
        logits = logits.unflatten(0, (2, -1))
        if balanced:
            targets = self.watched(self.balanced_targets(logits))
            patch_targets = self.balanced_targets(self.teacher_patch_logits(patches[seen.masked]))
        else:
            targets, patch_targets = self.image_targets(logits), self.centered_patch_targets(patches, seen.masked)
        image = self.image_term(seen, targets, batch.views[2:])
        patch = self.patch_term(seen, patch_targets)
        koleo = sum((self.koleo(view) for view in seen.embeddings.chunk(2)), torch.zeros_like(image))
        metrics = {
            "image_divergence": image.detach() - target_entropy(targets),
            "patch_loss": patch.detach(),
            "koleo": koleo.detach(),
        }
        return Output(image + options.patch_weight * patch + options.koleo_weight * koleo, metrics)


@register
class DINOv2(BalancedDistillation):
    """DINOv2: iBOT with balanced targets, a head each for images and patches, and embeddings that keep apart.

    Oquab et al. 2024, section 4: ``L = L_DINO + L_iBOT + 0.1 sum_v L_KoLeo(embedding of crop v)``. The targets'
    Sinkhorn runs jointly over both large crops, and over the hidden patches, of all workers. Neighbours of KoLeo are
    sought among all workers' images, where the released code looks at one worker's, so that workers change nothing; it
    acts on the embedding that is evaluated. The survey prints a KL divergence at one temperature with student and
    teacher exchanged: a slip, not another loss.
    """

    name = "dinov2"
    catalog_id = "dinov2"
    citation = Citation(
        "Maxime Oquab, Timothée Darcet, Théo Moutakanni, Huy Vo, Marc Szafraniec, et al.",
        "DINOv2: Learning Robust Visual Features without Supervision",
        2024,
        "TMLR",
        "https://arxiv.org/abs/2304.07193",
    )
    needs = replace(_TOKENS, batch_coupled=True)
    convergence = small_tokens(0.15, falls="loss")

    class Hyperparameters(DINOv2Hyperparameters):
        """How targets are kept from collapsing."""

        centering: Literal["sinkhorn_knopp", "centering"] = Field(
            "sinkhorn_knopp", description="sinkhorn_knopp: the paper's; centering: DINO's running mean"
        )

    def forward(self, batch: Batch) -> Output:
        """Image, patch and spreading term."""
        return self.terms(batch, self.see(batch), self.hyperparameters.centering == "sinkhorn_knopp")


@register
class DINOv3Gram(BalancedDistillation):
    """DINOv3's refinement: DINOv2, with similarities between patches anchored to those of an earlier teacher.

    Siméoni et al. 2025, section 4: ``L = L_DINOv2 + w_Gram L_Gram`` from ``start_step`` on. The Gram teacher is a
    snapshot of the moving average, taken then and every ``update_every`` steps up to ``max_updates`` times. It sees
    the large crops ``teacher_scale`` times enlarged, and its map of patches is brought back by bicubic interpolation.
    Two things differ from the released recipe: it cuts these crops out of a larger image, where here the crop itself is
    enlarged, and it leaves their colours alone, where here student and snapshot see the same pixels. The student's side
    is the crop with hidden patches. Heads have one number of prototypes (the 7B recipe has two).
    """

    name = "dinov3_gram"
    family = "dense"
    catalog_id = "dinov3_gram"
    citation = Citation(
        "Oriane Siméoni, Huy V. Vo, Maximilian Seitzer, Federico Baldassarre, Maxime Oquab, et al.",
        "DINOv3",
        2025,
        None,
        "https://arxiv.org/abs/2508.10104",
    )
    needs = DINOv2.needs
    convergence = small_tokens(
        0.15, falls="loss", objective__start_step=20, objective__update_every=20, train__epochs=5
    )

    class Hyperparameters(DINOv2Hyperparameters):
        """When and how patches are anchored."""

        gram_weight: float = Field(2.0, ge=0, le=100, description="w_Gram, of the mean over pairs of patches")
        start_step: int = Field(1_000_000, ge=0, le=10_000_000, description="steps before anchoring begins")
        update_every: int = Field(10_000, ge=1, le=1_000_000, description="steps between snapshots")
        max_updates: int = Field(3, ge=0, le=1000, description="snapshots after the first")
        teacher_scale: float = Field(2.0, ge=1, le=4, description="how much larger the snapshot sees the crops")
        image_level: bool = Field(True, description="pairs within an image, or all pairs of the global batch")
        remove_negative: bool = Field(False, description="negative similarities count as 0")
        formulation: Literal["paper", "survey"] = Field("paper", description="survey: channels' Gram matrix, raw")

    def build(self, context: BuildContext) -> None:
        """Adds the Gram teacher and its loss."""
        super().build(context)
        options = self.hyperparameters
        self.gram_teacher = Teacher(self.teacher, ("encoder",), Schedule(1.0, 1.0, 0))
        self.gram_loss = losses.GramAnchor(options.image_level, options.remove_negative, options.formulation)

    def forward(self, batch: Batch) -> Output:
        """DINOv2's terms and the anchor."""
        seen = self.see(batch)
        output = self.terms(batch, seen)
        gram = torch.zeros_like(output.loss)
        if self.step >= self.hyperparameters.start_step:
            gram = self.gram_loss(seen.tokens.patches, self.anchor(torch.cat(batch.views[:2])))
            if self.hyperparameters.formulation == "survey":
                # Matrices that are means over patches: the survey's sums grow with their number until nothing trains.
                gram = gram / seen.masked.shape[1] ** 2
        return Output(output.loss + self.hyperparameters.gram_weight * gram, {**output.metrics, "gram": gram.detach()})

    @torch.no_grad()
    def anchor(self, images: Tensor) -> Tensor:
        """The snapshot's patches ``(2B, T, token_dim)`` of enlarged crops, at the crops' own grid."""
        encoder = token_encoder(self.gram_teacher["encoder"])
        grid, scale = patch_grid(encoder, images), self.hyperparameters.teacher_scale
        fine = (round(grid[0] * scale), round(grid[1] * scale))
        if fine == grid:
            return encoder.tokens(images).patches
        size = (fine[0] * encoder.patch_size[0], fine[1] * encoder.patch_size[1])
        patches = encoder.tokens(F.interpolate(images, size=size, mode="bicubic")).patches
        planes = patches.transpose(1, 2).unflatten(2, fine)
        return F.interpolate(widen(planes), size=grid, mode="bicubic", antialias=True).flatten(2).transpose(1, 2)

    def after_step(self, step: int) -> None:
        """Takes the snapshots that are due, after the teacher has moved."""
        super().after_step(step)
        options = self.hyperparameters
        number, rest = divmod(step + 1 - options.start_step, options.update_every)
        if rest == 0 and 0 <= number <= options.max_updates:
            self.gram_teacher.reset(self.teacher)
