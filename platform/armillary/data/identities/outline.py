"""Where the person is in a picture: pictures with the true outline of what they show."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
from numpy.typing import NDArray

from armillary.data.identities.degrade import degrade
from armillary.data.identities.people import traits
from armillary.data.identities.render import render
from armillary.data.identities.scene import Scenes, scenes_of_images
from armillary.data.identities.spec import IdentitiesSpec

# What is painted behind the person, and nothing else.
_BEHIND = ("background", "background_end", "blob")


def render_with_outlines(spec: IdentitiesSpec, count: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Pictures of as many people, and the pixels of each that show the person (head, hair, neck and clothes).

    The person is what does not change with the background: each scene is painted before black and before white.

    Args:
        spec: what the pictures look like; its seed decides who is in them.
        count: pictures, each of another person.

    Returns:
        uint8 ``(count, size, size, channels)`` and bool ``(count, size, size)``.
    """
    number = np.arange(count)
    people, scenes = traits(spec, number), scenes_of_images(spec, number)
    images = degrade(render(people, scenes, spec.size), scenes, spec.size, spec.channels)
    black, white = (render(people, _before(scenes, shade), spec.size) for shade in (0.0, 1.0))
    seen_through = (white - black).mean(axis=0)
    # Light and its colour weigh a whole picture's background alike.
    outlines = seen_through < 0.5 * seen_through.max(axis=1, keepdims=True)
    return images, outlines.reshape(count, spec.size, spec.size)


def _before(scenes: Scenes, shade: float) -> Scenes:
    painted = {
        item.name: np.full_like(getattr(scenes, item.name), shade) for item in fields(scenes) if item.name in _BEHIND
    }
    return replace(scenes, **painted)
