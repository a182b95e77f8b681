"""Cross-entropy over what was done to an image: labels that cost nothing."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from armillary.losses.tensors import float32_math


class WhichWasApplied(nn.Module):
    """``-mean_i log p_i(y_i)``, with y_i the number of the transformation that image i has undergone."""

    @float32_math
    def forward(self, logits: Tensor, applied: Tensor, *, metrics: dict[str, Tensor] | None = None) -> Tensor:
        """The loss of ``logits (batch, K)`` and ``applied (batch,)`` int64 in 0..K - 1; ``metrics``: ``accuracy``."""
        if metrics is not None:
            metrics["accuracy"] = (logits.detach().argmax(dim=1) == applied).to(logits.dtype).mean()
        return F.cross_entropy(logits, applied)
