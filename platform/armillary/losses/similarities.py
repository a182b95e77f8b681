"""What vectors are compared by: distances, and the similarities that belong to them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Smallest squared distance under a root: its slope is infinite at 0.
SQUARED_FLOOR = 1e-12
SIMILARITIES = ("euclidean", "cosine", "dot")


def euclidean(anchors: Tensor, columns: Tensor, squared: bool) -> Tensor:
    """Distances ``(anchors, columns)`` between rows; equal rows get 0 with zero gradient.

    Args:
        anchors: ``(anchors, dim)``.
        columns: ``(columns, dim)``.
        squared: the square, which on the unit sphere is ``2 - 2 cos``.
    """
    square = torch.addmm(columns.square().sum(1)[None, :], anchors, columns.T, alpha=-2)
    square = (square + anchors.square().sum(1)[:, None]).clamp_min(0)
    return square if squared else root(square)


def root(square: Tensor) -> Tensor:
    """The root of squared distances; 0 has zero gradient."""
    return torch.where(square > SQUARED_FLOOR, square.clamp_min(SQUARED_FLOOR).sqrt(), 0)


@dataclass(frozen=True)
class Distance:
    """A distance D between vectors, and the similarity S = 1 - D.

    Args:
        kind: ``euclidean``, D = |a - c|; ``cosine``, D = 1 - cos, of vectors that have length 1; ``dot``, D = 1 - a.c,
            of vectors of any length, which may be below 0.
        squared: D^2 in place of D, with 0 in place of what is below 0.
    """

    kind: str = "euclidean"
    squared: bool = False

    @property
    def of_units(self) -> bool:
        """Whether it is one of vectors of length 1 alone."""
        return self.kind == "cosine"

    def matrix(self, anchors: Tensor, columns: Tensor) -> Tensor:
        """D of all ``anchors (rows, dim)`` from all ``columns (columns, dim)``, ``(rows, columns)``."""
        if self.kind == "euclidean":
            return euclidean(anchors, columns, self.squared)
        away = torch.addmm(anchors.new_ones(1, 1), anchors, columns.T, alpha=-1)
        return away.clamp_min(0).square() if self.squared else away

    def similarity(self, anchors: Tensor, columns: Tensor) -> Tensor:
        """S of all ``anchors (rows, dim)`` and all ``columns (columns, dim)``, ``(rows, columns)``."""
        if self.kind == "euclidean" or self.squared:
            return 1 - self.matrix(anchors, columns)
        return anchors @ columns.T

    def paired(self, left: Tensor, right: Tensor) -> Tensor:
        """D of vectors ``(..., dim)`` from their counterparts, ``(...)``."""
        if self.kind == "euclidean":
            square = (left - right).square().sum(-1)
            return square if self.squared else root(square)
        away = 1 - (left * right).sum(-1)
        return away.clamp_min(0).square() if self.squared else away

    def order(self, anchors: Tensor, columns: Tensor) -> Tensor:
        """A matrix without gradient that sorts each anchor's columns as the distance does, in one product."""
        with torch.no_grad():
            euclid = self.kind == "euclidean"
            lengths = columns.square().sum(1)[None, :] if euclid else columns.new_zeros(1, 1)
            return torch.addmm(lengths, anchors, columns.T, alpha=-2)
