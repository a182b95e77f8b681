"""Histograms of oriented gradients (Dalal and Triggs, CVPR 2005): MaskFeat's and those that libraries compute."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

_EPS = 1e-12


def hog(
    images: Tensor,
    *,
    bins: int = 9,
    cell: int = 8,
    window: int = 0,
    kind: Literal["sobel", "central", "scaled"] = "sobel",
) -> Tensor:
    """Orientations of the gradients in each cell, weighted by their length; no vote is shared between bins or cells.

    Orientations have no sign: 180 degrees are divided into ``bins``. Two conventions, and a third:

    - ``sobel``: MaskFeat's published layer. 3 x 3 Sobel with the border reflected; angles from the vertical axis,
      ``floor(bins atan2(g_x, g_y) / pi) mod bins``; each histogram has unit length, or is zero where nothing changes.
    - ``central``: scikit-image's. Differences of both neighbours, none at the border; angles from the horizontal axis;
      means over the cell, scaled to unit length with 1e-5 squared under the root.
    - ``scaled``: the survey's reading of MaskFeat. As ``sobel``, but each image's gradients are divided by the root of
      their summed squares before they are counted, and the histograms stay as they are.

    Args:
        images: ``(batch, channels, height, width)``; only whole cells count.
        bins: orientations.
        cell: side of a cell in pixels.
        window: side of a Gaussian window (deviation of half its side) that is laid over the image tile by tile and
            weights the gradients; 0 for none.
        kind: see above.

    Returns:
        ``(batch, channels, bins, height // cell, width // cell)`` in float32, or float64 for such images.
    """
    pixels = images if images.dtype == torch.float64 else images.float()
    gx, gy = _central(pixels) if kind == "central" else _sobel(pixels)
    if kind == "scaled":
        root = (gx.square() + gy.square()).sum(dim=(1, 2, 3), keepdim=True).add(_EPS).sqrt()
        gx, gy = gx / root, gy / root
    angle = torch.atan2(gy, gx) if kind == "central" else torch.atan2(gx, gy)
    bin_of = (angle * bins / math.pi).floor().remainder(bins)
    weight = torch.hypot(gx, gy)
    if window:
        weight = weight * _window(window, (images.shape[2], images.shape[3]), weight)
    votes = torch.stack([weight * (bin_of == number) for number in range(bins)], dim=2)
    counts: Tensor = F.avg_pool2d(votes.flatten(0, 1), cell).unflatten(0, votes.shape[:2])
    if kind == "central":
        return counts / (counts.square().sum(dim=2, keepdim=True) + 1e-10).sqrt()
    sums: Tensor = counts * cell**2
    return sums if kind == "scaled" else F.normalize(sums, dim=2, eps=_EPS)


def hog_of_patches(cells: Tensor, patch: tuple[int, int]) -> Tensor:
    """Cells of :func:`hog` gathered by patch: ``(batch, T, channels * bins * cells of a patch)``.

    Args:
        cells: ``(batch, channels, bins, rows, columns)``.
        patch: rows and columns of cells in a patch.
    """
    batch, channels, bins, rows, columns = cells.shape
    cut = cells.reshape(batch, channels, bins, rows // patch[0], patch[0], columns // patch[1], patch[1])
    return cut.permute(0, 3, 5, 1, 2, 4, 6).reshape(batch, -1, channels * bins * patch[0] * patch[1])


def _sobel(pixels: Tensor) -> tuple[Tensor, Tensor]:
    padded = F.pad(pixels, (1, 1, 1, 1), mode="reflect")
    # Differences before sums: what cancels, at a reflected border above all, is exactly 0 and falls into one bin.
    x, y = padded[..., :-2] - padded[..., 2:], padded[..., :-2, :] - padded[..., 2:, :]
    return x[..., :-2, :] + 2 * x[..., 1:-1, :] + x[..., 2:, :], y[..., :-2] + 2 * y[..., 1:-1] + y[..., 2:]


def _central(pixels: Tensor) -> tuple[Tensor, Tensor]:
    gx, gy = torch.zeros_like(pixels), torch.zeros_like(pixels)
    gx[..., 1:-1] = pixels[..., 2:] - pixels[..., :-2]
    gy[..., 1:-1, :] = pixels[..., 2:, :] - pixels[..., :-2, :]
    return gx, gy


def _window(side: int, size: tuple[int, int], like: Tensor) -> Tensor:
    """The tiled window, ``size``; it sums to 1 over a tile."""
    place = torch.arange(side, device=like.device, dtype=like.dtype) - (side - 1) / 2
    line = (-place.square() / (2 * (side / 2) ** 2)).exp()
    tile = torch.outer(line, line) / line.sum() ** 2
    repeats = [math.ceil(length / side) for length in size]
    return tile.repeat(*repeats)[: size[0], : size[1]]
