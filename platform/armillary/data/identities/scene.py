"""Scenes: pose, expression, light, surroundings, occlusion and degradation of every picture.

None of it depends on who is in the picture, with one exception: people who wear glasses mostly wear them. A scene is a
row of uniform numbers. Those of a picture are drawn for the picture; those of a frame are drawn for its sequence, and
what moves in a video swings about them, reflected at 0 and 1 so that it stays in range.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray

from armillary.components.counter import key, sample_keys, uniforms
from armillary.data.identities.people import Floats, Ints
from armillary.data.identities.spec import IdentitiesSpec

DRAWS = 48
MAX_YAW, MAX_PITCH = 90.0, 30.0
# The columns that move in a video: pose, placing, expression and light.
_MOVING = slice(0, 14)
_SCENE, _MOTION, _GRAIN = 21, 22, 23
MASKS = np.array([[0.90, 0.92, 0.94], [0.45, 0.68, 0.88], [0.08, 0.08, 0.09], [0.93, 0.62, 0.70]])
MASK_NAMES = ("white", "blue", "black", "pink")
# Gaussian blur in shares of the picture's side, and effective resolutions as such shares; both come in steps, so that
# pictures share their filters.
BLUR_STEPS = np.array([0.0, 0.008, 0.012, 0.016, 0.02, 0.025, 0.03])
RESOLUTION_STEPS = np.array([0.2, 0.25, 0.3, 0.36, 0.42, 0.5])


@dataclass(frozen=True)
class Scenes:
    """n scenes: float32 ``(n,)`` unless said otherwise.

    Angles are in degrees: ``yaw`` is positive when the face turns to the picture's right, ``pitch`` when it looks up,
    ``roll`` when it tilts to the picture's left. ``light`` are unit vectors towards the light ``(n, 3)``, colours
    ``(n, 3)``. ``blur`` is a standard deviation in shares of the side, ``noise`` one in shares of the grey range,
    ``resolution`` int64 pixels a side, ``mask_color`` int64 in :data:`MASK_NAMES`, ``grain`` int64 picks the noise.
    """

    yaw: Floats
    pitch: Floats
    roll: Floats
    scale: Floats
    shift_x: Floats
    shift_y: Floats
    smile: Floats
    mouth_open: Floats
    brow_raise: Floats
    light: Floats
    ambient: Floats
    intensity: Floats
    cast: Floats
    background: Floats
    background_end: Floats
    blob: Floats
    blob_place: Floats
    gradient: Floats
    clothes: Floats
    masked: NDArray[np.bool_]
    mask_color: Ints
    glasses_draw: Floats
    blur: Floats
    noise: Floats
    resolution: Ints
    grain: Ints

    def take(self, rows: slice) -> Scenes:
        """Consecutive rows."""
        return Scenes(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


def scenes_of_images(spec: IdentitiesSpec, index: Ints) -> Scenes:
    """The scenes of still pictures, by their position in the data set."""
    number = torch.from_numpy(index)
    draws = uniforms(sample_keys(key(spec.seed, _SCENE), number), DRAWS).numpy()
    return _scenes(spec, draws.astype(np.float64), _grain(spec, number))


def scenes_of_frames(spec: IdentitiesSpec, sequence: Ints, frame: Ints, grain: Ints) -> Scenes:
    """The scenes of video frames.

    Args:
        spec: the data set's.
        sequence: the number of the video, ``(n,)``.
        frame: the number of the frame, from 0, ``(n,)``.
        grain: what picks the sensor's noise, which is fresh in every frame, ``(n,)``.
    """
    number = torch.from_numpy(sequence)
    draws = uniforms(sample_keys(key(spec.seed, _SCENE, 1), number), DRAWS).numpy().astype(np.float64)
    count = _MOVING.stop
    motion = uniforms(sample_keys(key(spec.seed, _MOTION), number), 3 * count).numpy().astype(np.float64)
    period = 24 + 48 * motion[:, :count]
    swing = 0.05 + 0.13 * motion[:, count : 2 * count]
    phase = frame[:, None] / period + motion[:, 2 * count :]
    moved = draws[:, _MOVING] + swing * np.sin(2 * np.pi * phase)
    draws[:, _MOVING] = 1 - np.abs(1 - np.abs(moved))
    return _scenes(spec, draws, _grain(spec, torch.from_numpy(grain)))


def _grain(spec: IdentitiesSpec, number: torch.Tensor) -> Ints:
    # Non-negative whatever the hash.
    return (sample_keys(key(spec.seed, _GRAIN), number) >> 1).numpy() & (2**62 - 1)


def _bent(u: NDArray[np.float64]) -> NDArray[np.float64]:
    """From [0, 1] to [-1, 1], crowded about 0."""
    t = 2 * u - 1
    return t * np.abs(t)


def _stepped(steps: NDArray[np.float64], u: NDArray[np.float64]) -> NDArray[np.float64]:
    return steps[np.minimum((u * len(steps)).astype(np.int64), len(steps) - 1)]


def _muted(u: NDArray[np.float64]) -> NDArray[np.float64]:
    """Colours ``(n, 3)``, half way to the grey of the same mean."""
    return 0.05 + 0.45 * (u + u.mean(axis=1, keepdims=True))  # type: ignore[no-any-return]


def _scenes(spec: IdentitiesSpec, u: NDArray[np.float64], grain: Ints) -> Scenes:
    hard = spec.difficulty
    reach = min(1.0, 0.25 + 1.25 * hard)

    def f(values: NDArray[np.float64]) -> Floats:
        return values.astype(np.float32)

    azimuth, elevation = 80 * reach * _bent(u[:, 9]), 25 + 45 * reach * (2 * u[:, 10] - 1)
    azimuth, elevation = np.deg2rad(azimuth), np.deg2rad(elevation)
    light = [np.sin(azimuth) * np.cos(elevation), np.sin(elevation), np.cos(azimuth) * np.cos(elevation)]
    low = u[:, 29] < spec.low_res_share
    share = np.where(low, _stepped(RESOLUTION_STEPS, u[:, 30]), 1.0)
    blurred = u[:, 31] < 0.15 + 0.4 * hard
    steps = BLUR_STEPS[1 : 2 + round(5 * reach)]
    return Scenes(
        yaw=f(MAX_YAW * reach * _bent(u[:, 0])),
        pitch=f(MAX_PITCH * reach * _bent(u[:, 1])),
        roll=f(12 * reach * _bent(u[:, 2])),
        scale=f(0.78 + 0.06 * reach * (2 * u[:, 3] - 1)),
        shift_x=f(0.10 * reach * (2 * u[:, 4] - 1)),
        shift_y=f(0.10 * reach * (2 * u[:, 5] - 1)),
        smile=f(np.clip(1.5 * u[:, 6] - 0.5, -0.35, 1)),
        mouth_open=f(np.clip(2.2 * u[:, 7] - 1.2, 0, 1) * (0.4 + 0.6 * reach)),
        brow_raise=f(_bent(u[:, 8])),
        light=f(np.stack(light, axis=1)),
        ambient=f(0.65 - 0.32 * reach * u[:, 11]),
        intensity=f(1.05 - 0.65 * reach * u[:, 12] ** 2),
        cast=f(1 + 0.16 * reach * (2 * u[:, 14:17] - 1)),
        background=f(_muted(u[:, 17:20])),
        background_end=f(_muted(u[:, 20:23])),
        blob=f(_muted(u[:, 23:26])),
        blob_place=f(2 * u[:, 26:28] - 1),
        gradient=f(u[:, 28:29] * np.array([0.5, -0.4]) + u[:, 38:39] * np.array([-0.3, 0.5])),
        clothes=f(_muted(u[:, 39:42])),
        masked=u[:, 32] < spec.mask_share,
        mask_color=np.minimum((u[:, 33] * len(MASKS)).astype(np.int64), len(MASKS) - 1),
        glasses_draw=f(u[:, 34]),
        blur=f(np.where(blurred, _stepped(steps, u[:, 35]), 0.0)),
        noise=f(0.004 + 0.07 * reach * u[:, 36] ** 2),
        resolution=np.maximum(np.rint(share * spec.size), 1).astype(np.int64),
        grain=grain,
    )
