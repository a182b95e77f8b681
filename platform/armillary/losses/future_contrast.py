"""What comes next among what came elsewhere: contrastive prediction of later parts of a sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armillary.losses.global_batch import first_column, global_rows
from armillary.losses.tensors import float32_math


class FutureContrast(nn.Module):
    """InfoNCE of predictions. Van den Oord, Li, Vinyals, "CPC", 2018, arXiv 1807.03748, eq. 4.

    With z_{i,t} part t of sequence i and p_{i,t,k} what the context at t predicts for part t + k::

        L = sum_k mean_{i,t} -log exp(p_{i,t,k}.z_{i,t+k}) / sum_{j,s} exp(p_{i,t,k}.z_{j,s})

    j, s over all parts of all sequences of the global batch, with gradient to predictions and parts.

    Args:
        gather: see the other workers' sequences.
    """

    def __init__(self, gather: bool = True) -> None:
        super().__init__()
        self.gather = gather

    def forward(
        self, parts: Tensor, predicted: Sequence[Tensor], *, metrics: dict[str, Tensor] | None = None
    ) -> Tensor:
        """The loss.

        Args:
            parts: z, ``(batch, S, dim)``.
            predicted: for k = 1, 2, ... predictions ``(batch, S - k, dim)`` from contexts t = 0 .. S - k - 1.
            metrics: receives ``accuracy``, the share of predictions that are nearest to their own part.
        """
        terms = [self._term(parts, of_step, step) for step, of_step in enumerate(predicted, start=1)]
        if metrics is not None:
            metrics["accuracy"] = torch.stack([term[1].detach() for term in terms]).mean()
        return torch.stack([term[0] for term in terms]).sum()

    @float32_math
    def _term(self, parts: Tensor, predicted: Tensor, step: int) -> Tensor:
        """The loss and the accuracy of one k, ``(2,)``."""
        columns = global_rows(parts, self.gather)
        sequence = torch.arange(len(parts), device=parts.device) + first_column(len(parts), self.gather)
        later = torch.arange(step, parts.shape[1], device=parts.device)
        own = (sequence[:, None] * parts.shape[1] + later).flatten()
        logits = predicted.flatten(0, 1) @ columns.flatten(0, 1).T
        right = (logits.detach().argmax(dim=1) == own).to(logits.dtype).mean()
        return torch.stack([F.cross_entropy(logits, own), right])
