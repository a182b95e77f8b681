"""What is painted on: whole pictures, and zones of them.

Most features cover a few hundred pixels. They are painted on a zone, the pixels where they can be, taken from all
pictures of the batch into one row and put back afterwards.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from armillary.data.identities.people import Floats, Ints

__all__ = ["Canvas", "above", "below", "ellipse"]


class Canvas:
    """Colours ``(3, ...)`` and the light on them ``(...)``; ``...`` is ``(n, pixels)`` or, of a zone, ``(m,)``.

    Colour and light are kept apart until the end: what is painted over something takes its own light along, or, lying
    flat on it, keeps the light that is there.
    """

    def __init__(self, color: Floats, light: Floats, at: Ints | None = None, rows: Ints | None = None) -> None:
        self.color, self.light = color, light
        self._at, self._rows = at, rows

    def zone(self, where: NDArray[np.bool_]) -> Canvas:
        """The chosen pixels of ``(n, pixels)``, picture by picture; :meth:`put_back` brings them home."""
        at = np.flatnonzero(where)
        rows = np.repeat(np.arange(len(where)), np.count_nonzero(where, axis=1))
        return Canvas(self.color.reshape(3, -1).take(at, axis=1), self.light.reshape(-1).take(at), at, rows)

    def put_back(self, whole: Canvas) -> None:
        """Writes a zone into the canvas it was taken from."""
        for source, target in zip(self.color, whole.color, strict=True):
            target.reshape(-1)[self._at] = source
        whole.light.reshape(-1)[self._at] = self.light

    def bottom(self, start: int) -> Canvas:
        """The pixels from a number on, of all pictures; a view, nothing has to be put back."""
        return Canvas(self.color[:, :, start:], self.light[:, start:])

    def pick(self, values: Floats) -> Floats:
        """A zone's part of ``(n, pixels)`` values."""
        assert self._at is not None, "a zone's"
        return values.reshape(-1).take(self._at)

    def of(self, values: NDArray[np.generic]) -> Floats:
        """One value a picture ``(n,)``, as float32 that broadcasts over the pixels."""
        plain = np.asarray(values, dtype=np.float32)
        return plain[:, None] if self._rows is None else plain.take(self._rows)

    def tint(self, colors: NDArray[np.generic]) -> Floats:
        """One colour a picture ``(n, 3)``, or one for all ``(3,)``, broadcasting over the pixels."""
        plain = np.asarray(colors, dtype=np.float32)
        if plain.ndim == 1:
            return plain.reshape(3, *[1] * self.light.ndim)
        planes = np.ascontiguousarray(plain.T)
        return planes[:, :, None] if self._rows is None else planes.take(self._rows, axis=1)

    def paint(self, alpha: Floats, color: Floats, light: Floats | None = None) -> None:
        """Covers with a colour of :meth:`tint`; without ``light`` it lies in the light that was there."""
        change = color - self.color
        change *= alpha
        self.color += change
        if light is not None:
            lit = light - self.light
            lit *= alpha
            self.light += lit

    def darken(self, alpha: Floats, amount: Floats | float) -> None:
        """Takes away a share of the light where ``alpha`` is 1."""
        kept = alpha * amount
        np.subtract(1, kept, out=kept)
        self.light *= kept


def ellipse(x: Floats, y: Floats, x0: Floats | float, y0: Floats | float, rx: Floats, ry: Floats) -> Floats:
    """``((x - x0) / rx)^2 + ((y - y0) / ry)^2``: 1 on the edge."""
    distance = x - x0
    distance *= 1 / rx
    distance *= distance
    other = y - y0
    other *= 1 / ry
    other *= other
    distance += other
    return distance


def below(values: Floats, limit: Floats | float, sharpness: Floats | float) -> Floats:
    """1 where values are well below the limit, 0 where they are above, linear in between."""
    result = limit - values
    result *= sharpness
    return np.clip(result, 0, 1, out=result)


def above(values: Floats, limit: Floats | float, sharpness: Floats | float) -> Floats:
    """1 where values are well above the limit, 0 where they are below, linear in between."""
    result = values - limit
    result *= sharpness
    return np.clip(result, 0, 1, out=result)
