"""From a specification to records, and into the store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from armillary.data.identities.captions import captions
from armillary.data.identities.degrade import degrade, quality
from armillary.data.identities.labels import NOISE, Roll, call_roll, similarity_graph
from armillary.data.identities.people import Ints, Traits, traits
from armillary.data.identities.render import render
from armillary.data.identities.scene import Scenes, scenes_of_frames, scenes_of_images
from armillary.data.identities.spec import IdentitiesSpec
from armillary.data.layout import ColumnType
from armillary.data.store import Dataset, Record, dataset_exists, write_dataset
from armillary.spec.errors import UserError

# (images done, images in all)
Progress = Callable[[int, int | None], None]

COLUMNS: dict[str, ColumnType] = {
    "clean_label": "int64",
    "noise": "string",
    "yaw": "float32",
    "pitch": "float32",
    "quality": "float32",
    "masked": "bool",
    "resolution": "int64",
    "caption": "string",
    "sequence": "int64",
    "frame": "int64",
    "image_set": "int64",
}
# What the embedded data sets are made of: every column says something, and labels are clean.
EMBEDDED = {
    "identities": IdentitiesSpec(sets=4, graph=True),
    "identities_small": IdentitiesSpec(identities=64, images_per_identity=12, size=32, sets=4, graph=True),
    "identities_video": IdentitiesSpec(identities=64, images_per_identity=24, size=32, sequence_length=8),
}
# Part of what a killed generation is known by: change it with anything that changes a pixel or a column.
_VERSION = "identities-1"
# Values of one colour that are worked on at once: they stay in a core's second-level cache.
_BLOCK_VALUES = 65_536
# Pictures whose parameters are drawn at once.
_DRAWN = 1024
# Numbers of videos made by `render_identity_frames`; no data set has as many.
_VIDEOS = 2**41


@dataclass(frozen=True)
class Rendered:
    """Pictures, uint8 ``(n, size, size, channels)``, and their truth: columns as in the store, n values each."""

    images: NDArray[np.uint8]
    truth: dict[str, list[Any]]


def records(spec: IdentitiesSpec, start: int = 0) -> Iterator[Record]:
    """All pictures of a data set in order, from number ``start`` on; each depends on the specification alone."""
    roll = call_roll(spec)
    for first in range(start, len(roll.person), _DRAWN):
        rows = np.arange(first, min(first + _DRAWN, len(roll.person)))
        people, scenes = traits(spec, roll.person[rows]), _scenes(spec, roll, rows)
        rendered = _rendered(spec, people, scenes)
        columns = rendered.truth | {
            "clean_label": roll.clean[rows].tolist(),
            "noise": [NOISE[kind] for kind in roll.noise[rows].tolist()],
            "sequence": roll.sequence[rows].tolist(),
            "frame": roll.frame[rows].tolist(),
            "image_set": roll.image_set[rows].tolist(),
        }
        labels = roll.label[rows].tolist()
        for at, image in enumerate(rendered.images):
            yield Record(image, labels[at], {name: columns[name][at] for name in COLUMNS})


def render_identity_frames(spec: IdentitiesSpec, identity: int, frames: int) -> Rendered:
    """A video of one person: pose, expression and light move smoothly, everything else stays.

    Args:
        spec: what the data set looks like; its seed and the identity decide the video.
        identity: whose, from 0; people beyond ``spec.identities`` exist too.
        frames: how many, 1 or more; the first ones do not depend on how many follow.

    Returns:
        The frames in order, and their ``yaw``, ``pitch``, ``quality``, ``masked``, ``resolution`` and ``caption``.

    Raises:
        UserError: a negative identity, or no frames.
    """
    if identity < 0 or frames < 1:
        raise UserError(f"identity {identity} and {frames} frames", allowed="identity >= 0, frames >= 1")
    number = np.arange(frames)
    sequence = np.full_like(number, _VIDEOS + identity)
    scenes = scenes_of_frames(spec, sequence, number, (_VIDEOS + identity) * 1_000_003 + number)
    return _rendered(spec, traits(spec, np.full_like(number, identity)), scenes)


def make_identities(name_or_path: str, spec: IdentitiesSpec, progress: Progress | None = None) -> Dataset:
    """Generates a data set into the store; memory holds one row group. A killed generation goes on when repeated.

    Args:
        name_or_path: a name in the store, a local path or an ``s3://`` URL.
        spec: what to generate.
        progress: called with how many pictures are done and how many there are.

    Raises:
        UserError: the data set exists already.
    """
    if dataset_exists(name_or_path):
        raise UserError(f"dataset {name_or_path!r} exists already", hint="delete it or use another name")
    roll = call_roll(spec)

    def counted(start: int) -> Iterator[Record]:
        for done, record in enumerate(records(spec, start), start=start + 1):
            yield record
            if progress is not None:
                progress(done, len(roll.person))

    return write_dataset(
        name_or_path,
        counted,
        class_names=roll.class_names,
        columns=COLUMNS,
        credit=f"procedural faces of Armillary: {spec.model_dump_json()}",
        licence="CC0 1.0; nobody is shown",
        identity=f"{_VERSION} {spec.model_dump_json()}",
        tables={"graph": similarity_graph(spec)} if spec.graph else None,
    )


def embedded(name: str, _source: Path | None, progress: Progress) -> Dataset:
    """The data set ``identities``, for the table of importers."""
    return make_identities(name, EMBEDDED["identities"], progress)


def embedded_small(name: str, _source: Path | None, progress: Progress) -> Dataset:
    """The data set ``identities_small``, for the table of importers."""
    return make_identities(name, EMBEDDED["identities_small"], progress)


def embedded_video(name: str, _source: Path | None, progress: Progress) -> Dataset:
    """The data set ``identities_video``, for the table of importers."""
    return make_identities(name, EMBEDDED["identities_video"], progress)


def _scenes(spec: IdentitiesSpec, roll: Roll, rows: Ints) -> Scenes:
    if spec.sequence_length:
        return scenes_of_frames(spec, roll.sequence[rows], roll.frame[rows], rows)
    return scenes_of_images(spec, rows)


def _rendered(spec: IdentitiesSpec, people: Traits, scenes: Scenes) -> Rendered:
    count = len(scenes.yaw)
    block = max(1, _BLOCK_VALUES // spec.size**2)
    images = np.empty((count, spec.size, spec.size, spec.channels), dtype=np.uint8)
    for start in range(0, count, block):
        part = slice(start, min(start + block, count))
        who, where = people.take(np.arange(part.start, part.stop)), scenes.take(part)
        images[part] = degrade(render(who, where, spec.size), where, spec.size, spec.channels)
    truth: dict[str, list[Any]] = {
        "yaw": scenes.yaw.tolist(),
        "pitch": scenes.pitch.tolist(),
        "quality": quality(scenes, spec.size).tolist(),
        "masked": scenes.masked.tolist(),
        "resolution": scenes.resolution.tolist(),
        "caption": captions(people, scenes),
    }
    return Rendered(images, truth)
