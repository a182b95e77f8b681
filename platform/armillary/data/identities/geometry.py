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
    """Where the pixels look: camera coordinates ``(n, pixels)`` and their products, and the heads' rotations.

    ``axes[i]`` is the head's i-th axis in the camera's frame, three arrays ``(n, 1)``.
    """

    u: Floats
    v: Floats
    uu: Floats
    uv: Floats
    vv: Floats
    axes: tuple[Triple, Triple, Triple]
    pixel: Floats

    def pick(self, zone: Canvas) -> Rays:
        """The rays of a zone's pixels, everything ``(m,)``."""
        first, second, third = ((zone.of(a[:, 0]), zone.of(b[:, 0]), zone.of(c[:, 0])) for a, b, c in self.axes)
        u, v, uu, uv, vv = (zone.pick(values) for values in (self.u, self.v, self.uu, self.uv, self.vv))
        return Rays(u, v, uu, uv, vv, (first, second, third), zone.of(self.pixel[:, 0]))

    def seen(self, x: Floats, y: Floats, z: Floats) -> Triple:
        """Camera coordinates ``(n, 1)`` of points of the head's frame."""
        first, second, third = self.axes
        return (
            x * first[0] + y * second[0] + z * third[0],
            x * first[1] + y * second[1] + z * third[1],
            x * first[2] + y * second[2] + z * third[2],
        )


@dataclass(frozen=True)
class Hit:
    """Where rays meet an ellipsoid first, ``(n, pixels)``.

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
    axes = (
        (np.cos(a), zero, -np.sin(a)),
        (-np.sin(a) * np.sin(b), np.cos(b), -np.cos(a) * np.sin(b)),
        (np.sin(a) * np.cos(b), np.sin(b), np.cos(a) * np.cos(b)),
    )
    first, second, third = ((column(i), column(j), column(k)) for i, j, k in axes)
    return Rays(u, v, u * u, u * v, v * v, (first, second, third), column(2 / (size * scale)))


def _dot(a: tuple[Floats, ...], b: tuple[Floats, ...]) -> Floats:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _linear(rays: Rays, constant: Floats, u: Floats, v: Floats, scratch: Floats) -> Floats:
    """``constant + u * rays.u + v * rays.v``."""
    result = rays.u * u
    np.multiply(rays.v, v, out=scratch)
    result += scratch
    result += constant
    return result


def intersect(rays: Rays, centre: Triple, radii: Triple, *, points: bool = True) -> Hit:
    """The first intersection of every ray with one ellipsoid a picture.

    Args:
        rays: of n pictures, or of a zone.
        centre: in the head's frame, three ``(n, 1)``, or ``(m,)`` for a zone.
        radii: along the head's axes, like ``centre``.
        points: whether the surface points are wanted; without, only ``cover`` is computed and the rest is ``cover``.
    """
    # q = a u + b v + w z + c, one component an axis.
    a = tuple(axis[0] / radius for axis, radius in zip(rays.axes, radii, strict=True))
    b = tuple(axis[1] / radius for axis, radius in zip(rays.axes, radii, strict=True))
    w = tuple(axis[2] / radius for axis, radius in zip(rays.axes, radii, strict=True))
    c = tuple(-place / radius for place, radius in zip(centre, radii, strict=True))
    ww, wa, wb, wc = _dot(w, w), _dot(w, a), _dot(w, b), _dot(w, c)
    # (w.q0)^2 - |w|^2 (|q0|^2 - 1), expanded in u and v.
    scratch = np.empty_like(rays.u)
    du, dv = 2 * (wa * wc - ww * _dot(a, c)), 2 * (wb * wc - ww * _dot(b, c))
    disc = _linear(rays, wc * wc - ww * (_dot(c, c) - 1), du, dv, scratch)
    duu, duv, dvv = wa * wa - ww * _dot(a, a), 2 * (wa * wb - ww * _dot(a, b)), wb * wb - ww * _dot(b, b)
    for products, factor in ((rays.uu, duu), (rays.uv, duv), (rays.vv, dvv)):
        np.multiply(products, factor, out=scratch)
        disc += scratch
    # Near the edge disc falls by 2 |w|^2 for every mean radius of distance.
    cover = disc * (np.sqrt(radii[0] * radii[1]) / (2 * ww * rays.pixel))
    np.clip(cover, 0, 1, out=cover)
    if not points:
        return Hit(cover, cover, cover, cover, cover)
    np.maximum(disc, _TINY, out=disc)
    z = np.sqrt(disc, out=disc)
    z -= _linear(rays, wc, wa, wb, scratch)
    z *= 1 / ww
    q = []
    for i in range(3):
        point = _linear(rays, c[i], a[i], b[i], scratch)
        np.multiply(z, w[i], out=scratch)
        point += scratch
        q.append(point)
    return Hit(cover, z, q[0], q[1], q[2])


def lambert(hit: Hit, radii: Triple, light: Triple) -> Floats:
    """Cosine between the surface's normal and the light, 0 where it is turned away; ``light`` in the head's frame."""
    # The normal of |p / r| = 1 is q / r.
    inverse = tuple(1 / radius for radius in radii)
    length = hit.x * hit.x
    length *= inverse[0] * inverse[0]
    scratch = hit.y * hit.y
    scratch *= inverse[1] * inverse[1]
    length += scratch
    np.multiply(hit.depth, hit.depth, out=scratch)
    scratch *= inverse[2] * inverse[2]
    length += scratch
    np.sqrt(length, out=length)
    cosine = hit.x * (inverse[0] * light[0])
    np.multiply(hit.y, inverse[1] * light[1], out=scratch)
    cosine += scratch
    np.multiply(hit.depth, inverse[2] * light[2], out=scratch)
    cosine += scratch
    cosine /= length
    return np.maximum(cosine, 0, out=cosine)  # type: ignore[no-any-return]
