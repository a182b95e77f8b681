"""Blur, low resolution and noise, and the quality that is left.

Blur and resolution are one symmetric operation on rows and columns, ``M X M^T``. The entries of M are whole 256ths that
sum to 1 in every row, and the pixels are whole grey levels: all sums are whole numbers below 2^24, exact in float32 in
whatever order a matrix product adds them.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from armillary.data.identities.people import Floats
from armillary.data.identities.scene import Scenes

_UNIT = 256
_TABLE = 2**20


@lru_cache(maxsize=512)
def _operator(size: int, resolution: int, blur: float) -> Floats:
    """``size x size``: Gaussian blur of ``blur * size`` pixels, means over ``resolution`` cells, linear upsampling."""
    at = np.arange(size, dtype=np.float64)
    matrix = np.eye(size)
    if blur > 0:
        matrix = np.exp(-0.5 * ((at[:, None] - at[None, :]) / (blur * size)) ** 2)
        matrix /= matrix.sum(axis=1, keepdims=True)
    if resolution < size:
        # Overlap of every cell with every pixel.
        cell = np.arange(resolution, dtype=np.float64)[:, None] * (size / resolution)
        overlap = np.minimum(cell + size / resolution, at + 1) - np.maximum(cell, at)
        down = np.clip(overlap, 0, None) * (resolution / size)
        place = np.clip((at + 0.5) * (resolution / size) - 0.5, 0, resolution - 1)
        up = np.clip(1 - np.abs(place[:, None] - np.arange(resolution)[None, :]), 0, None)
        matrix = up @ down @ matrix
    whole = np.rint(matrix * _UNIT)
    # What rounding took from a row goes to its largest entry.
    whole[np.arange(size), whole.argmax(axis=1)] += _UNIT - whole.sum(axis=1)
    return whole.astype(np.float32)


@lru_cache(maxsize=1)
def _noise_table() -> Floats:
    """A fixed stretch of standard normal numbers; pictures read from places of their own."""
    return np.random.Generator(np.random.Philox(7)).standard_normal(2 * _TABLE, dtype=np.float32)


def degrade(color: Floats, scenes: Scenes, size: int, channels: int) -> NDArray[np.uint8]:
    """Applies what the scenes say and rounds to grey levels.

    Args:
        color: ``(3, n, size * size)``, 0 black, 1 white; changed.
        scenes: the n scenes.
        size: pixels a side.
        channels: 1 (luma of ITU-R BT.601) or 3.

    Returns:
        uint8 ``(n, size, size, channels)``.
    """
    if channels == 1:
        color = (0.299 * color[:1] + 0.587 * color[1:2] + 0.114 * color[2:]).astype(np.float32)
    color *= 255
    np.rint(np.clip(color, 0, 255, out=color), out=color)
    filtered = np.flatnonzero((scenes.blur > 0) | (scenes.resolution < size))
    if len(filtered):
        pairs = zip(scenes.resolution[filtered].tolist(), scenes.blur[filtered].tolist(), strict=True)
        operators = np.stack([_operator(size, resolution, blur) for resolution, blur in pairs])
        pixels = color[:, filtered].reshape(channels, len(filtered), size, size)
        pixels = np.matmul(np.matmul(operators, pixels), operators.transpose(0, 2, 1))
        pixels *= 1 / _UNIT**2
        color[:, filtered] = pixels.reshape(channels, len(filtered), -1)
    color += _grain(scenes, size * size, channels)
    color += 0.5
    np.clip(color, 0, 255, out=color)
    images = color.astype(np.uint8).transpose(1, 2, 0)
    return np.ascontiguousarray(images).reshape(len(scenes.yaw), size, size, channels)


def _grain(scenes: Scenes, pixels: int, channels: int) -> Floats:
    """Independent noise for every value, ``(channels, n, pixels)`` in grey levels."""
    table = np.lib.stride_tricks.sliding_window_view(_noise_table(), channels * pixels)
    rows = table[scenes.grain % _TABLE].reshape(-1, channels, pixels)
    rows *= (255 * scenes.noise)[:, None, None]
    return rows.transpose(1, 0, 2)


def quality(scenes: Scenes, size: int) -> Floats:
    """What the degradations left, in [0, 1], ``(n,)``: a product of one factor each.

    - resolution: the square root of ``resolution / size``;
    - blur: ``1 / (1 + (sigma / 0.03)^2)``, sigma in shares of the side;
    - noise: ``1 / (1 + (sigma / 0.1)^2)``, sigma in shares of the grey range;
    - light: the intensity, where it is below 1;
    - occlusion: 0.65 under a mask.

    Pose and expression do not count: they are no degradations of the picture.
    """
    sharp = 1 / (1 + (scenes.blur / 0.03) ** 2)
    clean = 1 / (1 + (scenes.noise / 0.1) ** 2)
    lit = np.minimum(scenes.intensity, 1)
    shown = np.where(scenes.masked, 0.65, 1.0)
    return (np.sqrt(scenes.resolution / size) * sharp * clean * lit * shown).astype(np.float32)
