"""Embeddings and gradients as a common centre and residuals: why siamese networks do or do not collapse.

Zhang, Zhang, Zhang, Pham, Yoo, Kweon, "How Does SimSiam Avoid Collapse Without Negative Samples?", ICLR 2022. The
formulas are derived again from the paper's summary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from armillary import collectives
from armillary.losses.tensors import normalize


@dataclass(frozen=True)
class CenterResidual:
    """``z = o + r`` of rows of unit length; ``center_share ** 2 + residual_square == 1``.

    ``center (dim,)`` is o, the mean over all workers' rows; ``center_share`` its length, in [0, 1], which is 1 after a
    collapse and about ``1 / sqrt(rows)`` for independent directions; ``residual_share`` the mean length of r,
    ``residual_square`` the mean of its square.
    """

    center: Tensor
    center_share: Tensor
    residual_share: Tensor
    residual_square: Tensor


@torch.no_grad()
def center_and_residual(embeddings: Tensor) -> CenterResidual:
    """The parts of embeddings ``(batch, dim)``, of any length, in float32 at least and over all workers."""
    rows = normalize(_wide(embeddings))
    center = _mean(rows)
    residual = rows - center
    lengths = residual.norm(dim=1)
    return CenterResidual(center, center.norm(), _mean(lengths), _mean(lengths.square()))


@torch.no_grad()
def de_centering(projections: Tensor, predictions: Tensor) -> Tensor:
    """Cosine between the centres of ``z - p`` and of p, in [-1, 1]; 0 where there is no difference.

    With the gradient that a predictor-free network would have, p, as its basic part, a predictor adds the extra
    gradient ``z - p`` (both of unit length). A negative value moves embeddings away from their centre.
    """
    z, p = normalize(_wide(projections)), normalize(_wide(predictions))
    extra, center = _mean(z - p), _mean(p)
    return (normalize(extra) * normalize(center)).sum()


@dataclass(frozen=True)
class AnchorGradient:
    """The negative gradient of InfoNCE by a unit anchor, times tau: ``basic + extra``.

    ``weights (keys,)`` sum to 1; ``basic`` is the positive key, ``extra`` minus the weighted mean of all keys.
    """

    weights: Tensor
    basic: Tensor
    extra: Tensor


@torch.no_grad()
def info_nce_gradient(anchor: Tensor, keys: Tensor, positive: int, temperature: float) -> AnchorGradient:
    """The parts of one anchor's gradient, taken as if the anchor were free to leave the sphere.

    Args:
        anchor: ``(dim,)``.
        keys: ``(keys, dim)``, the positive one among them.
        positive: its row.
        temperature: tau > 0.
    """
    query, rows = normalize(_wide(anchor)), normalize(_wide(keys))
    weights = (rows @ query / temperature).softmax(dim=0)
    return AnchorGradient(weights, rows[positive], -(weights[:, None] * rows).sum(dim=0))


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _mean(rows: Tensor) -> Tensor:
    """Over the rows of all workers, which hold equally many."""
    return collectives.all_reduce_sum(rows.sum(dim=0)) / (len(rows) * collectives.world_size())
