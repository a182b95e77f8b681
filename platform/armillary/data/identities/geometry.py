"""Rays against ellipsoids, in closed form, for a batch of pictures.

The camera looks along -z with parallel rays. A point p of the camera's frame is ``R^T p`` in the head's, and an
ellipsoid there, with centre k and radii r, is the unit sphere ``|(R^T p - k) / r| = 1``. With p = (u, v, z) this is a
quadratic equation in z whose coefficients are polynomials in u and v.

Pixels see only additions, products, quotients, square roots and comparisons in float32, each of which IEEE 754 defines
to the last bit: a picture does not depend on vector widths, batch sizes or threads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from armillary.data.identities.canvas import Canvas
from armillary.data.identities.people import Floats

Triple = tuple[Floats, Floats, Floats]

# Beyond a silhouette the root is taken of this instead of a negative number.
_TINY = np.float32(1e-6)


@dataclass(frozen=True)
class Rays:
    """Where the pixels look, in camera coordinates, and how the n heads are turned.

    ``u, v`` and their products have the shape of a canvas's light. ``axes[i, j]``, ``(3, 3, n)``, is component j, in
    the camera's frame, of the head's axis i; ``pixel`` ``(n,)`` a pixel's breadth.
    """

    u: Floats
    v: Floats
    uu: Floats
    uv: Floats
    vv: Floats
    axes: Floats
    pixel: Floats

    def pick(self, zone: Canvas) -> Rays:
        """The rays of a zone's pixels."""
        u, v = zone.pick(self.u), zone.pick(self.v)
        return Rays(u, v, u * u, u * v, v * v, self.axes, self.pixel)

    def seen(self, place: Triple) -> Triple:
        """Camera coordinates ``(n,)`` of points of the head's frame."""
        x, y, z = (
            place[0] * self.axes[0, j] + place[1] * self.axes[1, j] + place[2] * self.axes[2, j] for j in (0, 1, 2)
        )
        return x, y, z

    def in_head(self, direction: Floats) -> Triple:
        """Directions ``(n, 3)`` of the camera's frame in the heads' frames."""
        x, y, z = direction[:, 0], direction[:, 1], direction[:, 2]
        first, second, third = (axis[0] * x + axis[1] * y + axis[2] * z for axis in self.axes)
        return first, second, third


@dataclass(frozen=True)
class Hit:
    """Where rays meet an ellipsoid first; all in the shape of the canvas's light.

    ``cover`` is 1 inside the silhouette, 0 outside, with a soft edge of about a pixel; ``z`` the camera's depth, larger
    is nearer; ``x, y, depth`` the point on the unit sphere in the head's axes.
    """

    cover: Floats
    z: Floats
    x: Floats
    y: Floats
    depth: Floats


def column(values: NDArray[np.generic]) -> Floats:
    """``(n, 1)`` float32."""
    return np.asarray(values, dtype=np.float32)[:, None]


def cast_rays(size: int, turn: Triple, scale: Floats, shift: tuple[Floats, Floats], taper: Floats) -> Rays:
    """The rays of ``(n, size * size)`` pixels.

    Args:
        size: pixels a side.
        turn: yaw, pitch and roll in degrees, ``(n,)`` each.
        scale: half a face height, in half picture sides.
        shift: of the face's centre to the right and up, in half picture sides.
        taper: by how much a face is narrower at the chin than at its middle.
    """
    ticks = ((np.arange(size) + 0.5) * (2 / size) - 1).astype(np.float32)
    across, up = np.broadcast_to(ticks[None, :], (size, size)), np.broadcast_to(-ticks[:, None], (size, size))
    x = across.reshape(1, -1) - column(shift[0])
    y = up.reshape(1, -1) - column(shift[1])
    a, b, angle = (np.deg2rad(part.astype(np.float64)) for part in turn)
    sine, cosine = column(np.sin(angle) / scale), column(np.cos(angle) / scale)
    u, v = x * cosine + y * sine, y * cosine - x * sine
    # Narrower below the middle, wider above: an egg. The factor stays positive over the whole picture.
    factor = v * column(-taper)
    factor += 1
    np.clip(factor, 0.6, 1.6, out=factor)
    u *= factor
    zero = np.zeros_like(a)
    zero = np.zeros_like(a)
    axes = np.array(
        (
            (np.cos(a), zero, -np.sin(a)),
            (-np.sin(a) * np.sin(b), np.cos(b), -np.cos(a) * np.sin(b)),
            (np.sin(a) * np.cos(b), np.sin(b), np.cos(a) * np.cos(b)),
        ),
        dtype=np.float32,
    )
    return Rays(u, v, u * u, u * v, v * v, axes, (2 / (size * scale)).astype(np.float32))


def _polynomial(canvas: Canvas, rays: Rays, constant: Floats, u: Floats, v: Floats, room: Floats) -> Floats:
    """``constant + u * rays.u + v * rays.v`` of coefficients ``(n,)``."""
    result = rays.u * canvas.of(u)
    np.multiply(rays.v, canvas.of(v), out=room)
    result += room
    result += canvas.of(constant)
    return result


def _outline(canvas: Canvas, rays: Rays, maps: Floats, offset: Floats, room: Floats) -> Floats:
    """The discriminant: positive inside the silhouette.

    ``(w.q)^2 - |w|^2 (|q|^2 - 1)`` with ``q = a u + b v + c``, expanded in u and v; the coefficients are those of the
    bilinear form ``(w.x)(w.y) - |w|^2 (x.y)``.
    """
    points = np.concatenate([maps[:, :2].transpose(1, 0, 2), offset[None]])
    w = maps[:, 2]
    along = (points * w).sum(axis=1)
    ww = (w * w).sum(axis=0)
    pairs = points[[0, 0, 1, 0, 1, 2]] * points[[0, 1, 1, 2, 2, 2]]
    uu, uv, vv, u, v, one = along[[0, 0, 1, 0, 1, 2]] * along[[0, 1, 1, 2, 2, 2]] - ww * pairs.sum(axis=1)
    disc = _polynomial(canvas, rays, one + ww, 2 * u, 2 * v, room)
    for products, factor in ((rays.uu, uu), (rays.uv, 2 * uv), (rays.vv, vv)):
        np.multiply(products, canvas.of(factor), out=room)
        disc += room
    return disc


def intersect(canvas: Canvas, rays: Rays, centre: Triple, radii: Triple) -> Hit:
    """The first intersection of every ray with one ellipsoid a picture.

    Args:
        canvas: the pictures, or a zone of them.
        rays: its rays.
        centre: in the head's frame, three ``(n,)``.
        radii: along the head's axes, three ``(n,)``.
    """
    maps, offset, room = *_maps(rays, centre, radii), np.empty_like(rays.u)
    disc = _outline(canvas, rays, maps, offset, room)
    cover = _cover(canvas, rays, maps, radii, disc)
    np.maximum(disc, _TINY, out=disc)
    z = np.sqrt(disc, out=disc)
    w = maps[:, 2]
    ww = (w * w).sum(axis=0)
    middle, across, up = ((w * part).sum(axis=0) for part in (offset, maps[:, 0], maps[:, 1]))
    z -= _polynomial(canvas, rays, middle, across, up, room)
    z *= canvas.of(1 / ww)
    q = []
    for i in range(3):
        point = _polynomial(canvas, rays, offset[i], maps[i, 0], maps[i, 1], room)
        np.multiply(z, canvas.of(w[i]), out=room)
        point += room
        q.append(point)
    return Hit(cover, z, q[0], q[1], q[2])


def silhouette(canvas: Canvas, rays: Rays, centre: Triple, radii: Triple) -> Floats:
    """The ``cover`` of :func:`intersect` alone."""
    maps, offset = _maps(rays, centre, radii)
    return _cover(canvas, rays, maps, radii, _outline(canvas, rays, maps, offset, np.empty_like(rays.u)))


def _maps(rays: Rays, centre: Triple, radii: Triple) -> tuple[Floats, Floats]:
    """``(3, 3, n)`` and ``(3, n)``: from camera coordinates to those of the ellipsoid's unit sphere."""
    size = np.stack(radii)
    return rays.axes / size[:, None], -np.stack(centre) / size


def _cover(canvas: Canvas, rays: Rays, maps: Floats, radii: Triple, disc: Floats) -> Floats:
    # Near the edge disc falls by 2 |w|^2 for every mean radius of distance.
    ww = (maps[:, 2] * maps[:, 2]).sum(axis=0)
    cover = disc * canvas.of(np.sqrt(radii[0] * radii[1]) / (2 * ww * rays.pixel))
    return np.clip(cover, 0, 1, out=cover)


def lambert(canvas: Canvas, hit: Hit, radii: Triple, light: Triple) -> Floats:
    """Cosine between the surface's normal and the light, 0 where it is turned away.

    Args:
        canvas: the pictures, or a zone of them.
        hit: the surface.
        radii: the ellipsoid's, three ``(n,)``.
        light: direction in the head's frame, three ``(n,)``.
    """
    # The normal of |p / r| = 1 is q / r.
    room, length, cosine = np.empty_like(hit.x), np.zeros_like(hit.x), np.zeros_like(hit.x)
    for point, radius, towards in zip((hit.x, hit.y, hit.depth), radii, light, strict=True):
        np.multiply(point, canvas.of(1 / radius), out=room)
        normal = room
        cosine += normal * canvas.of(towards)
        normal *= normal
        length += normal
    cosine /= np.sqrt(length, out=length)
    return np.maximum(cosine, 0, out=cosine)
