"""Captions in words, from the truth."""

from __future__ import annotations

import numpy as np

from armillary.data.identities.people import HAIR_NAMES, Traits
from armillary.data.identities.render import worn_glasses
from armillary.data.identities.scene import MASK_NAMES, Scenes

# Degrees and intensities where words change.
TURNED, PROFILE, TILTED = 15.0, 55.0, 10.0
DIM, BRIGHT = 0.75, 0.98
SMILING, BEARDED, LONG_HAIR = 0.35, 0.35, 1.0


def captions(traits: Traits, scenes: Scenes) -> list[str]:
    """One sentence a picture: expression, hair, beard, glasses or mask, where the face points, and the light."""
    glasses = worn_glasses(traits, scenes) > 0
    return [_caption(traits, scenes, row, bool(glasses[row])) for row in range(len(scenes.yaw))]


def _caption(traits: Traits, scenes: Scenes, row: int, glasses: bool) -> str:
    masked = bool(scenes.masked[row])
    # Nobody sees a smile or a beard behind a mask.
    smiling = "" if masked or scenes.smile[row] < SMILING else "smiling "
    who = f"a {smiling}bald person" if traits.bald[row] else f"a {smiling}person"
    having = []
    if not traits.bald[row]:
        length = "long " if traits.hair_length[row] > LONG_HAIR else ""
        having.append(f"{length}{HAIR_NAMES[traits.hair_color[row]]} hair")
    if not masked and traits.beard[row] > BEARDED:
        having.append("a beard")
    if glasses:
        having.append("round glasses" if traits.round_glasses[row] else "square glasses")
    if masked:
        having.append(f"a {MASK_NAMES[scenes.mask_color[row]]} face mask")
    described = f"{who} with {_listed(having)}" if having else who
    return f"{described}, {_facing(float(scenes.yaw[row]), float(scenes.pitch[row]))}, {_lit(scenes.intensity[row])}"


def _listed(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _facing(yaw: float, pitch: float) -> str:
    side = "right" if yaw > 0 else "left"
    if abs(yaw) >= PROFILE:
        words = f"in profile, facing {side}"
    elif abs(yaw) >= TURNED:
        words = f"facing {side}"
    else:
        words = "facing the camera"
    if abs(pitch) >= TILTED:
        words += " and looking up" if pitch > 0 else " and looking down"
    return words


def _lit(intensity: np.float32) -> str:
    return "in dim light" if intensity < DIM else "in bright light" if intensity > BRIGHT else "in soft light"
