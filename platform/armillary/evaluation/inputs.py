"""Checks of what a protocol is given: embeddings, labels, columns, pairs and templates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from armillary.evaluation.result import Floats, Ints, Pairs, Templates
from armillary.spec.errors import UserError


def checked_samples(key: str, embeddings: Any, label_key: str, labels: Any) -> tuple[Floats, NDArray[Any]]:
    """Embeddings as float64 ``(n, d)``, finite, and labels ``(n,)`` of integers or strings.

    Raises:
        UserError: anything else.
    """
    points, classes = np.asarray(embeddings), np.asarray(labels)
    if points.ndim != 2 or points.shape[1] < 1:
        raise UserError(f"must have the shape (samples, width), found {points.shape}", key=key)
    if points.dtype.kind not in "fiu":
        raise UserError(f"must be real numbers, found {points.dtype}", key=key)
    if classes.shape != (len(points),):
        raise UserError(f"must have the shape ({len(points)},), one a sample, found {classes.shape}", key=label_key)
    if classes.dtype.kind not in "iuU":
        raise UserError(f"must be integers or strings, found {classes.dtype}", key=label_key)
    points = points.astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(points).all(axis=1))
    if len(bad):
        raise UserError(
            f"{len(bad)} of {len(points)} embeddings hold NaN or infinity, the first in row {bad[0]}",
            key=key,
            hint="training diverged, or the file is damaged",
        )
    return points, classes


def checked_columns(columns: Mapping[str, Any] | None, size: int) -> dict[str, NDArray[Any]]:
    """Columns as arrays with ``size`` rows each.

    Raises:
        UserError: a column of another length.
    """
    arrays = {name: np.asarray(values) for name, values in (columns or {}).items()}
    for name, values in arrays.items():
        if values.ndim < 1 or len(values) != size:
            raise UserError(f"must have {size} rows, one a sample, found {values.shape}", key=f"columns.{name}")
    return arrays


def checked_pairs(pairs: Pairs | None, size: int | None, key: str = "pairs") -> Pairs | None:
    """Pairs with int64 positions in ``range(size)`` (any integers when it is ``None``), and bool ``same``.

    Raises:
        UserError: there is none, arrays differ in length or are of the wrong type, or positions are out of range.
    """
    if pairs is None:
        return None
    length = len(np.asarray(pairs.same))
    if not length:
        raise UserError("the list is empty", key=key)
    first = integers(pairs.first, length, f"{key}.first")
    second = integers(pairs.second, length, f"{key}.second")
    if size is not None:
        _check_range(first, size, f"{key}.first")
        _check_range(second, size, f"{key}.second")
    same = np.asarray(pairs.same)
    if same.dtype.kind not in "biu" or not np.isin(same, (0, 1)).all():
        raise UserError(f"must be true or false (1 or 0), found {same.dtype}", key=f"{key}.same")
    fold = None if pairs.fold is None else integers(pairs.fold, length, f"{key}.fold")
    return Pairs(first, second, same.astype(np.bool_), fold)


def checked_templates(templates: Templates | None, size: int) -> Templates | None:
    """Templates with int64 arrays of one length and rows in ``range(size)``.

    Raises:
        UserError: there is none, arrays differ in length or are no integers, or rows are out of range.
    """
    if templates is None:
        return None
    length = len(np.asarray(templates.row))
    if not length:
        raise UserError("the list is empty", key="templates")
    row = integers(templates.row, length, "templates.row")
    _check_range(row, size, "templates.row")
    template = integers(templates.template, length, "templates.template")
    media = integers(templates.media, length, "templates.media")
    gallery = None if templates.gallery is None else integers(templates.gallery, length, "templates.gallery")
    return Templates(row, template, media, checked_pairs(templates.matches, None, "matches"), gallery)


def integers(values: Any, length: int, key: str) -> Ints:
    """``(length,)`` int64.

    Raises:
        UserError: another length or type.
    """
    array = np.asarray(values)
    if array.shape != (length,):
        raise UserError(f"must have the shape ({length},), found {array.shape}", key=key)
    if array.dtype.kind not in "iu":
        raise UserError(f"must be integers, found {array.dtype}", key=key)
    return array.astype(np.int64)


def _check_range(values: Ints, size: int, key: str) -> None:
    wrong = np.flatnonzero((values < 0) | (values >= size))
    if len(wrong):
        raise UserError(f"row {wrong[0]} is {values[wrong[0]]}", key=key, allowed=f"0..{size - 1}, counted from 0")
