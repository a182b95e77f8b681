"""From a dataset's columns to the fields of a batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from armillary.data.store import Dataset
from armillary.spec.errors import UserError

# Columns that are named otherwise than the field that is made of them.
_POSE = ("yaw", "pitch")
_RENAMED = {"masked": "mask"}


def read_columns(dataset: Dataset, names: Iterable[str]) -> dict[str, NDArray[Any]]:
    """Columns of all rows, in order of ``index``; pixels are not read.

    Raises:
        UserError: a shard is missing or damaged, rows are not in their place, or labels have no class.
    """
    wanted = list(dict.fromkeys(("index", "label", *names)))
    parts: dict[str, list[NDArray[Any]]] = {name: [] for name in wanted}
    for shard in range(len(dataset.shards)):
        table = dataset.read_arrow(shard, columns=wanted)
        for name, values in parts.items():
            values.append(table[name].to_numpy())
    columns = {name: np.concatenate(values) for name, values in parts.items()}
    label, classes = columns["label"], len(dataset.manifest.class_names)
    if not np.array_equal(columns["index"], np.arange(len(dataset))):
        raise UserError(f"dataset {dataset.name!r} is damaged: its rows are not in their place", key="data.name")
    if label.min() < 0 or label.max() >= classes:
        raise UserError(f"dataset {dataset.name!r} is damaged: a label outside its {classes} classes", key="data.name")
    return columns


def batch_fields(columns: Mapping[str, NDArray[Any]]) -> tuple[dict[str, Tensor], dict[str, NDArray[Any]]]:
    """The fields and the texts of a dataset.

    Args:
        columns: the optional columns.

    Returns:
        Numbers as tensors, first dimension N, under the names of :data:`armillary.objectives.base.FIELDS`: ``yaw`` and
        ``pitch`` become ``pose (N, 2)`` float32, ``masked`` becomes ``mask``; other columns keep their names
        (``clean_label`` and ``noise`` tell evaluation what the generator did). Strings as numpy arrays ``(N,)`` of
        variable-width text.
    """
    fields: dict[str, Tensor] = {}
    texts: dict[str, NDArray[Any]] = {}
    for name, values in columns.items():
        if values.dtype.kind in "OUT":
            texts[name] = values.astype(np.dtypes.StringDType())
        else:
            # A copy: Arrow's memory may not be written to, and a tensor cannot promise that.
            fields[_RENAMED.get(name, name)] = torch.from_numpy(values.copy())
    if all(name in fields for name in _POSE):
        fields["pose"] = torch.stack([fields.pop(name).to(torch.float32) for name in _POSE], dim=1)
    return fields, texts
