"""Which patches of an image are hidden: drawn by key, so that a sample's mask depends on nothing else in the batch.

Keys come from :func:`armillary.components.counter.sample_keys`, e.g. ``sample_keys(key(seed, step), batch.index)``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from armillary.components.counter import key, mix, permutations, uniforms

_BLOCKS, _REST = 1, 2
_ATTEMPTS = 20


def random_keep(keys: Tensor, patches: int, ratio: float) -> tuple[Tensor, Tensor]:
    """Hides patches evenly at random (He et al., MAE, 2022).

    Args:
        keys: ``(batch,)`` int64.
        patches: T, of an image.
        ratio: share that is hidden, in [0, 1).

    Returns:
        ``(batch, K)`` int64, the ``floor(T (1 - ratio))`` patches that stay, in random order, and ``(batch, T)`` bool,
        those that are hidden.

    Raises:
        ValueError: no patch would stay.
    """
    # A product such as 64 * 0.25 must not fall short of 16 by a rounding error.
    count = math.floor(patches * (1 - ratio) + 1e-9)
    if count < 1:
        raise ValueError(f"of {patches} patches none stays at a ratio of {ratio}")
    keep = permutations(keys, patches)[:, :count]
    hidden = torch.ones(len(keys), patches, dtype=torch.bool, device=keys.device).scatter_(1, keep, False)
    return keep, hidden


def random_mask(keys: Tensor, patches: int, ratio: float) -> Tensor:
    """``(batch, T)`` bool: the patches that :func:`random_keep` hides."""
    return random_keep(keys, patches, ratio)[1]


def block_mask(
    keys: Tensor,
    grid: tuple[int, int],
    count: Tensor,
    *,
    smallest: int = 4,
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> Tensor:
    """Hides rectangles of patches, as BEiT, MaskFeat and iBOT do.

    Rectangles of random area, aspect ratio and place are added while they hide no more than ``count`` patches; what is
    left is filled up with single patches, so that the number is exact.

    Args:
        keys: ``(batch,)`` int64.
        grid: rows and columns of patches.
        count: ``(batch,)`` int64, patches to hide, 0 to all.
        smallest: area of the smallest rectangle, in patches.
        aspect: bounds of height over width, log-uniform.

    Returns:
        ``(batch, rows * columns)`` bool, with ``count`` hidden patches in each row.
    """
    rows, columns = grid
    row, column = (torch.arange(side, device=keys.device) for side in grid)
    hidden = torch.zeros(len(keys), rows, columns, dtype=torch.bool, device=keys.device)
    logs = math.log(aspect[0]), math.log(aspect[1])
    for attempt in range(_ATTEMPTS):
        u = uniforms(mix(keys ^ key(_BLOCKS, attempt)), 4)
        left = count - hidden.sum(dim=(1, 2))
        area = smallest + u[:, 0] * (left - smallest).clamp_min(0)
        ratio = (logs[0] + u[:, 1] * (logs[1] - logs[0])).exp()
        height = (area * ratio).sqrt().round().clamp(1, rows)
        width = (area / ratio).sqrt().round().clamp(1, columns)
        top, first = (u[:, 2] * (rows - height + 1)).floor(), (u[:, 3] * (columns - width + 1)).floor()
        block = _between(row, top, height)[:, :, None] & _between(column, first, width)[:, None, :]
        new = (block & ~hidden).sum(dim=(1, 2))
        hidden |= block & (new <= left)[:, None, None]
    flat = hidden.flatten(1)
    order = uniforms(mix(keys ^ key(_REST)), rows * columns).masked_fill(flat, torch.inf).argsort(dim=1, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(rows * columns, device=keys.device).expand_as(order))
    return flat | (rank < (count - flat.sum(dim=1))[:, None])


def _between(positions: Tensor, start: Tensor, length: Tensor) -> Tensor:
    return (positions >= start[:, None]) & (positions < (start + length)[:, None])
