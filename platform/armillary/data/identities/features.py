"""What lies on the skin, painted as soft ellipses and bands in the coordinates of the skull's unit sphere.

So everything turns with the head. Left and right are one evaluation in |x|.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from armillary.data.identities.canvas import Canvas, above, below, ellipse
from armillary.data.identities.geometry import Hit
from armillary.data.identities.people import Floats, Traits
from armillary.data.identities.scene import MASKS, Scenes

_INSIDE_MOUTH = np.array([0.20, 0.06, 0.06], dtype=np.float32)
_WHITE = np.array([0.95, 0.94, 0.92], dtype=np.float32)
_DARK = np.array([0.04, 0.03, 0.03], dtype=np.float32)


@dataclass(frozen=True)
class Skin:
    """Where the pictures show the skull's front.

    ``hit`` is the skull's; ``x`` is ``|hit.x|`` and ``front`` 1 on the front half and 0 elsewhere, ``(n, pixels)``;
    ``soft`` is the inverse of a pixel's breadth on the head, ``(n,)``.
    """

    hit: Hit
    x: Floats
    front: Floats
    soft: Floats


def paint_features(canvas: Canvas, skin: Skin, traits: Traits, scenes: Scenes) -> None:
    """Eyes, mole, beard, mouth and mask."""
    _eyes(canvas, skin, traits, scenes)
    _mole(canvas, skin, traits)
    _beard(canvas, skin, traits)
    _mouth(canvas, skin, traits, scenes)
    if scenes.masked.any():
        _mask(canvas, skin, scenes)


def _eyes(canvas: Canvas, skin: Skin, traits: Traits, scenes: Scenes) -> None:
    """Sockets, whites, irises, pupils, lids and brows."""
    reach = traits.eye_y[:, None]
    where = (skin.hit.y > reach - 0.28) & (skin.hit.y < reach + 0.42) & (skin.x < 0.72) & (skin.front > 0)
    zone = canvas.zone(where)
    of, x, y, front, soft = zone.of, *(zone.pick(part) for part in (skin.x, skin.hit.y, skin.front)), zone.of(skin.soft)
    x0, y0 = of(traits.eye_x), of(traits.eye_y)
    zone.darken(below(ellipse(x, y, x0, y0 + 0.05, x0 * 0.72, x0 * 0.58), 1.0, 1.0) * front, 0.25)
    # The outer corner is higher or lower than the inner one.
    level = y - (x - x0) * of(traits.eye_tilt)
    tall = of(traits.eye_height * (1 - 0.25 * np.maximum(scenes.smile, 0) + 0.2 * scenes.brow_raise))
    almond = ellipse(x, level, x0, y0, of(traits.eye_width), tall)
    lid = below(np.abs(almond - 1.15), 0.5, 3.0) * above(level, y0 + tall * 0.15, soft) * front
    white = below(almond, 1.0, tall * soft) * front
    zone.paint(white, zone.tint(_WHITE))
    ring = ellipse(x, y, x0, y0 + 0.005, of(traits.iris_size * 1.25), of(traits.iris_size))
    zone.paint(below(ring, 1.0, 2.0) * white, zone.tint(traits.iris))
    zone.paint(np.maximum(below(ring, 0.42, 3.0) * white, lid), zone.tint(_DARK))
    raised = y0 + of(traits.brow_y + 0.045 * scenes.brow_raise)
    thick = of(traits.brow_thickness)
    level = y - (x - x0) * of(traits.brow_slope)
    brow = below(ellipse(x, level, x0, raised, of(traits.brow_width), thick), 1.0, np.minimum(thick * soft * 2, 2))
    zone.paint(brow * front * np.float32(0.92), zone.tint(traits.hair * np.float32(0.55)))
    zone.put_back(canvas)


def _mole(canvas: Canvas, skin: Skin, traits: Traits) -> None:
    x0, y0 = traits.mole_x[:, None], traits.mole_y[:, None]
    where = (np.abs(skin.hit.x - x0) < 0.08) & (np.abs(skin.hit.y - y0) < 0.06) & (traits.mole[:, None] > 0)
    zone = canvas.zone(where & (skin.front > 0))
    size = np.full_like(zone.light, 0.055)
    x, y = zone.pick(skin.hit.x), zone.pick(skin.hit.y)
    spot = below(ellipse(x, y, zone.of(traits.mole_x), zone.of(traits.mole_y), size * 1.4, size), 1.0, 2.0)
    zone.darken(spot * zone.pick(skin.front), zone.of(traits.mole))
    zone.put_back(canvas)


def _beard(canvas: Canvas, skin: Skin, traits: Traits) -> None:
    """All below a line that rises towards the ears, moustache included; the lips come over it."""
    zone = canvas.zone((skin.hit.y < traits.beard_top[:, None] + 0.55) & (traits.beard[:, None] > 0) & (skin.front > 0))
    x, y = zone.pick(skin.x), zone.pick(skin.hit.y)
    alpha = below(y - x * x * np.float32(0.55), zone.of(traits.beard_top), 7.0) * zone.pick(skin.hit.cover)
    alpha *= above(zone.pick(skin.hit.depth), 0.05, 5.0)
    zone.paint(alpha * zone.of(traits.beard), zone.tint(traits.hair * np.float32(0.8)))
    zone.put_back(canvas)


def _mouth(canvas: Canvas, skin: Skin, traits: Traits, scenes: Scenes) -> None:
    """Lips, and between them the dark, or upper teeth when a smile is open."""
    reach = traits.mouth_y[:, None]
    where = (skin.hit.y > reach - 0.28) & (skin.hit.y < reach + 0.28) & (skin.x < 0.55) & (skin.front > 0)
    zone = canvas.zone(where)
    of, x, y, front, soft = zone.of, *(zone.pick(part) for part in (skin.x, skin.hit.y, skin.front)), zone.of(skin.soft)
    wide, lip, smile = of(traits.mouth_width * (1 + 0.22 * scenes.smile)), of(traits.lip), of(scenes.smile)
    # A smile lifts the corners and lowers the middle.
    bent = x / wide
    y = y - smile * (bent * bent * np.float32(0.11) - np.float32(0.035))
    drop = of(0.095 * scenes.mouth_open)
    middle = of(traits.mouth_y) - drop * np.float32(0.6)
    lips = below(ellipse(x, y, 0.0, middle, wide, lip + drop), 1.0, np.minimum(lip * soft * 2, 4)) * front
    zone.paint(lips, zone.tint(traits.lip_color))
    inner = drop + np.float32(0.020)
    gap = below(ellipse(x, y, 0.0, middle, wide * np.float32(0.88), inner), 1.0, np.minimum(inner * soft * 2, 3)) * lips
    zone.paint(gap, zone.tint(_INSIDE_MOUTH))
    teeth = of(np.minimum(scenes.mouth_open * 4, 1) * np.clip(scenes.smile * 3, 0, 1))
    zone.paint(gap * above(y, middle - drop * np.float32(0.1), soft) * teeth, zone.tint(_WHITE))
    zone.put_back(canvas)


def _mask(canvas: Canvas, skin: Skin, scenes: Scenes) -> None:
    """A surgical mask over nose, mouth and chin, with two folds."""
    zone = canvas.zone((skin.hit.y < 0) & scenes.masked[:, None] & (skin.front > 0))
    x, y, soft = zone.pick(skin.x), zone.pick(skin.hit.y), zone.of(skin.soft)
    alpha = below(y + x * x * np.float32(0.22), -0.08, soft) * below(x, 0.86, soft) * zone.pick(skin.front)
    zone.paint(alpha, zone.tint(MASKS[scenes.mask_color]))
    folds = np.abs(np.abs(y + np.float32(0.45)) - np.float32(0.12))
    zone.darken(below(folds, 0.04, 25.0) * alpha, 0.2)
    zone.put_back(canvas)


def paint_glasses(canvas: Canvas, skin: Skin, traits: Traits, worn: Floats) -> None:
    """Rims, bridge and temples.

    Args:
        canvas: painted on.
        skin: where the faces are.
        traits: of the people.
        worn: 1 for the pictures with glasses, else 0, ``(n,)``.
    """
    zone = canvas.zone((np.abs(skin.hit.y - traits.eye_y[:, None]) < 0.36) & (worn[:, None] > 0) & (skin.hit.cover > 0))
    x, y, depth = (zone.pick(part) for part in (skin.x, skin.hit.y, skin.hit.depth))
    rx = zone.of(traits.glasses_size)
    ry = zone.of(traits.glasses_size * np.where(traits.round_glasses, 0.74, 0.52))
    dx, dy = x - zone.of(traits.eye_x * np.float32(1.04)), y - zone.of(traits.eye_y - np.float32(0.01))
    xx, yy = dx / rx, dy / ry
    xx, yy = xx * xx, yy * yy
    # The fourth powers make a rectangle with round corners.
    distance = np.where(zone.of(traits.round_glasses) > 0, xx + yy, xx * xx + yy * yy)
    bars = below(np.abs(dy - np.float32(0.03)), 0.05, zone.of(skin.soft)) * above(distance, 1.0, 3.0)
    bars *= above(depth, -0.12, 8.0)
    rim = below(np.abs(distance - 1), 0.34, rx * 12) * above(depth, 0.0, 6.0)
    zone.paint(np.maximum(rim, bars) * zone.pick(skin.hit.cover), zone.tint(traits.glasses_color))
    zone.put_back(canvas)
