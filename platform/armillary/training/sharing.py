"""One decoded copy of a dataset a node, in Ray's object store, read by every worker and trial without copying.

The driver decodes and owns it, so that a worker's death takes nothing away. Folds, label noise and seeds are row
numbers and labels over the same array (:class:`armillary.data.pixels.ArrayImages`), which each process makes itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from armillary.data.pixels import ArrayImages, PixelSource, decode_all
from armillary.data.splits import PreparedData, prepare
from armillary.spec.jobs import DataSpec

# PixelSource.key -> ray.ObjectRef
References = Mapping[str, Any]
# prepare(spec, seed=...)
Prepare = Callable[..., PreparedData]


class Shelf:
    """The driver's side: what it put into the object store, alive as long as the shelf is."""

    def __init__(self) -> None:
        self.references: dict[str, Any] = {}

    def offer(self, data: PreparedData) -> None:
        """Puts a dataset's pixels into the object store, unless they are there, or are streamed."""
        import ray

        images = data.train.images
        if isinstance(images, ArrayImages) and images.key not in self.references:
            self.references[images.key] = ray.put(images.array)


def remembering_prepare(references: Callable[[], References] = dict) -> Prepare:
    """A ``prepare`` that takes pixels from the object store where they are, and loads the same data once.

    Args:
        references: what the driver offers; asked for anew whenever a dataset is not known yet. Pixels that are not
            offered, or that were lost with the driver, are decoded here.
    """
    arrays: dict[str, NDArray[np.uint8]] = {}

    def pixels(source: PixelSource) -> NDArray[np.uint8]:
        if source.key not in arrays:
            # One dataset at a time: sweeps do not change it often, and memory is short.
            arrays.clear()
            arrays[source.key] = _fetch(source, references())
        return arrays[source.key]

    @functools.lru_cache(maxsize=8)
    def cached(spec: DataSpec, seed: int) -> PreparedData:
        return prepare(spec, seed=seed, pixels=pixels)

    # Seeds matter only under label noise.
    return lambda spec, *, seed: cached(spec, seed if spec.label_noise else 0)


def _fetch(source: PixelSource, references: References) -> NDArray[np.uint8]:
    import ray

    reference = references.get(source.key)
    if reference is not None:
        try:
            shared: Any = ray.get(reference)
        except ray.exceptions.ObjectLostError:
            return decode_all(source)
        return np.asarray(shared)
    return decode_all(source)
