"""View recipes: random augmentation of whole batches, every parameter drawn per sample.

A view is a pure function of (seed, epoch, sample index, view number) through :mod:`armillary.components.counter`: the same
whatever else is in the batch, on any worker and after a resume. All geometry of a sample is one affine map, sampled
once; all colour changes of a sample are one linear map of its channels.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from armillary.components.counter import key, sample_keys, uniforms, words
from armillary.spec.errors import UserError, nearest, unknown_name

# Rec. 601 luma and the RGB -> YIQ axes (NTSC); a hue shift rotates the plane of I and Q.
_YIQ = ((0.299, 0.587, 0.114), (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135))
_VIEW, _PIXEL_NOISE = 11, 12


@dataclass(frozen=True)
class Recipe:
    """The parameters of a view; jobs override them by name under ``views``.

    Ranges are per sample and uniform: ``rotation`` +-degrees; ``zoom`` and ``shift`` +-share of the scale and of the
    side; ``crop_scale`` share of the area that a random resized crop keeps, ``crop_ratio`` its width over height
    relative to the image's (log-uniform; a side that would exceed the image is cut); ``brightness``, ``contrast``,
    ``saturation`` factors in [1 - x, 1 + x]; ``hue`` +-share of the colour circle. ``flip``, ``jitter_p`` and
    ``gray_p`` are probabilities, ``noise`` the standard deviation of uniform pixel noise (images are in [0, 1]).
    Single-channel images have no saturation, hue and graying.
    """

    flip: float = 0.0
    rotation: float = 0.0
    zoom: float = 0.0
    shift: float = 0.0
    crop_scale: tuple[float, float] = (1.0, 1.0)
    crop_ratio: tuple[float, float] = (1.0, 1.0)
    jitter_p: float = 1.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    gray_p: float = 0.0
    noise: float = 0.0


# Legal bounds of every parameter, inclusive.
_BOUNDS: dict[str, tuple[float, float]] = {
    "flip": (0, 1),
    "rotation": (0, 180),
    "zoom": (0, 0.9),
    "shift": (0, 1),
    "crop_scale": (0.01, 1),
    "crop_ratio": (0.1, 10),
    "jitter_p": (0, 1),
    "brightness": (0, 1),
    "contrast": (0, 1),
    "saturation": (0, 1),
    "hue": (0, 0.5),
    "gray_p": (0, 1),
    "noise": (0, 1),
}

RECIPES: dict[str, Recipe] = {
    "none": Recipe(),
    "faces": Recipe(flip=0.5, rotation=8, zoom=0.08, shift=0.05, brightness=0.2, contrast=0.2, noise=0.02),
    "digits": Recipe(rotation=10, zoom=0.1, shift=0.1, brightness=0.1, contrast=0.1),
    # SimCLR's small-image settings: jitter at strength 0.5 (0.4, 0.4, 0.4, hue 0.1), no blur.
    "simclr": Recipe(
        flip=0.5,
        crop_scale=(0.2, 1.0),
        crop_ratio=(3 / 4, 4 / 3),
        jitter_p=0.8,
        brightness=0.4,
        contrast=0.4,
        saturation=0.4,
        hue=0.1,
        gray_p=0.2,
    ),
    # The same for characters: mirrored ones mean something else, and small crops lose the character.
    "simclr_digits": Recipe(
        crop_scale=(0.4, 1.0), crop_ratio=(3 / 4, 4 / 3), jitter_p=0.8, brightness=0.4, contrast=0.4
    ),
}


def make_views(recipe: str, options: dict[str, Any]) -> Views:
    """The named recipe with some of its parameters changed.

    Raises:
        UserError: no such recipe or parameter (the nearest is shown), or a value out of its range.
    """
    if recipe not in RECIPES:
        raise unknown_name("view recipe", recipe, list(RECIPES), key="views.name")
    known = {item.name for item in fields(Recipe)}
    changes: dict[str, Any] = {}
    for name, value in options.items():
        if name not in known:
            close = nearest(name, known)
            raise UserError(
                f"the view recipe {recipe} has no parameter {name!r}",
                key=f"views.{name}",
                allowed=", ".join(sorted(known)),
                hint=f"did you mean {close[0]!r}?" if close else None,
            )
        changes[name] = _checked(name, value)
    return Views(replace(RECIPES[recipe], **changes), recipe)


def _checked(name: str, value: Any) -> float | tuple[float, float]:
    low, high = _BOUNDS[name]
    is_range = name in ("crop_scale", "crop_ratio")
    numbers = list(value) if is_range and isinstance(value, (list, tuple)) else [value]
    plain = all(isinstance(item, (int, float)) and not isinstance(item, bool) for item in numbers)
    legal = plain and len(numbers) == (2 if is_range else 1) and all(low <= item <= high for item in numbers)
    if not legal or numbers != sorted(numbers):
        allowed = f"[low, high] within {low:g}..{high:g}" if is_range else f"a number in {low:g}..{high:g}"
        raise UserError(f"found {value!r}", key=f"views.{name}", allowed=allowed)
    return (float(numbers[0]), float(numbers[1])) if is_range else float(numbers[0])


class Views:
    """A recipe ready to be applied."""

    def __init__(self, recipe: Recipe, name: str) -> None:
        self.recipe, self.name = recipe, name

    def describe(self) -> dict[str, Any]:
        """The parameters as plain values, for the record of a run."""
        return {"name": self.name, **asdict(self.recipe)}

    def __call__(self, images: Tensor, index: Tensor, *, seed: int, epoch: int, view: int) -> Tensor:
        """One view of every image.

        Args:
            images: uint8 ``(B, C, H, W)``, C 1 or 3.
            index: ``(B,)`` int64 positions in the dataset, on the same device.
            seed: the run's seed.
            epoch: counted from 0.
            view: which of the objective's views, from 0.

        Returns:
            float32 ``(B, C, H, W)`` in [0, 1], on the images' device.
        """
        pixels = images.to(torch.float32).mul_(1 / 255)
        keys = sample_keys(key(_VIEW, seed, epoch, view), index)
        drawn = self.parameters(keys)
        recipe = self.recipe
        cropped = min(recipe.crop_scale + recipe.crop_ratio) < 1 or max(recipe.crop_ratio) > 1
        if recipe.flip or recipe.rotation or recipe.zoom or recipe.shift or cropped:
            pixels = _warp(pixels, self.geometry(drawn, images.shape[-2], images.shape[-1]))
        pixels = _colour(pixels, drawn, recipe)
        if recipe.noise:
            pixels = pixels.add_(_noise(keys, pixels[0].numel()).reshape(pixels.shape), alpha=recipe.noise)
        return pixels.clamp_(0, 1)

    def parameters(self, keys: Tensor) -> dict[str, Tensor]:
        """Every sample's draw, ``(B,)`` each; ``flip``, ``jitter`` and ``gray`` are 0 or 1."""
        recipe = self.recipe
        u = iter(uniforms(keys, 15).unbind(1))

        def between(low: float, high: float) -> Tensor:
            return next(u) * (high - low) + low

        def happens(probability: float) -> Tensor:
            return (next(u) < probability).to(torch.float32)

        return {
            "flip": happens(recipe.flip),
            "rotation": between(-recipe.rotation, recipe.rotation),
            "zoom": between(1 - recipe.zoom, 1 + recipe.zoom),
            "shift_x": between(-recipe.shift, recipe.shift),
            "shift_y": between(-recipe.shift, recipe.shift),
            "area": between(*recipe.crop_scale),
            "ratio": between(math.log(recipe.crop_ratio[0]), math.log(recipe.crop_ratio[1])).exp(),
            "crop_x": between(-1, 1),
            "crop_y": between(-1, 1),
            "jitter": happens(recipe.jitter_p),
            "brightness": between(1 - recipe.brightness, 1 + recipe.brightness),
            "contrast": between(1 - recipe.contrast, 1 + recipe.contrast),
            "saturation": between(1 - recipe.saturation, 1 + recipe.saturation),
            "hue": between(-recipe.hue, recipe.hue),
            "gray": happens(recipe.gray_p),
        }

    def geometry(self, drawn: dict[str, Tensor], height: int, width: int) -> Tensor:
        """The map from output to input coordinates ([-1, 1], x to the right), ``(B, 2, 3)``."""
        # Rotation mixes x and y, which are scaled by different half-sides.
        aspect = width / height
        angle = drawn["rotation"] * (math.pi / 180)
        cosine, sine = torch.cos(angle) / drawn["zoom"], torch.sin(angle) / drawn["zoom"]
        crop_w = (drawn["area"] * drawn["ratio"]).sqrt().clamp(max=1)
        crop_h = (drawn["area"] / drawn["ratio"]).sqrt().clamp(max=1)
        mirror = 1 - 2 * drawn["flip"]
        centre_x = drawn["crop_x"] * (1 - crop_w) + 2 * drawn["shift_x"]
        centre_y = drawn["crop_y"] * (1 - crop_h) + 2 * drawn["shift_y"]
        row_x = torch.stack([crop_w * cosine * mirror, -crop_h * sine / aspect, centre_x], dim=1)
        row_y = torch.stack([crop_w * sine * aspect * mirror, crop_h * cosine, centre_y], dim=1)
        return torch.stack([row_x, row_y], dim=1)


def _warp(pixels: Tensor, theta: Tensor) -> Tensor:
    """Samples every image through its affine map, bilinear; beyond the edge its border pixels go on.

    The grid is written out instead of taken from ``affine_grid``, whose batched matrix product is slower and may round
    differently with the size of the batch.
    """
    batch, _, height, width = pixels.shape
    x = (torch.arange(width, device=pixels.device) * 2 + 1) / width - 1
    y = (torch.arange(height, device=pixels.device) * 2 + 1) / height - 1
    grid = pixels.new_empty(batch, height, width, 2)
    for axis in range(2):
        along_x = theta[:, axis, 0, None] * x + theta[:, axis, 2, None]
        torch.add(along_x[:, None, :], (theta[:, axis, 1, None] * y)[:, :, None], out=grid[..., axis])
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _colour(pixels: Tensor, drawn: dict[str, Tensor], recipe: Recipe) -> Tensor:
    """Brightness, contrast (around the mean luma), saturation, hue and graying, in this order, as one linear map."""
    if not (recipe.brightness or recipe.contrast or recipe.saturation or recipe.hue or recipe.gray_p):
        return pixels
    on = drawn["jitter"]
    gain, contrast = (1 + on * (drawn[name] - 1) for name in ("brightness", "contrast"))
    channels = pixels.shape[1]
    means = pixels.mean(dim=(2, 3))
    if channels != 3:
        offset = (1 - contrast)[:, None] * gain[:, None] * means.mean(dim=1, keepdim=True)
        return pixels * (gain * contrast)[:, None, None, None] + offset[:, :, None, None]
    to_yiq = pixels.new_tensor(_YIQ)
    luma = (means * to_yiq[0]).sum(1)
    # In YIQ saturation scales the plane of I and Q and hue rotates it; gray drops it.
    chroma = (1 + on * (drawn["saturation"] - 1)) * (1 - drawn["gray"])
    angle = on * drawn["hue"] * (2 * math.pi)
    cosine, sine = chroma * angle.cos(), chroma * angle.sin()
    zero, one = torch.zeros_like(on), torch.ones_like(on)
    turn = torch.stack([one, zero, zero, zero, cosine, -sine, zero, sine, cosine], dim=1).view(-1, 3, 3)
    matrix = torch.linalg.inv(to_yiq) @ turn @ to_yiq * (gain * contrast)[:, None, None]
    offset = (1 - contrast) * gain * luma
    mapped = torch.einsum("bij,bjhw->bihw", matrix, pixels)
    return mapped + offset[:, None, None, None]


def _noise(keys: Tensor, size: int) -> Tensor:
    """Uniform noise of mean 0 and variance 1, ``(B, size)``: four 16-bit numbers of every 64-bit hash."""
    raw = words(sample_keys(key(_PIXEL_NOISE), keys), -(-size // 4)).view(torch.int16)[:, :size]
    return raw.to(torch.float32).add_(0.5).mul_(math.sqrt(3) / 32768)
