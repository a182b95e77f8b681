"""What hides a part of the image: rectangles, and masks over the lower half of a face."""

from __future__ import annotations

import torch
from torch import Tensor

from armillary.components.counter import uniforms
from armillary.data.views.recipes import Recipe

# Cloth that is worn: surgical blue and green, white, black, gray, and two that are not medical.
_CLOTH = (
    (0.55, 0.75, 0.86),
    (0.60, 0.82, 0.72),
    (0.93, 0.93, 0.92),
    (0.10, 0.10, 0.12),
    (0.52, 0.52, 0.54),
    (0.20, 0.25, 0.48),
    (0.72, 0.30, 0.34),
)


def draw(recipe: Recipe, keys: Tensor) -> dict[str, Tensor]:
    """``cutout (B, 4)``, x0, y0, x1, y1 in the view (all 0 without), and the mask: ``face_mask (B,)`` 0 or 1.

    ``mask_shape (B, 5)``: height of the upper edge at the sides and at the nose, half the width, depth of the chin, and
    how square the chin is; ``mask_colour (B, 3)`` in [0, 1].
    """
    u = uniforms(keys, 16)
    low, high = recipe.cutout_scale
    area, stretch = u[:, 1] * (high - low) + low, torch.exp2(u[:, 2] * 2 - 1)
    width, height = (area * stretch).sqrt().clamp(max=1), (area / stretch).sqrt().clamp(max=1)
    x0, y0 = u[:, 3] * (1 - width), u[:, 4] * (1 - height)
    on = (u[:, 0] < recipe.cutout).to(torch.float32)[:, None]
    cloth = u.new_tensor(_CLOTH)[(u[:, 6] * len(_CLOTH)).long()]
    shape_low, shape_high = u.new_tensor([0.52, 0.42, 0.30, 0.90, 2.0]), u.new_tensor([0.60, 0.50, 0.40, 1.0, 4.0])
    return {
        "cutout": torch.stack([x0, y0, x0 + width, y0 + height], dim=1) * on,
        "face_mask": (u[:, 5] < recipe.face_mask).to(torch.float32),
        "mask_shape": u[:, 7:12] * (shape_high - shape_low) + shape_low,
        "mask_colour": (cloth + (u[:, 12:15] - 0.5) * 0.12).clamp(0, 1),
    }


def cut_out(pixels: Tensor, boxes: Tensor) -> None:
    """Fills each sample's box ``(B, 4)`` (shares of the sides) with middle gray, in place."""
    height, width = pixels.shape[-2:]
    x = (torch.arange(width, device=pixels.device) + 0.5) / width
    y = (torch.arange(height, device=pixels.device) + 0.5) / height
    x0, y0, x1, y1 = (edge[:, None] for edge in boxes.unbind(1))
    inside = ((y >= y0) & (y < y1))[:, :, None] & ((x >= x0) & (x < x1))[:, None, :]
    pixels.masked_fill_(inside[:, None], 0.5)


def mask_region(shape: Tensor, coordinates: Tensor) -> Tensor:
    """Where the mask lies, bool ``(B, 1, h, w)``.

    Args:
        shape: ``mask_shape`` of :func:`draw`.
        coordinates: the image's coordinates of every pixel, ``(B, h, w, 2)`` in [-1, 1], as of
            :func:`armillary.data.views.geometry.grid`: the mask sits on the face, however the view is cropped.
    """
    side, nose, half_width, chin, square = (value[:, None, None] for value in shape.unbind(1))
    x, y = coordinates[..., 0] / 2, (coordinates[..., 1] + 1) / 2
    across = (x.abs() / half_width).clamp(max=1)
    # The upper edge rises from the cheeks to the bridge of the nose; the lower one is a superellipse around the chin.
    upper = side - (side - nose) * (1 - across * across)
    lower = side + (chin - side) * (1 - across**square) ** (1 / square)
    return ((x.abs() < half_width) & (y > upper) & (y < lower))[:, None]


def draw_mask(pixels: Tensor, region: Tensor, colour: Tensor, coordinates: Tensor) -> None:
    """Paints ``colour (B, 3)`` over ``region``, darker to the sides and in three folds across, in place."""
    x, y = coordinates[..., 0] / 2, (coordinates[..., 1] + 1) / 2
    folds = torch.cos(y * 75).gt(0.9).to(torch.float32)
    shade = (1 - 0.9 * x * x - 0.12 * folds)[:, None]
    if pixels.shape[1] != 3:
        colour = colour.mean(dim=1, keepdim=True).expand(-1, pixels.shape[1])
    torch.where(region, (colour[:, :, None, None] * shade).clamp(0, 1), pixels, out=pixels)
