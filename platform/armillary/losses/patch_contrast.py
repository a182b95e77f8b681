"""Contrasts between the patches of two crops of an image, in the forms that a survey gives PQ and CR2PQ."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from armillary.losses.tensors import float32_math, normalize, not_a_number_guard


class ConceptContrast(nn.Module):
    """``-sum_k log softmax_j cos(A_1k, A_2j)[k]``, the mean over images, with ``A_vk = softmax_p(q_k . v_p / sqrt d)``.

    Each of K learned concepts q_k looks for its patches in two crops; its two attention maps should be alike, and
    unlike those of other concepts.

    Args:
        dim: d, width of the patches' features.
        concepts: K, at least 2.
    """

    def __init__(self, dim: int, concepts: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(concepts, dim))

    @float32_math
    def forward(self, patches1: Tensor, patches2: Tensor) -> Tensor:
        """The loss of two crops' patches ``(batch, T, dim)``."""
        queries = self.queries.to(patches1.dtype) / math.sqrt(patches1.shape[-1])
        maps = [(queries @ patches.transpose(1, 2)).softmax(dim=2) for patches in (patches1, patches2)]
        similarity = normalize(maps[0]) @ normalize(maps[1]).transpose(1, 2)
        own = similarity.diagonal(dim1=1, dim2=2)
        return (similarity.logsumexp(dim=2) - own).sum(dim=1).mean()


class PatchContrast(nn.Module):
    """InfoNCE between patches at the same place of two crops; alternatives are the other crop's patches.

    ``-log exp(cos(q * k_i, q * k'_i) / tau) / sum_j exp(cos(q * k_i, q * k'_j) / tau)``, with a learned weight q of
    each channel. The mean over the patches of a crop that the other one shows, then over crops; a crop that shares no
    place with the other counts 0.

    Args:
        dim: width of the features.
        temperature: tau > 0.
    """

    def __init__(self, dim: int, temperature: float = 0.2) -> None:
        super().__init__()
        self.query = nn.Parameter(1 + 0.02 * torch.randn(dim))
        self.temperature = temperature

    @float32_math
    def forward(self, features: Tensor, places: Tensor, grid: tuple[int, int]) -> Tensor:
        """The loss, each crop in both roles.

        Args:
            features: ``(2B, T, dim)``, one crop of each image, then the other.
            places: ``(2B, T, 2)``, upper left corners: in the first half the second crops' patches in the first crops'
                grid, in the second half the other way round.
            grid: rows and columns of patches.
        """
        keys = normalize(features * self.query.to(features.dtype))
        anchors = keys.roll(len(keys) // 2, dims=0)
        cosine = anchors @ keys.transpose(1, 2) / self.temperature
        column, row = places.round().long().unbind(-1)
        shown = (column >= 0) & (column < grid[1]) & (row >= 0) & (row < grid[0])
        nearest = (row * grid[1] + column).where(shown, 0)
        own = cosine.gather(2, nearest[..., None])[..., 0]
        terms = (cosine.logsumexp(dim=2) - own) * shown
        return (terms.sum(dim=1) / shown.sum(dim=1).clamp_min(1)).mean() + not_a_number_guard(features)
