"""Files beside embeddings: lists of pairs, of templates, and of matches between templates; npz, CSV or Parquet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from armillary.evaluation.files import check_memory, open_parquet, read_npz_arrays
from armillary.evaluation.result import Ints, Pairs, Templates
from armillary.spec.errors import UserError, nearest

if TYPE_CHECKING:
    import pyarrow as pa

Columns = Mapping[str, NDArray[Any]]
PAIR_COLUMNS = "first and second (rows counted from 0), same (1 or 0, true or false), and optionally fold"
TEMPLATE_COLUMNS = "row (counted from 0), template, media, and optionally gallery (negative for probes)"
MATCH_COLUMNS = "first and second (templates), same (1 or 0, true or false)"


def read_pairs(path: str | Path) -> Pairs:
    """Reads a list of pairs: columns ``first``, ``second``, ``same`` and optionally ``fold``.

    Raises:
        UserError: no such file, it is damaged, or a column is missing or of the wrong type.
    """
    return pairs_of(_read(path, ("first", "second", "same"), ("fold",), PAIR_COLUMNS))


def read_templates(path: str | Path, matches: str | Path | None = None) -> Templates:
    """Reads templates (``row``, ``template``, ``media``, optionally ``gallery``) and their matches.

    Raises:
        UserError: as for :func:`read_pairs`.
    """
    columns = _read(path, ("row", "template", "media"), ("gallery",), TEMPLATE_COLUMNS)
    matched = None if matches is None else _read(matches, ("first", "second", "same"), (), MATCH_COLUMNS)
    return templates_of(columns, matched)


def pairs_of(columns: Columns) -> Pairs:
    """Pairs of the columns ``first``, ``second``, ``same`` and, if there, ``fold``."""
    return Pairs(columns["first"], columns["second"], columns["same"], columns.get("fold"))


def templates_of(columns: Columns, matches: Columns | None) -> Templates:
    """Templates of the columns ``row``, ``template``, ``media`` and, if there, ``gallery``."""
    matched = None if matches is None else pairs_of(matches)
    return Templates(columns["row"], columns["template"], columns["media"], matched, columns.get("gallery"))


def table_columns(table: pa.Table) -> dict[str, NDArray[Any]]:
    """An Arrow table's columns as arrays."""
    return {name: np.asarray(table[name].to_numpy()) for name in table.column_names}


def located(rows: Ints, index: Ints) -> Ints:
    """Where rows of a dataset stand in a part of it, -1 for those that are not in it.

    Args:
        rows: ``(m,)`` positions in the dataset.
        index: ``(n,)`` the positions that the part holds, each once.
    """
    order = np.argsort(index)
    at = np.minimum(np.searchsorted(index, rows, sorter=order), len(index) - 1)
    return np.where(index[order[at]] == rows, order[at], -1).astype(np.int64)


def _read(path: str | Path, required: tuple[str, ...], optional: tuple[str, ...], layout: str) -> Columns:
    path = Path(path)
    allowed = f"an .npz, .csv or .parquet file with the columns {layout}"
    if not path.is_file():
        raise UserError("is not a file" if path.exists() else "no such file", where=str(path), allowed=allowed)
    readers = {".npz": read_npz_arrays, ".csv": _read_csv, ".parquet": _read_parquet}
    if path.suffix.lower() not in readers:
        raise UserError(f"cannot read files ending in {path.suffix!r}", where=str(path), allowed=allowed)
    columns = readers[path.suffix.lower()](path)
    for name in required:
        if name not in columns:
            close = nearest(name, list(columns), 1)
            raise UserError(
                f"there is no column {name!r}; the file has {', '.join(sorted(columns)[:20]) or 'nothing'}",
                where=str(path),
                allowed=allowed,
                hint=f"rename {close[0]!r} to {name!r}" if close else None,
            )
    return {name: columns[name] for name in (*required, *optional) if name in columns}


def _read_csv(path: Path) -> dict[str, NDArray[Any]]:
    import pyarrow as pa
    from pyarrow import csv

    check_memory(path, path.stat().st_size)
    try:
        return _whole(path, csv.read_csv(path))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"is not a readable CSV file with a header line: {error}", where=str(path)) from error


def _read_parquet(path: Path) -> dict[str, NDArray[Any]]:
    return _whole(path, open_parquet(path, None))


def _whole(path: Path, table: pa.Table) -> dict[str, NDArray[Any]]:
    for name in table.column_names:
        if table[name].null_count:
            raise UserError(f"{table[name].null_count} rows are empty", where=str(path), key=name)
    return table_columns(table)
