"""Where a view looks: crops, mirror images, rotations, turns, and how pixels are sampled there.

Coordinates are those of :func:`torch.nn.functional.grid_sample` without aligned corners: pixel i of n covers
``[i / n, (i + 1) / n]``.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from armillary.components.counter import uniforms
from armillary.data.views.recipes import Recipe

_TRIES = 10


def draw(recipe: Recipe, keys: Tensor) -> dict[str, Tensor]:
    """Every sample's ``box (B, 4)``, ``flip (B,)`` in {0, 1} and ``rotation (B,)`` in degrees.

    The box is x0, y0, x1, y1 of what the view shows, as shares of the image's sides, before the rotation around its
    centre; with ``shift`` and ``zoom`` it may reach beyond the image. Crops are drawn as in torchvision's
    RandomResizedCrop: area and ratio up to ten times until the crop fits, then the largest of legal ratio. (There the
    ratio is that of the crop's sides in pixels; relative to the image's it leaves all images equally stretched.)
    """
    cropped = not recipe.crop_scale == recipe.crop_ratio == (1.0, 1.0)
    u = uniforms(keys, 7 + 2 * _TRIES * cropped)
    flip, rotation, zoom, shift_x, shift_y, place_x, place_y = u[:, :7].unbind(1)
    centre_x = 0.5 + (shift_x * 2 - 1) * recipe.shift
    centre_y = 0.5 + (shift_y * 2 - 1) * recipe.shift
    width = height = torch.ones_like(flip)
    if cropped:
        width, height, fits = _crop_sides(recipe, *u[:, 7:].chunk(2, dim=1))
        centre_x = centre_x + (place_x - 0.5) * (1 - width) * fits
        centre_y = centre_y + (place_y - 0.5) * (1 - height) * fits
    scale = 0.5 / (1 + (zoom * 2 - 1) * recipe.zoom)
    half_w, half_h = width * scale, height * scale
    return {
        "box": torch.stack([centre_x - half_w, centre_y - half_h, centre_x + half_w, centre_y + half_h], dim=1),
        "flip": (flip < recipe.flip).to(torch.float32),
        "rotation": (rotation * 2 - 1) * recipe.rotation,
    }


def _crop_sides(recipe: Recipe, area: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Width and height ``(B,)``, shares of the image's, and whether a try fitted.

    ``area`` and ``ratio (B, tries)`` are uniform numbers.
    """
    low, high = (math.log(bound) for bound in recipe.crop_ratio)
    area = area * (recipe.crop_scale[1] - recipe.crop_scale[0]) + recipe.crop_scale[0]
    ratio = (ratio * (high - low) + low).exp()
    sides = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()])
    fits = (sides <= 1).all(dim=0)
    # The first that fits: falling weights make it the only maximum.
    first = (fits * torch.arange(area.shape[1], 0, -1, device=area.device)).argmax(dim=1)
    nearest = min(max(1.0, recipe.crop_ratio[0]), recipe.crop_ratio[1])
    largest = sides.new_tensor([[min(1.0, nearest)], [min(1.0, 1 / nearest)]])
    chosen = sides.gather(2, first.expand(2, -1)[..., None])[..., 0]
    some = fits.any(dim=1)
    width, height = torch.where(some, chosen, largest).unbind(0)
    return width, height, some


def draw_turn(recipe: Recipe, keys: Tensor, view: int) -> dict[str, Tensor]:
    """``rotation_class (B,)`` int64: how many quarter turns counter-clockwise, 0..3."""
    if recipe.turns == "random":
        return {"rotation_class": (uniforms(keys, 1)[:, 0] * 4).long()}
    return {"rotation_class": torch.full_like(keys, view % 4 if recipe.turns == "by_view" else 0)}


def output_size(recipe: Recipe, height: int, width: int) -> tuple[int, int]:
    """Height and width of the view of an image.

    A share below 1 gives a multiple of 4 px, which small patches and pooling divide (of 224 px the usual 96, of 32 12),
    as long as it gives 8 px or more.
    """
    share = recipe.size if recipe.size <= 1 else recipe.size / height
    unit = 4 if recipe.size < 1 and share * min(height, width) >= 8 else 1
    high, wide = (max(1, unit * round(share * side / unit)) for side in (height, width))
    return (min(high, wide), min(high, wide)) if recipe.turns != "none" else (high, wide)


def affine(drawn: dict[str, Tensor], height: int, width: int) -> Tensor:
    """The map from the view's coordinates to the image's (both [-1, 1], x to the right), ``(B, 2, 3)``."""
    x0, y0, x1, y1 = drawn["box"].unbind(1)
    # Rotation mixes x and y, which are scaled by different half-sides.
    aspect = width / height
    angle = drawn["rotation"] * (math.pi / 180)
    cosine, sine = torch.cos(angle), torch.sin(angle)
    half_w, half_h, mirror = x1 - x0, y1 - y0, 1 - 2 * drawn["flip"]
    row_x = torch.stack([half_w * cosine * mirror, -half_h * sine / aspect, x0 + x1 - 1], dim=1)
    row_y = torch.stack([half_w * sine * aspect * mirror, half_h * cosine, y0 + y1 - 1], dim=1)
    return torch.stack([row_x, row_y], dim=1)


def grid(theta: Tensor, height: int, width: int) -> Tensor:
    """The image's coordinates of every pixel of a view of ``height`` x ``width``, ``(B, height, width, 2)``.

    Written out instead of taken from ``affine_grid``, whose batched matrix product is slower and may round differently
    with the size of the batch.
    """
    x = (torch.arange(width, device=theta.device) * 2 + 1) / width - 1
    y = (torch.arange(height, device=theta.device) * 2 + 1) / height - 1
    coordinates = theta.new_empty(len(theta), height, width, 2)
    for axis in range(2):
        along_x = theta[:, axis, 0, None] * x + theta[:, axis, 2, None]
        torch.add(along_x[:, None, :], (theta[:, axis, 1, None] * y)[:, :, None], out=coordinates[..., axis])
    return coordinates


def sample(images: Tensor, drawn: dict[str, Tensor], recipe: Recipe) -> Tensor:
    """The views' pixels, float32 ``(B, C, height, width)`` in [0, 1], of uint8 images ``(B, C, H, W)``.

    Views smaller than their image are averaged over what a pixel covers (as Pillow and torchvision with ``antialias``
    do); so are bicubic ones. Crops that are enlarged or keep their size are bilinear, where that makes no difference,
    and so are rotated ones.
    """
    pixels = images.to(torch.float32).mul_(1 / 255)
    height, width = pixels.shape[-2:]
    size = output_size(recipe, height, width)
    if not recipe.rotation and (size < (height, width) or recipe.interpolation == "bicubic"):
        x0, y0, x1, y1 = drawn["box"].unbind(1)
        mirrored = drawn["flip"] > 0
        left, right = torch.where(mirrored, x1, x0), torch.where(mirrored, x0, x1)
        down = filter_matrix(y0, y1, height, size[0], recipe.interpolation)
        across = filter_matrix(left, right, width, size[1], recipe.interpolation)
        return separable(pixels, down, across).clamp_(0, 1)
    if size == (height, width) and _stays(recipe):
        return pixels
    theta = affine(drawn, height, width)
    return F.grid_sample(pixels, grid(theta, *size), mode="bilinear", padding_mode="border", align_corners=False)


def _stays(recipe: Recipe) -> bool:
    whole = recipe.crop_scale == recipe.crop_ratio == (1.0, 1.0)
    return whole and not (recipe.flip or recipe.rotation or recipe.zoom or recipe.shift)


def central_square(box: Tensor, height: int, width: int) -> Tensor:
    """The largest square around the centre of every box: a turned oblong would show by its shape how it was turned."""
    centre, half = (box[:, 2:] + box[:, :2]) / 2, (box[:, 2:] - box[:, :2]) / 2
    sides = half.new_tensor([width, height])
    half = (half * sides).amin(dim=1, keepdim=True) / sides
    return torch.cat([centre - half, centre + half], dim=1)


def filter_matrix(start: Tensor, end: Tensor, size_in: int, size_out: int, kind: str = "bilinear") -> Tensor:
    """The linear map that resamples one axis of every image, ``(B, size_out, size_in)``; its rows sum to 1.

    Pixel j of the output looks at the j-th of ``size_out`` equal parts of ``[start, end]`` (``(B,)``, shares of the
    side); ``end < start`` mirrors. The filter is the triangle or Catmull-Rom's cubic (a = -0.5, as Pillow's), as wide
    as the larger of an input and an output pixel; beyond the edge it is cut off and scaled up.
    """
    step = (end - start) * (size_in / size_out)
    at = torch.arange(size_out, device=start.device) + 0.5
    centre = start[:, None] * size_in + step[:, None] * at
    inputs = torch.arange(size_in, device=start.device) + 0.5
    # An output pixel that looks beyond the edge sees the border pixel.
    centre = centre.clamp(0, size_in)
    width = step.abs().clamp_min(1)[:, None, None]
    x = ((inputs - centre[..., None]) / width).abs_()
    if kind == "bicubic":
        inner, outer = ((1.5 * x - 2.5) * x * x + 1), (((-0.5 * x + 2.5) * x - 4) * x + 2)
        weights = torch.where(x < 1, inner, torch.where(x < 2, outer, 0.0))
    else:
        weights = (1 - x).clamp_min_(0)
    return weights / weights.sum(dim=2, keepdim=True)


def separable(pixels: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """Maps the columns of every image by ``down (B, h, H)`` and its rows by ``across (B, w, W)``: ``(B, C, h, w)``."""
    batch, channels, height, width = pixels.shape
    rows = torch.bmm(pixels.reshape(batch, channels * height, width), across.transpose(1, 2))
    return torch.matmul(down[:, None], rows.view(batch, channels, height, -1))


def turned(pixels: Tensor, turns: Tensor) -> Tensor:
    """Square images turned counter-clockwise by 90 degrees times ``turns (B,)`` in 0..3; no pixel is interpolated."""
    result = pixels.clone()
    for quarter in range(1, 4):
        rows = (turns == quarter).nonzero()[:, 0]
        result.index_copy_(0, rows, torch.rot90(pixels.index_select(0, rows), quarter, (2, 3)))
    return result
