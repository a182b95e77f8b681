"""InfoNCE in one direction, with gradient to both sides: each query picks its key out of the batch's keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from armillary.losses.global_batch import first_column, global_mean, global_rows, self_mask
from armillary.losses.tensors import check_choice, check_embeddings, float32_math, normalize, not_a_number_guard


class InfoNCE(nn.Module):
    """Row i of the keys is the positive of query i; the rows of all workers' keys are the candidates.

    With cosines s and further negatives n (SimCSE's contradictions)::

        L = mean_i -s(q_i, k_i)/tau + log( sum_j exp(s(q_i, k_j)/tau) + sum_j w^[i=j] exp(s(q_i, n_j)/tau) )

    van den Oord et al., arXiv 1807.03748, eq. 4; the weight w of the own hard negative is that of Gao et al., SimCSE,
    EMNLP 2021, appendix D. Without the positive in the denominator, j != i in the first sum, it is GraphCL's (You et
    al., NeurIPS 2020, eq. 3) and may be negative; a query without any negative then counts as 0.

    Args:
        temperature: tau > 0.
        positive_in_denominator: whether j = i belongs to the first sum.
        negative_weight: w > 0.
        reduction: ``mean``, or ``none`` for the queries' losses ``(batch,)``.
        gather: see the other workers' rows.
        normalized: compare directions; otherwise s is the plain product, of ``q W`` and k for a bilinear critic.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        temperature: float = 0.05,
        positive_in_denominator: bool = True,
        negative_weight: float = 1.0,
        reduction: str = "mean",
        gather: bool = True,
        normalized: bool = True,
    ) -> None:
        super().__init__()
        check_choice("reduction", reduction, ("mean", "none"))
        for name, value in (("temperature", temperature), ("negative_weight", negative_weight)):
            if not value > 0:
                raise ValueError(f"{name} must be above 0, found {value}")
        self.temperature, self.positive_in_denominator = temperature, positive_in_denominator
        self.negative_weight, self.reduction, self.gather = negative_weight, reduction, gather
        self.normalized = normalized

    @float32_math
    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        *,
        negatives: Tensor | None = None,
        candidates: Tensor | None = None,
        valid: Tensor | None = None,
        metrics: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """The loss.

        Args:
            queries: ``(batch, dim)``.
            keys: ``(batch, dim)``, row i that of query i.
            negatives: ``(batch, dim)``, further negatives of everybody; row i is query i's own.
            candidates: ``(batch, dim)`` in the keys' place in the denominator; a survey writes the queries there.
            valid: ``(batch,)`` bool, queries that count; all by default. Their rows are candidates all the same.
            metrics: receives ``positive_cosine`` and ``accuracy``, the share of queries that pick their own key.
        """
        check_embeddings(queries)
        if queries.shape != keys.shape:
            raise ValueError(f"queries and keys differ in shape: {tuple(queries.shape)} and {tuple(keys.shape)}")
        q, k = self._directions(queries), self._directions(keys)
        columns = k if candidates is None else self._directions(candidates)
        logits = q @ global_rows(columns, self.gather).T / self.temperature
        positive = (q * k).sum(dim=1) / self.temperature
        own = self_mask(logits, self.gather)
        alone = not self.positive_in_denominator and logits.shape[1] == 1 and negatives is None
        if not self.positive_in_denominator and not alone:
            logits = logits.masked_fill(own, -torch.inf)
        if negatives is not None:
            hard = q @ global_rows(self._directions(negatives), self.gather).T / self.temperature
            logits = torch.cat([logits, hard + own.to(hard.dtype) * math.log(self.negative_weight)], dim=1)
        losses = logits.logsumexp(dim=1) - positive
        if alone:
            losses = 0 * losses
        if metrics is not None:
            metrics["positive_cosine"] = (positive.detach() * self.temperature).mean()
            best = logits.detach().masked_fill(
                torch.nn.functional.pad(own, (0, logits.shape[1] - own.shape[1])), -torch.inf
            )
            metrics["accuracy"] = (positive.detach() > best.amax(dim=1)).to(losses.dtype).mean()
        if self.reduction == "none":
            return losses
        counted = torch.ones_like(losses) if valid is None else valid.to(losses.dtype)
        return global_mean((losses * counted).sum(), counted.sum(), self.gather) + not_a_number_guard(losses)

    def _directions(self, rows: Tensor) -> Tensor:
        return normalize(rows) if self.normalized else rows


class SymmetricInfoNCE(nn.Module):
    """Images pick their texts and texts their images. Radford et al., CLIP, ICML 2021, arXiv 2103.00020, figure 3.

    ``L = 1/2 [ mean_i (lse_j S_ij - S_ii) + mean_j (lse_i S_ij - S_jj) ]`` with ``S = scale * cos``.

    Args:
        gather: see the other workers' rows.
    """

    def __init__(self, gather: bool = True) -> None:
        super().__init__()
        self.gather = gather

    @float32_math
    def forward(
        self, images: Tensor, texts: Tensor, scale: Tensor, *, metrics: dict[str, Tensor] | None = None
    ) -> Tensor:
        """The loss.

        Args:
            images: ``(batch, dim)``.
            texts: ``(batch, dim)``, row i that of image i.
            scale: a scalar, > 0.
            metrics: receives ``image_to_text`` and ``text_to_image``, the two directions' losses, and
                ``positive_cosine``.
        """
        check_embeddings(images)
        if images.shape != texts.shape:
            raise ValueError(f"images and texts differ in shape: {tuple(images.shape)} and {tuple(texts.shape)}")
        u, v = normalize(images), normalize(texts)
        own = torch.arange(len(u), device=u.device) + first_column(len(u), self.gather)
        cross_entropy = nn.functional.cross_entropy
        to_text = cross_entropy(scale * (u @ global_rows(v, self.gather).T), own)
        to_image = cross_entropy(scale * (v @ global_rows(u, self.gather).T), own)
        if metrics is not None:
            metrics.update(image_to_text=to_text.detach(), text_to_image=to_image.detach())
            metrics["positive_cosine"] = (u * v).sum(dim=1).mean().detach()
        return (to_text + to_image) / 2
