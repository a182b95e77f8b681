"""The rows of a dataset on their way into another."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from armillary.data.layout import Encoded, Record
from armillary.data.store import Dataset


def stored_records(dataset: Dataset) -> Iterator[tuple[int, Record]]:
    """All rows with their index, as stored: encoded images are not decoded; memory holds one row group."""
    encoded = dataset.manifest.form == "encoded"
    for number, shard in enumerate(dataset.shards):
        for group in range(len(shard.group_rows)):
            for row in dataset.read_arrow(number, group).to_pylist():
                shape = (row.pop("height"), row.pop("width"), row.pop("channels"))
                data, label, index = row.pop("image"), row.pop("label"), row.pop("index")
                image = Encoded(data, shape) if encoded else np.frombuffer(data, dtype=np.uint8).reshape(shape)
                yield index, Record(image, int(label), row)
