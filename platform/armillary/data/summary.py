"""What a dataset holds, in numbers and in one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from armillary.data.store import Dataset
from armillary.spec.errors import UserError

_CELL, _GAP, _TEXT = 96, 4, 12


def describe(dataset: Dataset) -> dict[str, Any]:
    """Class balance, image sizes and the ranges of the columns; reads all columns but the images.

    ``classes`` has the smallest, median and largest number of images a class, over classes with images; how many have
    none, and one; ``effective``, the exponential of the entropy of the classes' shares: the number of equal classes
    that would be as diverse (Hill number of order 1); ``gini``, 0 for equal classes, near 1 when one holds everything.
    """
    histogram = np.asarray(dataset.manifest.histogram)
    counts = np.sort(histogram[histogram > 0])
    share = counts / counts.sum()
    rank = np.arange(1, len(counts) + 1)
    classes = {
        "empty": int((histogram == 0).sum()),
        "single": int((counts == 1).sum()),
        "min": int(counts[0]),
        "median": float(np.median(counts)),
        "max": int(counts[-1]),
        "effective": float(np.exp(-(share * np.log(share)).sum())),
        "gini": float((2 * rank - len(counts) - 1) @ counts / (len(counts) * counts.sum())),
    }
    sizes = {side: _range(dataset.column(side)) for side in ("height", "width", "channels")}
    columns = {
        name: {"type": kind} | _range(dataset.column(name)) for name, kind in sorted(dataset.manifest.columns.items())
    }
    return {"classes": classes, "sizes": sizes, "columns": columns}


def _range(values: NDArray[Any]) -> dict[str, Any]:
    if values.dtype == object:
        distinct = np.unique(values.astype(str))
        return {"distinct": len(distinct), "examples": [str(value)[:60] for value in distinct[:3]]}
    if values.dtype == bool:
        return {"true": int(values.sum()), "false": int((~values).sum())}
    exact = values.astype(np.float64)
    finite = exact[np.isfinite(exact)]
    if not len(finite):
        return {"not_finite": len(exact)}
    numbers = {"min": finite.min(), "median": np.median(finite), "max": finite.max()}
    whole = values.dtype.kind in "iu"
    result: dict[str, Any] = {
        name: int(value) if whole and value == int(value) else float(value) for name, value in numbers.items()
    }
    return result if len(finite) == len(exact) else result | {"not_finite": len(exact) - len(finite)}


def contact_sheet(dataset: Dataset, path: Path, *, across: int = 10, down: int = 8) -> int:
    """Writes a PNG of images spread evenly over the dataset, each with its class below; returns how many.

    Raises:
        UserError: the file cannot be written, or the dataset is damaged.
    """
    from PIL import Image, ImageDraw

    count = min(len(dataset), across * down)
    wanted = np.linspace(0, len(dataset) - 1, count).round().astype(int)
    rows = -(-count // across)
    size = (across * (_CELL + _GAP) + _GAP, rows * (_CELL + _TEXT + _GAP) + _GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    starts, groups = _groups(dataset)
    at = np.searchsorted(starts, wanted, side="right") - 1
    for group in np.unique(at):
        held = dataset.read_group(*groups[group])
        for place in np.flatnonzero(at == group):
            row = wanted[place] - starts[group]
            image = held.images[row]
            picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image[:, :, :3]).convert("RGB")
            scale = _CELL / max(picture.size)
            width, height = (max(1, round(side * scale)) for side in picture.size)
            x = _GAP + (place % across) * (_CELL + _GAP)
            y = _GAP + (place // across) * (_CELL + _TEXT + _GAP)
            sheet.paste(picture.resize((width, height)), (int(x), int(y)))
            name = dataset.manifest.class_names[held.label[row]]
            draw.text((int(x), int(y) + _CELL), name[:16].encode("latin-1", "replace").decode("latin-1"), "black")
    try:
        sheet.save(path, "PNG")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}", key="--sheet") from error
    return count


def _groups(dataset: Dataset) -> tuple[NDArray[np.int64], list[tuple[int, int]]]:
    """The first row of every row group, and which shard and group it is."""
    places = [(shard, group) for shard, entry in enumerate(dataset.shards) for group in range(len(entry.group_rows))]
    rows = [rows for entry in dataset.shards for rows in entry.group_rows]
    return np.concatenate([[0], np.cumsum(rows)[:-1]]), places
