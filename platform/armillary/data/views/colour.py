"""Colour: jitter as torchvision defines it, gray, solarization, noise.

Images are float32 ``(B, C, H, W)`` in [0, 1]. Brightness, contrast and saturation are linear maps of the channels, so
that one batched matrix product does whichever of them each sample has next.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from armillary.components.counter import key, sample_keys, uniforms, words
from armillary.data.views.recipes import Recipe

# Rec. 601 luma, with the digits that Pillow and torchvision use.
LUMA = (0.2989, 0.587, 0.114)
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)
_FACTORS = ("brightness", "contrast", "saturation")
_PIXEL_NOISE = 12


def draw(recipe: Recipe, keys: Tensor) -> dict[str, Tensor]:
    """Every sample's draw, ``(B,)`` each: what is applied, so factors are 1 and the hue 0 where the jitter is off.

    ``jitter``, ``gray`` and ``solarize`` are 0 or 1; ``order (B, 4)`` is the order of brightness (0), contrast (1),
    saturation (2) and hue (3), all 24 equally likely.
    """
    u = uniforms(keys, 11)
    jitter = (u[:, 0] < recipe.jitter_p).to(torch.float32)
    drawn = {"jitter": jitter, "order": u[:, 1:5].argsort(dim=1, stable=True)}
    for column, name in enumerate(_FACTORS, start=5):
        strength = getattr(recipe, name)
        drawn[name] = 1 + jitter * (u[:, column] * 2 - 1) * strength
    drawn["hue"] = jitter * (u[:, 8] * 2 - 1) * recipe.hue
    drawn["gray"] = (u[:, 9] < recipe.gray_p).to(torch.float32)
    drawn["solarize"] = (u[:, 10] < recipe.solarize).to(torch.float32)
    return drawn


def linear_operations(recipe: Recipe, channels: int) -> list[int]:
    """Which of brightness, contrast and saturation the recipe changes; one channel has no saturation."""
    names = _FACTORS if channels == 3 else _FACTORS[:2]
    return [number for number, name in enumerate(names) if recipe.jitter_p and getattr(recipe, name)]


def turns_hue(recipe: Recipe, channels: int) -> bool:
    """Whether the recipe changes the hue; one channel has none."""
    return bool(recipe.jitter_p and recipe.hue and channels == 3)


def stages(drawn: dict[str, Tensor], recipe: Recipe, channels: int) -> Tensor:
    """After how many linear operations each sample's hue is turned; one more than there are without jitter."""
    operations = linear_operations(recipe, channels)
    order = drawn["order"]
    # Where each operation stands in the order, (B, 4).
    place = order.argsort(dim=1)
    stage = (place[:, operations] < place[:, _HUE:]).sum(dim=1)
    return torch.where(drawn["jitter"] > 0, stage, len(operations) + 1)


def jitter(pixels: Tensor, drawn: dict[str, Tensor], recipe: Recipe, counts: list[int]) -> Tensor:
    """Brightness, contrast, saturation and hue in each sample's own order, cut off to [0, 1] after each.

    Args:
        pixels: sorted by :func:`stages`; may be overwritten.
        drawn: what :func:`draw` gave, in the same order.
        recipe: of the view.
        counts: how many samples each stage has, from 0 on; the last are those without jitter.
    """
    batch, channels = pixels.shape[:2]
    operations, active = linear_operations(recipe, channels), sum(counts[:-1])
    if not active:
        return pixels
    matrices, towards_mean = _linear_maps(drawn, operations, active, channels)
    luma = _luma(pixels)
    flat = pixels.view(batch, channels, -1)
    work = flat[:active]
    spare = torch.empty_like(work)
    end = 0
    for step in range(len(operations) + 1):
        rows, end = slice(end, end + counts[step]), end + counts[step]
        if counts[step] and turns_hue(recipe, channels):
            _turn_hue(work[rows], drawn["hue"][rows])
        if step < len(operations):
            offset = (work.mean(dim=2) @ luma).mul_(towards_mean[:, step])[:, None, None]
            torch.baddbmm(offset, matrices[:, step], work, out=spare).clamp_(0, 1)
            work, spare = spare, work
    if work.data_ptr() != flat.data_ptr():
        flat[:active] = work
    return pixels


def _linear_maps(drawn: dict[str, Tensor], operations: list[int], active: int, channels: int) -> tuple[Tensor, Tensor]:
    """Each sample's linear operations in its own order, ``factor * pixel + (1 - factor) * (0, mean luma or luma)``.

    Returns:
        Maps of the channels ``(active, len(operations), C, C)``, and the share of the image's mean luma that is added,
        ``(active, len(operations))``.
    """
    order = drawn["order"][:active]
    # What the recipe leaves alone, and the hue, go to the end.
    used = order.new_tensor([int(number in operations) for number in range(4)])[order]
    linear = order.gather(1, used.argsort(dim=1, descending=True, stable=True)[:, : len(operations)])
    factors = torch.stack([drawn[name][:active] for name in _FACTORS], dim=1).gather(1, linear)
    rest = 1 - factors
    matrices = factors[..., None, None] * torch.eye(channels, device=factors.device)
    if channels == 3 and _SATURATION in operations:
        luma = factors.new_tensor(LUMA)
        matrices = torch.addcmul(matrices, (rest * (linear == _SATURATION))[..., None, None], luma)
    return matrices, rest * (linear == _CONTRAST)


def _luma(pixels: Tensor) -> Tensor:
    channels = pixels.shape[1]
    return pixels.new_tensor(LUMA) if channels == 3 else pixels.new_full((channels,), 1 / channels)


def _turn_hue(flat: Tensor, shift: Tensor) -> None:
    """Turns the hue of HSV, value and saturation kept, in place; ``flat (n, 3, pixels)``, ``shift (n,)`` in turns.

    With p the channels' share of the way from the least to the largest, the hue in sixths of a turn, counted from red
    from -3 to 3, is ``1 + p_g + p_b - p_r`` with the sign of g - b. Back, a channel is at full height within one sixth
    of its own hue and at none beyond two.
    """
    red, green, blue = flat.unbind(1)
    least = torch.minimum(torch.minimum(red, green), blue)
    chroma = torch.maximum(torch.maximum(red, green), blue).sub_(least)
    hue = (green + blue).sub_(red).sub_(least)
    # Gray pixels have no hue: any will do, since their chroma is 0.
    hue.div_(chroma.clamp_min(1e-12)).add_(1)
    hue.copysign_(green - blue).add_((shift * 6)[:, None])
    hue.sub_(torch.round(hue * (1 / 6)).mul_(6))
    for channel, turn in ((red, None), (green, 1), (blue, -1)):
        # Distance to the channel's own hue (0, 2 and -2), the short way round.
        away = hue.abs() if turn is None else (hue + turn).abs_().sub_(3).abs_()
        height = away.neg_().add_(2).clamp_(0, 1)
        torch.addcmul(least, chroma, height, out=channel)


def gray(pixels: Tensor, rows: Tensor) -> None:
    """Replaces the samples in ``rows`` by their luma, in place."""
    if pixels.shape[1] == 3 and len(rows):
        chosen = pixels.index_select(0, rows)
        luma = LUMA[0] * chosen[:, 0] + LUMA[1] * chosen[:, 1] + LUMA[2] * chosen[:, 2]
        pixels.index_copy_(0, rows, luma[:, None].expand_as(chosen))


def solarize(pixels: Tensor, rows: Tensor, threshold: float) -> None:
    """Inverts the values of the samples in ``rows`` that are at least ``threshold``, in place."""
    if len(rows):
        chosen = pixels.index_select(0, rows)
        pixels.index_copy_(0, rows, torch.where(chosen >= threshold, 1 - chosen, chosen))


def noise(keys: Tensor, size: int) -> Tensor:
    """Uniform noise of mean 0 and variance 1, ``(B, size)``: four 16-bit numbers of every 64-bit hash."""
    raw = words(sample_keys(key(_PIXEL_NOISE), keys), -(-size // 4)).view(torch.int16)[:, :size]
    return raw.to(torch.float32).add_(0.5).mul_(math.sqrt(3) / 32768)
