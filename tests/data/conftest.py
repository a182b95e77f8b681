"""Small stores made by the tests themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from armillary.data.store import Dataset, Record, write_dataset

Make = Callable[..., Dataset]


def records(classes: int, per_class: int, *, size: int = 16, channels: int = 1, start: int = 0) -> Iterator[Record]:
    """Images of uniform noise, classes one after another."""
    rng = np.random.default_rng(classes * 1000 + per_class)
    for label in range(classes):
        for _ in range(per_class):
            yield Record(rng.integers(0, 256, (size, size, channels), dtype=np.uint8), label + start)


@pytest.fixture
def make() -> Make:
    def build(name: str = "small", classes: int = 10, per_class: int = 6, shard_rows: int = 4096) -> Dataset:
        names = [f"c{label}" for label in range(classes)]
        return write_dataset(name, records(classes, per_class), class_names=names, shard_rows=shard_rows)

    return build
