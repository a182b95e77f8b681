"""People: a vector for each identity, and what it means for a face.

Everything that tells two people apart is a smooth function of one vector of standard variates, so that the distance of
two vectors says how much the two look alike. Every ``FAMILY`` people in a row share a part of it: relatives are the
hard negatives.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray

from armillary.components.counter import key, sample_keys, uniforms
from armillary.data.identities.spec import IdentitiesSpec

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

DIMENSIONS = 40
FAMILY = 5
_OWN, _FAMILY = 11, 12
# A variate is the sum of this many uniforms: nearly normal, never further from 0 than 3.5.
_SUMMANDS = 4

SKIN = np.array([[0.97, 0.84, 0.75], [0.90, 0.70, 0.56], [0.76, 0.55, 0.40], [0.56, 0.37, 0.25], [0.36, 0.23, 0.16]])
HAIR = np.array([[0.07, 0.06, 0.06], [0.27, 0.16, 0.09], [0.60, 0.22, 0.09], [0.86, 0.70, 0.38], [0.68, 0.67, 0.66]])
HAIR_NAMES = ("black", "brown", "red", "blond", "grey")
IRIS = np.array([[0.20, 0.11, 0.05], [0.40, 0.28, 0.10], [0.25, 0.42, 0.22], [0.25, 0.45, 0.70], [0.45, 0.50, 0.54]])
FRAMES = np.array([[0.05, 0.05, 0.06], [0.38, 0.20, 0.08], [0.62, 0.10, 0.12], [0.75, 0.74, 0.72]])


@dataclass(frozen=True)
class Traits:
    """The faces of n people: lengths in half face heights, in the head's own frame (x right, y up, z to the front).

    Scalars are float32 ``(n,)``, colours ``(n, 3)`` in [0, 1]; ``hair_color`` counts in :data:`HAIR_NAMES`.
    """

    width: Floats
    height: Floats
    depth: Floats
    taper: Floats
    skin: Floats
    hair: Floats
    hair_color: Ints
    hairline: Floats
    hair_volume: Floats
    hair_length: Floats
    bald: NDArray[np.bool_]
    eye_x: Floats
    eye_y: Floats
    eye_width: Floats
    eye_height: Floats
    eye_tilt: Floats
    iris: Floats
    iris_size: Floats
    brow_y: Floats
    brow_width: Floats
    brow_thickness: Floats
    brow_slope: Floats
    nose_y: Floats
    nose_width: Floats
    nose_length: Floats
    nose_depth: Floats
    mouth_y: Floats
    mouth_width: Floats
    lip: Floats
    lip_color: Floats
    ear: Floats
    beard: Floats
    beard_top: Floats
    mole_x: Floats
    mole_y: Floats
    mole: Floats
    wears_glasses: NDArray[np.bool_]
    round_glasses: NDArray[np.bool_]
    glasses_size: Floats
    glasses_color: Floats

    def take(self, rows: Ints) -> Traits:
        """The people of those rows, in that order."""
        return Traits(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


def _variates(purpose: int, seed: int, numbers: Ints) -> NDArray[np.float64]:
    draws = uniforms(sample_keys(key(seed, purpose), torch.from_numpy(numbers)), DIMENSIONS * _SUMMANDS)
    summed = draws.numpy().astype(np.float64).reshape(len(numbers), DIMENSIONS, _SUMMANDS).sum(axis=2)
    return (summed - _SUMMANDS / 2) * np.sqrt(12 / _SUMMANDS)  # type: ignore[no-any-return]


def vectors(spec: IdentitiesSpec, numbers: Ints) -> NDArray[np.float64]:
    """Identity vectors ``(n, DIMENSIONS)``, mean 0 and variance 1 over people, of the people of those numbers.

    At difficulty d relatives share ``0.2 + 0.4 d`` of the variance.
    """
    shared = 0.2 + 0.4 * spec.difficulty
    own = _variates(_OWN, spec.seed, numbers)
    family = _variates(_FAMILY, spec.seed, numbers // FAMILY)
    return np.sqrt(1 - shared) * own + np.sqrt(shared) * family  # type: ignore[no-any-return]


def _palette(colors: NDArray[np.float64], position: NDArray[np.float64]) -> Floats:
    """Colours ``(n, 3)`` between those of a palette; positions count from 0."""
    position = np.clip(position, 0, len(colors) - 1)
    low = np.minimum(position.astype(np.int64), len(colors) - 2)
    part = (position - low)[:, None]
    return (colors[low] * (1 - part) + colors[low + 1] * part).astype(np.float32)  # type: ignore[no-any-return]


def _share(z: NDArray[np.float64]) -> NDArray[np.float64]:
    """The share of people below a variate, in [0, 1] (logistic approximation of the normal distribution)."""
    return 1 / (1 + np.exp(-1.702 * z))


def traits(spec: IdentitiesSpec, numbers: Ints) -> Traits:
    """What the people of those numbers look like."""
    z = vectors(spec, numbers)
    # Shapes spread less when it is to be difficult; colours, which survive every pose, too.
    s = z * (1.25 - 0.5 * spec.difficulty)

    def f(values: NDArray[np.float64]) -> Floats:
        return values.astype(np.float32)

    hair_at = np.interp(_share(z[:, 18]), [0, 0.3, 0.62, 0.72, 0.9, 1], [-0.4, 0.5, 1.5, 2.5, 3.5, 4.4])
    hair_at = np.clip(hair_at, 0, 4)
    hair_color = np.rint(hair_at).astype(np.int64)
    # Half way to the palette's entry: two redheads are alike but not the same.
    hair = _palette(HAIR, hair_color + 0.6 * (hair_at - hair_color)) * (1 + 0.12 * np.clip(s[:, 19:20], -2, 2))
    skin = _palette(SKIN, 4 * _share(1.1 * s[:, 16])) * (1 + 0.05 * s[:, 17:18] * np.array([1.0, -0.4, -0.8]))
    lip_tint = np.array([0.62, 0.20, 0.20])
    redness = 0.55 + 0.15 * np.clip(s[:, 22:23], -2, 2)
    lip_color = skin * (1 - redness) * 0.9 + lip_tint * redness
    return Traits(
        width=f(0.735 + 0.040 * s[:, 0]),
        height=f(1.0 + 0.030 * s[:, 1]),
        depth=f(0.86 + 0.03 * s[:, 2]),
        taper=f(0.15 + 0.07 * s[:, 29]),
        skin=f(np.clip(skin, 0.05, 1)),
        hair=f(np.clip(hair, 0.03, 1)),
        hair_color=hair_color,
        hairline=f(0.50 + 0.085 * s[:, 20]),
        hair_volume=f(0.095 + 0.035 * s[:, 21]),
        hair_length=f(np.clip(0.55 + 0.62 * s[:, 31], 0, 1.6)),
        bald=z[:, 32] > 1.3,
        eye_x=f(0.385 + 0.032 * s[:, 3]),
        eye_y=f(0.04 + 0.026 * s[:, 4]),
        eye_width=f(0.185 + 0.018 * s[:, 5]),
        eye_height=f(0.098 + 0.016 * s[:, 6]),
        eye_tilt=f(0.10 * s[:, 7]),
        iris_size=f(0.082 + 0.006 * s[:, 5] + 0.006 * s[:, 6]),
        iris=_palette(IRIS, 5 * _share(z[:, 8]) - 0.5),
        brow_y=f(0.225 + 0.026 * s[:, 9]),
        brow_width=f(0.205 + 0.022 * s[:, 10]),
        brow_thickness=f(np.clip(0.046 + 0.013 * s[:, 11], 0.015, 0.09)),
        brow_slope=f(-0.05 + 0.16 * s[:, 12]),
        nose_y=f(-0.16 + 0.025 * s[:, 13]),
        nose_width=f(np.clip(0.128 + 0.024 * s[:, 14], 0.07, 0.22)),
        nose_length=f(0.235 + 0.026 * s[:, 15]),
        nose_depth=f(np.clip(0.185 + 0.042 * s[:, 33], 0.08, 0.32)),
        mouth_y=f(-0.515 + 0.030 * s[:, 23]),
        mouth_width=f(np.clip(0.300 + 0.034 * s[:, 24], 0.16, 0.40)),
        lip=f(np.clip(0.082 + 0.017 * s[:, 25], 0.03, 0.12)),
        lip_color=f(np.clip(lip_color, 0.05, 1)),
        ear=f(np.clip(0.165 + 0.03 * s[:, 26], 0.09, 0.26)),
        beard=f(np.clip(0.9 * (z[:, 27] - 0.35), 0, 0.92)),
        beard_top=f(-0.36 + 0.07 * s[:, 28]),
        mole_x=f(np.clip(0.42 * z[:, 30], -0.62, 0.62)),
        mole_y=f(-0.22 + 0.12 * s[:, 34]),
        mole=f(np.clip(0.55 * z[:, 35], 0, 0.75)),
        wears_glasses=_share(z[:, 36]) < spec.glasses,
        round_glasses=z[:, 37] > 0,
        glasses_size=f(np.clip(0.27 + 0.028 * s[:, 38], 0.2, 0.34)),
        glasses_color=_palette(FRAMES, np.rint(4 * _share(z[:, 39]) - 0.5)),
    )
