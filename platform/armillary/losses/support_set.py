"""Items described by a mixture of other items: the support-set bottleneck without its text decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armillary.losses.global_batch import first_column, global_rows
from armillary.losses.key_contrast import BatchKeyContrast, check_temperature
from armillary.losses.tensors import check_choice, check_embeddings, float32_math, normalize


class SupportSet(nn.Module):
    """Support-set bottleneck, a surrogate. Patrick et al., ICLR 2021, arXiv 2010.02824.

    t_i and v_i of unit length are one item seen in two ways; T is the temperature::

        w_ij = exp(t_i.v_j / T) / sum_{k != i} exp(t_i.v_k / T),  j != i        mixture_i = sum_j w_ij v_j
        L = contrast(t, v) + lambda * support
        support: 1 - cos(p_i, t_i), or InfoNCE of p_i among all t, with p_i a prediction from mixture_i, t_i a constant

    The mixture, with the item itself left out, is the paper's cross-captioning. What differs: the paper's decoder
    writes a caption from the mixture; there is no text here, so that a small network predicts t_i instead. And the
    contrast here is the mean of both directions' InfoNCE, while the paper's was not checked.

    Args:
        temperature: T > 0, of weights and contrast.
        weight: lambda >= 0.
        exclude_self: leave the item out of its own mixture; a batch of one item then has none, and no support term.
        target: ``regression`` or ``contrast``.
        gather: the support set is the batch of all workers, with gradient to their items; else the worker's own.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        weight: float = 10.0,
        exclude_self: bool = True,
        target: str = "regression",
        gather: bool = True,
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        check_choice("target", target, ("regression", "contrast"))
        self.temperature, self.weight, self.exclude_self, self.gather = temperature, weight, exclude_self, gather
        self.target = target
        self.among_batch = BatchKeyContrast(temperature, gather)

    def weights(self, text: Tensor, columns: Tensor) -> Tensor:
        """The weights w ``(batch, columns)`` of rows and columns of unit length; a row without candidates is zero."""
        logits = text @ columns.T / self.temperature
        if not self.exclude_self:
            return logits.softmax(dim=1)
        own = torch.arange(len(text), device=text.device) + first_column(len(text), self.gather)
        itself = torch.arange(len(columns), device=text.device) == own[:, None]
        if len(columns) == 1:
            return 0 * logits
        return logits.masked_fill(itself, -torch.inf).softmax(dim=1)

    @float32_math
    def mixture(self, text: Tensor, video: Tensor) -> Tensor:
        """The mixtures ``(batch, dim)`` of ``text (batch, dim)`` and ``video (batch, dim)``."""
        check_embeddings(text)
        columns = global_rows(normalize(video), self.gather)
        return self.weights(normalize(text), columns) @ columns

    @float32_math
    def forward(
        self, text: Tensor, video: Tensor, predicted: Tensor, *, metrics: dict[str, Tensor] | None = None
    ) -> Tensor:
        """The loss.

        Args:
            text: t, ``(batch, dim)``.
            video: v, ``(batch, dim)``.
            predicted: p, ``(batch, dim)``, from :meth:`mixture`.
            metrics: receives ``contrast`` and ``support``.
        """
        t, v = normalize(text), normalize(video)
        columns_t, columns_v = global_rows(t, self.gather), global_rows(v, self.gather)
        own = torch.arange(len(t), device=t.device) + first_column(len(t), self.gather)
        directions = ((t, columns_v), (v, columns_t))
        contrast = torch.stack(
            [F.cross_entropy(rows @ all_of.T / self.temperature, own) for rows, all_of in directions]
        )
        contrast = contrast.mean()
        if self.exclude_self and len(columns_v) == 1:
            support = 0 * predicted.sum()
        elif self.target == "regression":
            support = (1 - (normalize(predicted) * t.detach()).sum(1)).mean()
        else:
            support = self.among_batch(predicted, t) / (2 * self.temperature)
        if metrics is not None:
            metrics.update(contrast=contrast.detach(), support=support.detach())
        return contrast + self.weight * support
