"""Loss of detail: Gaussian blur, low resolution."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from armillary.components.counter import uniforms
from armillary.data.views.colour import noise
from armillary.data.views.geometry import filter_matrix, separable
from armillary.data.views.recipes import Recipe

# The kernel reaches this many standard deviations: 99.7 % of its mass.
REACH = 3.0


def draw_blur(recipe: Recipe, keys: Tensor) -> dict[str, Tensor]:
    """``blur_sigma (B,)`` in pixels, 0 where there is no blur."""
    if not recipe.blur:
        return {"blur_sigma": torch.zeros(len(keys), device=keys.device)}
    u = uniforms(keys, 2)
    low, high = recipe.blur_sigma
    return {"blur_sigma": (u[:, 0] < recipe.blur) * (u[:, 1] * (high - low) + low)}


def gaussian_blur(pixels: Tensor, sigma: Tensor) -> Tensor:
    """Every image blurred with its own ``sigma (B,)`` > 0 in pixels; edges are mirrored.

    Kernels reach :data:`REACH` sigmas, and less where the image is smaller. Every step adds two opposite taps of all
    samples; shorter kernels than the longest are filled up with zeros. (A grouped convolution takes as long once it is
    compiled, but oneDNN compiles it anew for every number of samples.)
    """
    radius = max(1, math.ceil(REACH * float(sigma.max())))
    for axis in (2, 3):
        side = pixels.shape[axis]
        reach = min(radius, side - 1)
        taps = torch.arange(reach + 1, device=pixels.device)[:, None]
        kernel = torch.exp(-0.5 * (taps / sigma) ** 2) * (taps <= (sigma * REACH).ceil())
        kernel = (kernel / (2 * kernel.sum(dim=0) - kernel[0])).view(reach + 1, -1, 1, 1, 1)
        padding = (0, 0, reach, reach) if axis == 2 else (reach, reach, 0, 0)
        padded = F.pad(pixels, padding, mode="reflect") if reach else pixels
        pixels = padded.narrow(axis, reach, side) * kernel[0]
        for tap in range(1, reach + 1):
            pixels.addcmul_(
                padded.narrow(axis, reach - tap, side) + padded.narrow(axis, reach + tap, side), kernel[tap]
            )
    return pixels


def draw_resolution(recipe: Recipe, keys: Tensor) -> dict[str, Tensor]:
    """``low_res_factor (B,)``, log-uniform; 1 leaves the image as it is."""
    low, high = (math.log(bound) for bound in recipe.low_res)
    return {"low_res_factor": (uniforms(keys, 1)[:, 0] * (high - low) + low).exp()}


def low_resolution(pixels: Tensor, factor: Tensor, keys: Tensor, deviation: float) -> Tensor:
    """Every image made smaller by its own ``factor (B,)`` >= 1, then brought back to its size.

    The small image has ``round(side / factor)`` pixels a side, at least 1, each an average of what it covers; noise of
    the given standard deviation is added there; enlarging is bilinear. ``keys (B,)`` seed the noise.
    """
    height, width = pixels.shape[-2:]
    (shrink_h, grow_h), (shrink_w, grow_w) = (_shrink_and_grow(side, factor) for side in (height, width))
    small = separable(pixels, shrink_h, shrink_w)
    if deviation:
        # Every place of the full image has its noise, so that none depends on how large the largest small image is.
        everywhere = noise(keys, pixels[0].numel()).view(pixels.shape)
        small = small.add_(everywhere[..., : small.shape[2], : small.shape[3]], alpha=deviation).clamp_(0, 1)
    return separable(small, grow_h, grow_w)


def _shrink_and_grow(side: int, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Maps ``(B, most, side)`` and ``(B, side, most)``; a sample uses ``round(side / factor)`` of ``most``."""
    count = (side / factor).round().clamp(1, side)
    most = int(count.max())
    zero = torch.zeros_like(factor)
    # Stretching the axis to most / count sides puts the sample's last small pixel at the image's end.
    shrink = filter_matrix(zero, most / count, side, most)
    used = torch.arange(most, device=factor.device) < count[:, None]
    at = (torch.arange(side, device=factor.device) + 0.5) * (count[:, None] / side)
    at = at.clamp(min=0.5).minimum(count[:, None] - 0.5)
    small = torch.arange(most, device=factor.device) + 0.5
    grow = (1 - (small - at[..., None]).abs()).clamp_min(0)
    return shrink * used[..., None], grow
