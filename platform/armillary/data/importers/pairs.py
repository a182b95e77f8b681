"""Lists of image pairs, which become a dataset's table ``pairs``: rows ``first`` and ``second``, ``same``, ``fold``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import pyarrow as pa


class Pair(NamedTuple):
    """Two images by their position in the source, whether they show the same, and the fold they belong to."""

    first: int
    second: int
    same: bool
    fold: int = 0


def pair_table(pairs: Iterable[Pair], row_of: Callable[[int], int], *, folds: bool) -> pa.Table:
    """The table ``pairs`` of row numbers; pairs with an image that was left out are left out too.

    Args:
        pairs: by position in the source.
        row_of: the row of a position, -1 for what was left out.
        folds: whether there is a column ``fold``.
    """
    import pyarrow as pa

    kept = [Pair(row_of(pair.first), row_of(pair.second), pair.same, pair.fold) for pair in pairs]
    kept = [pair for pair in kept if pair.first >= 0 and pair.second >= 0]
    columns = {
        "first": pa.array([pair.first for pair in kept], pa.int64()),
        "second": pa.array([pair.second for pair in kept], pa.int64()),
        "same": pa.array([pair.same for pair in kept], pa.bool_()),
    }
    if folds:
        columns["fold"] = pa.array([pair.fold for pair in kept], pa.int64())
    return pa.table(columns)
