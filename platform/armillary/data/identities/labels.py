"""Who is in which picture, what its label says, and who looks like whom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from armillary.components.counter import key, sample_keys, shuffled, uniforms
from armillary.data.identities.people import Ints, vectors
from armillary.data.identities.spec import IdentitiesSpec

if TYPE_CHECKING:
    import pyarrow as pa

NOISE = ("clean", "flip", "outlier", "split")
_CLEAN, _FLIP, _OUTLIER, _SPLIT = range(4)
# People outside the label set have numbers from here on.
STRANGERS = 2**40
_ORDER, _SPLIT_ORDER, _TARGET = 31, 32, 33
# The tail of a long-tailed set has classes of two: one image cannot be compared with another of its class.
_FEWEST = 2


@dataclass(frozen=True)
class Roll:
    """All pictures of a data set, int64 ``(images,)`` each.

    ``person`` is who is shown, ``label`` what the picture is called, ``clean`` its true class or -1 for a stranger,
    ``noise`` counts in :data:`NOISE`; ``sequence``, ``frame`` and ``image_set`` are -1 where there are none.
    """

    person: Ints
    label: Ints
    clean: Ints
    noise: Ints
    sequence: Ints
    frame: Ints
    image_set: Ints
    class_names: tuple[str, ...]


def images_per_identity(spec: IdentitiesSpec) -> Ints:
    """How many pictures everybody has, ``(identities,)``; falling where there is a long tail."""
    rank = np.arange(1, spec.identities + 1, dtype=np.float64)
    counts = np.rint(spec.images_per_identity * rank**-spec.long_tail).astype(np.int64)
    return np.maximum(counts, min(_FEWEST, spec.images_per_identity))


def call_roll(spec: IdentitiesSpec) -> Roll:
    """Lists all pictures, person by person, and puts the label noise in.

    Each kind of noise hits ``share * images`` pictures, rounded half up. Splits take half of a person's pictures, of as
    many people as it needs; flips and outliers hit any other picture.
    """
    counts = images_per_identity(spec)
    person = np.repeat(np.arange(spec.identities), counts)
    position = np.arange(len(person)) - np.repeat(counts.cumsum() - counts, counts)
    sequence, frame = _runs(position, counts, spec.sequence_length)
    image_set, _ = _runs(position, counts, spec.sets)
    label, noise, names = (
        person.copy(),
        np.zeros_like(person),
        [f"person-{number:05d}" for number in range(spec.identities)],
    )
    wanted = [int(share * len(person) + 0.5) for share in (spec.noise.flip, spec.noise.outlier, spec.noise.split)]
    for owner, rows in _halves(spec, counts, wanted[2]):
        label[rows], noise[rows] = len(names), _SPLIT
        names.append(f"person-{owner:05d}-again")
    left = _shuffled(np.flatnonzero(noise == _CLEAN), key(spec.seed, _ORDER))
    flips, outliers = left[: wanted[0]], left[wanted[0] : wanted[0] + wanted[1]]
    noise[flips], noise[outliers] = _FLIP, _OUTLIER
    draws = uniforms(sample_keys(key(spec.seed, _TARGET), torch.from_numpy(flips)), 1)[:, 0].numpy().astype(np.float64)
    # One of the others: a step of 1 to identities - 1 around the circle.
    label[flips] = (label[flips] + 1 + (draws * (spec.identities - 1)).astype(np.int64)) % spec.identities
    clean = person.copy()
    clean[outliers] = -1
    person[outliers] = STRANGERS + outliers
    return Roll(person, label, clean, noise, sequence, frame, image_set, tuple(names))


def _runs(position: Ints, counts: Ints, length: int) -> tuple[Ints, Ints]:
    """Numbers of runs of ``length`` pictures of a person, the last one maybe shorter, and the place within each."""
    if not length:
        return np.full_like(position, -1), np.full_like(position, -1)
    runs = -(-counts // length)
    first = np.repeat(runs.cumsum() - runs, counts)
    return first + position // length, position % length


def _halves(spec: IdentitiesSpec, counts: Ints, wanted: int) -> list[tuple[int, Ints]]:
    """Rows that go under a second label: half of one person's after the other's, until there are ``wanted``."""
    starts, found = counts.cumsum() - counts, []
    for owner in _shuffled(np.arange(spec.identities), key(spec.seed, _SPLIT_ORDER)).tolist():
        if wanted <= 0:
            break
        take = min(wanted, int(counts[owner]) // 2)
        if take:
            found.append((owner, np.arange(starts[owner], starts[owner] + take)))
        wanted -= take
    return found


def _shuffled(values: NDArray[np.int64], base: int) -> Ints:
    return shuffled(torch.from_numpy(values), base).numpy()


def similarity_graph(spec: IdentitiesSpec, block: int = 1024) -> pa.Table:
    """Who looks like whom, from the distances of identity vectors.

    Everybody is joined to the ``neighbours`` people nearest to them, and every edge stands in both directions. The
    weight is ``exp(-d^2 / (2 D))`` with the Euclidean distance d of two vectors of D variates: 1 for doubles, about
    0.37 for two strangers.

    Args:
        spec: the data set's.
        block: people compared with everybody at a time.

    Returns:
        Columns ``source`` and ``target`` (class numbers, int64) and ``weight`` (float32), sorted by both numbers.
    """
    import pyarrow as pa

    points = vectors(spec, np.arange(spec.identities))
    squares = (points**2).sum(axis=1)
    nearest = min(spec.neighbours, spec.identities - 1)
    edges: set[tuple[int, int]] = set()
    for start in range(0, spec.identities, block):
        part = points[start : start + block]
        distance = squares[start : start + block, None] + squares[None, :] - 2 * part @ points.T
        distance[np.arange(len(part)), start + np.arange(len(part))] = np.inf
        for row, targets in enumerate(np.argpartition(distance, nearest - 1, axis=1)[:, :nearest].tolist(), start):
            edges.update((row, target) for target in targets)
            edges.update((target, row) for target in targets)
    source, target = np.array(sorted(edges), dtype=np.int64).T
    difference = ((points[source] - points[target]) ** 2).sum(axis=1)
    weight = np.exp(-difference / (2 * points.shape[1])).astype(np.float32)
    return pa.table({"source": source, "target": target, "weight": weight})
