"""Two dropout draws of an image against other identities: the contrastive term of CoReFace."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from armillary.losses.contrastive import masked_cross_entropy
from armillary.losses.global_batch import global_mean, global_rows, global_sum, same_label, self_mask
from armillary.losses.tensors import check_choice, check_embeddings, float32_math, normalize, not_a_number_guard


class SampleGuidedContrast(nn.Module):
    """CoReFace's regularizer. Y. Song and F. Wang, 2023, arXiv 2304.11668.

    z and z' are embeddings of an image under two dropout draws, c_ij = cos(z_i, z'_j)::

        L_C = mean_i -log( exp(s (c_ii - m)) / (exp(s (c_ii - m)) + sum_{j: y_j != y_i} exp(s c_ij)) )
        m  <- alpha mean_i( c_ii - max_{j: y_j != y_i} c_ij ) + (1 - alpha) m       before its use, without gradient

    m starts at 0; alpha is the weight of the *current* batch. Other images of the identity are left out; whether the
    paper's equation removes them or sets their cosine to 0 we could not check. The authors' code does the latter
    (``mask="zero_cosine"``), by which they stay in the sum as exp(0) and hold the hardest negative at 0 or above.

    ``formulation="survey"`` is another loss: m = 0, and only the K nearest of other identities are negatives.

    Args:
        scale: s > 0.
        ema: alpha in (0, 1].
        mask: ``exclude`` or ``zero_cosine``.
        direction: ``forward`` compares z with z'; ``both`` adds the other order, averaged.
        formulation: ``paper`` or ``survey``.
        hardest: K of the survey's form, 1 or more.
        gather: see the other workers' samples.

    Attributes:
        margin: m, a float32 scalar; moved by :meth:`update`, the value of the last forward pass is kept until then.

    Raises:
        ValueError: an option out of range; in ``forward`` draws of different shapes.
    """

    margin: Tensor

    def __init__(
        self,
        scale: float = 64.0,
        ema: float = 0.99,
        mask: str = "exclude",
        direction: str = "forward",
        formulation: str = "paper",
        hardest: int = 16,
        gather: bool = True,
    ) -> None:
        super().__init__()
        check_choice("mask", mask, ("exclude", "zero_cosine"))
        check_choice("direction", direction, ("forward", "both"))
        check_choice("formulation", formulation, ("paper", "survey"))
        if not (scale > 0 and 0 < ema <= 1 and hardest >= 1):
            raise ValueError(f"scale above 0, ema in (0, 1], hardest at least 1; found {scale}, {ema}, {hardest}")
        self.scale, self.ema, self.mask, self.direction = scale, ema, mask, direction
        self.formulation, self.hardest, self.gather = formulation, hardest, gather
        self.register_buffer("margin", torch.zeros(()))
        self._next: Tensor | None = None

    @float32_math
    def forward(
        self, draw1: Tensor, draw2: Tensor, labels: Tensor, *, metrics: dict[str, Tensor] | None = None
    ) -> Tensor:
        """This worker's share of the mean over images that have another identity in the batch.

        Args:
            draw1: z, ``(batch, dim)``.
            draw2: z', ``(batch, dim)``.
            labels: ``(batch,)``.
            metrics: receives ``contrast_margin``, the m that was used, and ``draw_cosine``, c_ii.
        """
        check_embeddings(draw1, labels)
        if draw1.shape != draw2.shape:
            raise ValueError(f"the draws differ in shape: {tuple(draw1.shape)} and {tuple(draw2.shape)}")
        z, other = normalize(draw1), normalize(draw2)
        same = same_label(labels, self.gather)
        own = self_mask(same, self.gather)
        cosines = z @ global_rows(other, self.gather).T
        margin = self._moved_margin(cosines.detach(), same, own)
        losses, valid = self._losses(cosines, same, own, margin)
        if self.direction == "both":
            back, _ = self._losses(other @ global_rows(z, self.gather).T, same, own, margin)
            losses = (losses + back) / 2
        if metrics is not None:
            metrics.update(contrast_margin=margin, draw_cosine=(z * other).detach().sum(dim=1).mean())
        guard = not_a_number_guard(draw1) + not_a_number_guard(draw2)
        return global_mean(losses.sum(), valid.sum(), self.gather) + guard

    @torch.no_grad()
    def update(self) -> None:
        """Keeps the margin of the last forward pass; call it on every worker after an optimizer step."""
        if self._next is not None:
            self.margin.copy_(self._next)
            self._next = None

    def _losses(self, cosines: Tensor, same: Tensor, own: Tensor, margin: Tensor) -> tuple[Tensor, Tensor]:
        valid = ~same.all(dim=1)
        negatives = ~same
        if self.formulation == "survey":
            nearest = cosines.detach().masked_fill(same, -torch.inf).topk(min(self.hardest, same.shape[1]), dim=1)
            chosen = torch.zeros_like(same).scatter_(1, nearest.indices, True)
            negatives, margin = negatives & chosen, margin * 0
        elif self.mask == "zero_cosine":
            cosines, negatives = cosines.masked_fill(same & ~own, 0), ~own
        logits = self.scale * (cosines - margin * own)
        losses, _ = masked_cross_entropy(logits, own, own | negatives)
        return torch.where(valid, losses, 0), valid

    @torch.no_grad()
    def _moved_margin(self, cosines: Tensor, same: Tensor, own: Tensor) -> Tensor:
        valid = ~same.all(dim=1)
        hardest = cosines.masked_fill(same, 0.0 if self.mask == "zero_cosine" else -torch.inf)
        hardest = hardest.masked_fill(own, -torch.inf).amax(dim=1)
        gap = torch.where(valid, (cosines * own).sum(dim=1) - hardest, 0)
        count = global_sum(valid.sum(), self.gather)
        batch = global_sum(gap.sum(), self.gather) / count.clamp_min(1)
        before = self.margin.to(cosines.dtype)
        margin: Tensor = torch.where(count > 0, self.ema * batch + (1 - self.ema) * before, before)
        if self.training:
            self._next = margin
        return margin
