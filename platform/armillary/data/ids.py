"""Samples that are rows of whole numbers, such as a sentence's tokens, in the place of images."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class IdRows:
    """Rows of ids, with the shape that an encoder is built for.

    Args:
        ids: ``(N, L)`` int64.
        kinds: ids run from 0 to ``kinds - 1``; where an image set says how many channels it has, this says so.
        size: takes the place of height and width.
    """

    ids: Tensor
    kinds: int
    size: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Rows, kinds, size: what :func:`armillary.components.backbones.build_encoder` is told."""
        return len(self.ids), self.kinds, *self.size

    @property
    def dtype(self) -> torch.dtype:
        """int64."""
        return self.ids.dtype

    @property
    def ndim(self) -> int:
        """Entries of ``shape``."""
        return 4

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, positions: Tensor | slice | list[int]) -> Tensor:
        """The rows ``(n, L)`` of those positions."""
        return self.ids[positions]

    def select(self, rows: Tensor) -> IdRows:
        """Some rows, in that order."""
        return replace(self, ids=self.ids[rows])
