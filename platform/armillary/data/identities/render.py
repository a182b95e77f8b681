"""Painting heads: a batch of pictures at a time, no loop over pictures.

Skull, nose, hair and ears are ellipsoids (:mod:`.geometry`), the rest lies on them (:mod:`.features`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from armillary.data.identities.canvas import Canvas, above, below, ellipse
from armillary.data.identities.features import Skin, paint_features, paint_glasses
from armillary.data.identities.geometry import Hit, Rays, Triple, cast_rays, column, intersect, lambert, silhouette
from armillary.data.identities.people import Floats, Traits
from armillary.data.identities.scene import MASKS, Scenes

# Share of a picture, from the top, above which there is never a neck.
_NECK = 0.5


class _Sun(NamedTuple):
    """Light in the head's frame, three ``(n,)``, and the share of it that comes from everywhere, ``(n,)``."""

    direction: Triple
    ambient: Floats

    def on(self, canvas: Canvas, hit: Hit, radii: Triple) -> Floats:
        """The light on an ellipsoid's surface (Lambert's law)."""
        ambient = canvas.of(self.ambient)
        light = lambert(canvas, hit, radii, self.direction)
        light *= 1 - ambient
        light += ambient
        return light


def render(traits: Traits, scenes: Scenes, size: int) -> Floats:
    """Paints n heads, without any degradation.

    Args:
        traits: of the n people.
        scenes: the n scenes.
        size: pixels a side.

    Returns:
        float32 ``(3, n, size * size)``, 0 black, 1 white, under a strong light a little more.
    """
    place = (scenes.shift_x, scenes.shift_y)
    rays = cast_rays(size, (scenes.yaw, scenes.pitch, scenes.roll), scenes.scale, place, traits.taper)
    soft = 0.5 / rays.pixel
    canvas = _background(rays, scenes)
    sun = _Sun(rays.in_head(scenes.light), scenes.ambient)
    _falling_hair(canvas, rays, traits)
    _shoulders(canvas, rays, traits, scenes, soft)
    radii = (traits.width, traits.height, traits.depth)
    nowhere = np.zeros_like(traits.width)
    face = intersect(canvas, rays, (nowhere, nowhere, nowhere), radii)
    canvas.paint(face.cover, canvas.tint(traits.skin), sun.on(canvas, face, radii))
    _ears(canvas, rays, face, traits, sun)
    front = above(face.depth, 0.0, 6.0)
    front *= face.cover
    skin = Skin(face, np.abs(face.x), front, soft)
    paint_features(canvas, skin, traits, scenes)
    _nose(canvas, rays, face, traits, scenes, sun)
    worn = worn_glasses(traits, scenes)
    if worn.any():
        paint_glasses(canvas, skin, traits, worn)
    _hair(canvas, rays, traits, sun, soft)
    canvas.light *= canvas.of(scenes.intensity)
    canvas.color *= canvas.light
    canvas.color *= canvas.tint(scenes.cast)
    return canvas.color


def worn_glasses(traits: Traits, scenes: Scenes) -> Floats:
    """1 for the pictures with glasses: 9 in 10 of those of people who wear any, ``(n,)``."""
    return (traits.wears_glasses & (scenes.glasses_draw < 0.9)).astype(np.float32)


def _background(rays: Rays, scenes: Scenes) -> Canvas:
    """Two colours that run into each other, and a soft spot of a third."""
    blend = rays.u * scenes.gradient[:, :1]
    blend += rays.v * scenes.gradient[:, 1:]
    blend += 0.5
    np.clip(blend, 0, 1, out=blend)
    color = np.empty((3, *blend.shape), dtype=np.float32)
    color[:] = scenes.background.T[:, :, None]
    canvas = Canvas(color, np.ones_like(blend))
    canvas.paint(blend, canvas.tint(scenes.background_end))
    x, y = scenes.blob_place[:, :1] * np.float32(1.4), scenes.blob_place[:, 1:] * np.float32(1.4)
    radius = (0.5 + np.abs(scenes.gradient[:, :1])).astype(np.float32)
    canvas.paint(below(ellipse(rays.u, rays.v, x, y, radius, radius), 1.0, 1.5), canvas.tint(scenes.blob))
    return canvas


def _shoulders(canvas: Canvas, rays: Rays, traits: Traits, scenes: Scenes, soft: Floats) -> None:
    """The neck, and clothes, which say nothing about the person."""
    # Higher than this no neck begins, wherever the head is.
    start = int(_NECK * rays.u.shape[1])
    lower, u, v = canvas.bottom(start), rays.u[:, start:], rays.v[:, start:]
    sharp = column(soft)
    neck = below(np.abs(u), column(traits.width * np.float32(0.52)), sharp)
    neck *= below(v, -0.5, sharp)
    lower.paint(neck, lower.tint(traits.skin), np.full_like(sharp, 0.62))
    wide, tall = np.full_like(sharp, 1.25), np.full_like(sharp, 0.62)
    clothes = below(ellipse(u, v, 0.0, -1.72, wide, tall), 1.0, 4.0)
    lower.paint(clothes, lower.tint(scenes.clothes), np.full_like(sharp, 0.9))


def _falling_hair(canvas: Canvas, rays: Rays, traits: Traits) -> None:
    """An ellipsoid behind the skull that grows downwards with the length of the hair; only its outline is seen."""
    long = (traits.hair_length > 0.35) & ~traits.bald
    if not long.any():
        return
    length = traits.hair_length
    centre = (np.zeros_like(length), 0.15 - 0.45 * length, -0.20 - 0.05 * length)
    wide = traits.width + traits.hair_volume - 0.1 + 0.16 * length
    alpha = silhouette(canvas, rays, centre, (wide, 0.55 + 0.42 * length, 0.55 + 0.1 * length))
    alpha *= column(long)
    canvas.paint(alpha, canvas.tint(traits.hair * np.float32(0.75)), np.full((1, 1), 0.8, dtype=np.float32))


def _ears(canvas: Canvas, rays: Rays, face: Hit, traits: Traits, sun: _Sun) -> None:
    """Both ears, each where it is nearer than the skull or beside it."""
    tall = traits.ear
    color = traits.skin * np.array([0.93, 0.86, 0.86], dtype=np.float32)
    for side in (-1.0, 1.0):
        centre = (side * (traits.width + 0.015), np.full_like(tall, -0.02), np.full_like(tall, -0.10))
        u, v, depth = rays.seen(centre)
        zone = canvas.zone((np.abs(rays.u - column(u)) < column(tall)) & (np.abs(rays.v - column(v)) < column(tall)))
        cover = silhouette(zone, rays.pick(zone), centre, (np.full_like(tall, 0.07), tall, 0.62 * tall))
        nearer = below(zone.pick(face.z), zone.of(depth + 0.04), 12.0)
        np.maximum(nearer, 1 - zone.pick(face.cover), out=nearer)
        towards = np.clip(0.75 * side * sun.direction[0] + 0.35 * sun.direction[2], 0, 1)
        light = zone.of(sun.ambient + (1 - sun.ambient) * towards)
        zone.paint(nearer * cover, zone.tint(color), light)
        zone.put_back(canvas)


def _nose(canvas: Canvas, rays: Rays, face: Hit, traits: Traits, scenes: Scenes, sun: _Sun) -> None:
    """The nose, of the mask's colour under a mask, and its nostrils."""
    # Under a mask it is pressed flat.
    out = traits.nose_depth * np.where(scenes.masked, 0.6, 1.0).astype(np.float32)
    depth = traits.depth * np.sqrt(1 - traits.nose_y**2) - np.float32(0.03)
    centre = (np.zeros_like(depth), traits.nose_y * traits.height, depth)
    radii = (traits.nose_width, traits.nose_length, out)
    u, v, _ = rays.seen(centre)
    across, up = column(np.maximum(traits.nose_width, out)), column(np.maximum(traits.nose_length, out))
    zone = canvas.zone((np.abs(rays.u - column(u)) < across) & (np.abs(rays.v - column(v)) < up))
    nose = intersect(zone, rays.pick(zone), centre, radii)
    nearer = above(nose.z - zone.pick(face.z), -0.015, 30.0)
    np.maximum(nearer, 1 - zone.pick(face.cover), out=nearer)
    # It grows out of the face: no edge at the bridge.
    nearer *= nose.cover * below(nose.y, 0.85, 2.0)
    color = np.where(scenes.masked[:, None], MASKS[scenes.mask_color], traits.skin)
    zone.paint(nearer, zone.tint(color), sun.on(zone, nose, radii))
    size = np.full_like(nearer, 0.26)
    nostrils = below(ellipse(np.abs(nose.x), nose.y, 0.45, -0.72, size, size * 0.8), 1.0, 1.5)
    zone.darken(nostrils * nearer, zone.of(np.where(scenes.masked, 0.0, 0.55)))
    zone.put_back(canvas)


def _hair(canvas: Canvas, rays: Rays, traits: Traits, sun: _Sun, soft: Floats) -> None:
    """The part of a shell around the skull that lies above and behind a plane through the hairline."""
    volume = traits.hair_volume
    centre = (np.zeros_like(volume), np.full_like(volume, 0.04), np.full_like(volume, -0.05))
    radii = (traits.width + volume, traits.height + volume, traits.depth + volume)
    shell = intersect(canvas, rays, centre, radii)
    line = column(traits.hairline)
    slope = (0.42 + 0.75 * np.minimum(column(traits.hair_length), 1)).astype(np.float32)
    edge = shell.depth * -slope
    edge += shell.y
    level = (line - slope * np.sqrt(1 - line * line)).astype(np.float32)
    alpha = above(edge, level, column(soft) * np.float32(0.7))
    alpha *= shell.cover
    alpha *= column(~traits.bald)
    canvas.paint(alpha, canvas.tint(traits.hair), sun.on(canvas, shell, radii))
