"""Images side by side in one PNG file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

_GAP = 2
# Images smaller than this are enlarged by a whole factor, so that a person sees their pixels.
_READABLE = 96


def save_grid(grid: Tensor, path: Path) -> None:
    """Writes images as one picture, row by row, enlarged by a whole factor when they are small.

    Args:
        grid: ``(rows, columns, channels, height, width)`` in [0, 1] (what lies outside is cut), 1 or 3 channels.
        path: of the PNG file; its folder is made if it is missing.

    Raises:
        ValueError: a wrong shape.
    """
    from PIL import Image

    if grid.ndim != 5 or grid.shape[2] not in (1, 3):
        raise ValueError(f"a grid must be (rows, columns, 1 or 3, height, width), found {tuple(grid.shape)}")
    rows, columns, _, height, width = grid.shape
    factor = max(1, _READABLE // height)
    pixels = (grid.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8)
    pixels = pixels.expand(rows, columns, 3, height, width)
    pixels = pixels.repeat_interleave(factor, dim=3).repeat_interleave(factor, dim=4)
    tall, broad = height * factor + _GAP, width * factor + _GAP
    page = torch.full((3, rows * tall + _GAP, columns * broad + _GAP), 255, dtype=torch.uint8)
    for row in range(rows):
        for column in range(columns):
            top, left = row * tall + _GAP, column * broad + _GAP
            page[:, top : top + height * factor, left : left + width * factor] = pixels[row, column]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(page.permute(1, 2, 0).numpy()).save(path)
