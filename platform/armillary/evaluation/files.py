"""Embeddings made elsewhere: ``.npz`` or Parquet files with ``embeddings`` and ``labels``.

Nothing in such a file is ever executed: object arrays, which need unpickling, are refused, and sizes are compared with
the memory there is before anything is read.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from armillary.spec.errors import UserError, nearest

EMBEDDINGS, LABELS = "embeddings", "labels"
_LAYOUT = "an .npz or .parquet file with embeddings (n, d) of numbers and labels (n,) of integers or strings"


def read_embeddings(path: str | Path) -> tuple[NDArray[Any], NDArray[Any]]:
    """Reads embeddings and labels.

    Args:
        path: an ``.npz`` file with the arrays ``embeddings`` ``(n, d)`` and ``labels`` ``(n,)``, or a ``.parquet`` file
            with a column of number lists and a column of integers or strings under these names.

    Returns:
        ``(n, d)`` of the file's number type, all finite, and ``(n,)`` integers or strings; n >= 1, d >= 1.

    Raises:
        UserError: there is no such file, it is damaged or larger than memory, an array is missing, or its shape, type
            or content is wrong.
    """
    path = Path(path)
    if not path.is_file():
        problem = "is not a file" if path.exists() else "no such file"
        raise UserError(problem, where=str(path), allowed=_LAYOUT)
    readers = {".npz": _read_npz, ".parquet": _read_parquet}
    if path.suffix.lower() not in readers:
        raise UserError(f"cannot read files ending in {path.suffix!r}", where=str(path), allowed=_LAYOUT)
    embeddings, labels = readers[path.suffix.lower()](path)
    _check(path, embeddings, labels)
    return embeddings, labels


def _check(path: Path, embeddings: NDArray[Any], labels: NDArray[Any]) -> None:
    where = str(path)
    if embeddings.ndim != 2 or 0 in embeddings.shape:
        problem = f"must have the shape (n, d) with n and d at least 1, found {embeddings.shape}"
        raise UserError(problem, where=where, key=EMBEDDINGS)
    if embeddings.dtype.kind not in "fiu":
        raise UserError(f"must be real numbers, found {embeddings.dtype}", where=where, key=EMBEDDINGS)
    if labels.shape != (len(embeddings),):
        problem = f"must have the shape ({len(embeddings)},), one an embedding, found {labels.shape}"
        raise UserError(problem, where=where, key=LABELS)
    if labels.dtype.kind not in "iuU":
        hint = "cast them to int64" if labels.dtype.kind in "fb" else None
        raise UserError(f"must be integers or strings, found {labels.dtype}", where=where, key=LABELS, hint=hint)
    bad = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
    if len(bad):
        problem = f"{len(bad)} of {len(embeddings)} rows hold NaN or infinity, the first is row {bad[0]}"
        raise UserError(problem, where=where, key=EMBEDDINGS)


def _check_names(path: Path, found: list[str]) -> None:
    for name in (EMBEDDINGS, LABELS):
        if name not in found:
            close = nearest(name, found, 1)
            raise UserError(
                f"there is no {name!r}; the file holds {', '.join(sorted(found)[:20]) or 'nothing'}",
                where=str(path),
                allowed=_LAYOUT,
                hint=f"rename {close[0]!r} to {name!r}" if close else None,
            )


def _check_memory(path: Path, needed: int) -> None:
    import psutil

    available = psutil.virtual_memory().available
    if needed > available:
        problem = f"holds {needed / 1e9:.1f} GB of arrays, more than the {available / 1e9:.1f} GB of memory available"
        raise UserError(problem, where=str(path))


def _read_npz(path: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            _check_names(path, list(members))
            _check_memory(path, sum(members[name].file_size for name in (EMBEDDINGS, LABELS)))
            embeddings, labels = (_read_array(path, archive, members[name]) for name in (EMBEDDINGS, LABELS))
            return embeddings, labels
    except (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"is not a readable .npz file: {error}", where=str(path), allowed=_LAYOUT) from error


def _read_array(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> NDArray[Any]:
    """One array; its header is checked against the member's size, since NumPy allocates what a header claims."""
    import zlib

    key = member.filename.removesuffix(".npy")
    try:
        with archive.open(member) as stream:
            version = np.lib.format.read_magic(stream)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = header(stream)
        if dtype.hasobject:
            problem = "is an array of Python objects, which could run code when read and is refused"
            raise UserError(
                problem, where=str(path), key=key, hint="save plain numbers or strings, e.g. .astype('int64')"
            )
        claimed = dtype.itemsize
        for side in shape:
            claimed *= int(side)
        if claimed > member.file_size:
            problem = f"claims {shape} of {dtype} and holds only {member.file_size} bytes"
            raise UserError(problem, where=str(path), key=key)
        with archive.open(member) as stream:
            return np.asarray(np.lib.format.read_array(stream, allow_pickle=False))
    except (ValueError, TypeError, OSError, zlib.error) as error:
        raise UserError(f"is not a readable array: {error}", where=str(path), key=key) from error


def _read_parquet(path: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        _check_names(path, file.schema_arrow.names)
        groups = (file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups))
        _check_memory(path, sum(groups))
        table = file.read(columns=[EMBEDDINGS, LABELS]).combine_chunks()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"is not a readable Parquet file: {error}", where=str(path), allowed=_LAYOUT) from error
    for name in (EMBEDDINGS, LABELS):
        if table[name].null_count:
            raise UserError(f"{table[name].null_count} rows are empty", where=str(path), key=name)
    return _matrix(path, table[EMBEDDINGS]), _label_column(path, table[LABELS])


def _matrix(path: Path, column: Any) -> NDArray[Any]:
    import pyarrow as pa
    import pyarrow.compute as pc

    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    number = (pa.types.is_floating, pa.types.is_integer)
    if not any(kind(column.type) for kind in kinds) or not any(kind(column.type.value_type) for kind in number):
        raise UserError(f"must be a column of number lists, found {column.type}", where=str(path), key=EMBEDDINGS)
    widths = pc.list_value_length(column).unique().to_pylist()
    if len(widths) > 1:
        problem = f"rows differ in width: {sorted(widths)[0]} to {sorted(widths)[-1]}"
        raise UserError(problem, where=str(path), key=EMBEDDINGS)
    values = pc.list_flatten(column)
    if values.null_count:
        raise UserError(f"{values.null_count} values are empty", where=str(path), key=EMBEDDINGS)
    return np.asarray(values.to_numpy()).reshape(len(column), widths[0] if widths else 0)


def _label_column(path: Path, column: Any) -> NDArray[Any]:
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return np.asarray(column.to_pylist(), dtype=np.str_)
    if pa.types.is_integer(column.type):
        return np.asarray(column.to_numpy())
    raise UserError(f"must be integers or strings, found {column.type}", where=str(path), key=LABELS)
