"""Embeddings made elsewhere: ``.npz`` or Parquet files with ``embeddings`` and ``labels``.

Nothing in such a file is ever executed: object arrays, which need unpickling, are refused, and sizes are compared with
the memory there is before anything is read.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from armillary.spec.errors import UserError, nearest

EMBEDDINGS, LABELS = "embeddings", "labels"
_LAYOUT = "an .npz or .parquet file with embeddings (n, d) of numbers and labels (n,) of integers or strings"


@dataclass(frozen=True)
class EmbeddingFile:
    """What an embedding file holds.

    Args:
        embeddings: ``(n, d)`` of the file's number type, all finite; n >= 1, d >= 1.
        labels: ``(n,)`` integers or strings.
        columns: the file's other columns of numbers or booleans, ``(n,)`` each, e.g. ``quality``.
    """

    embeddings: NDArray[Any]
    labels: NDArray[Any]
    columns: dict[str, NDArray[Any]] = field(default_factory=dict)


def read_embeddings(path: str | Path) -> tuple[NDArray[Any], NDArray[Any]]:
    """The embeddings and labels of :func:`read_embedding_file`."""
    file = read_embedding_file(path)
    return file.embeddings, file.labels


def read_embedding_file(path: str | Path) -> EmbeddingFile:
    """Reads embeddings, labels, and columns that stand beside them.

    Args:
        path: an ``.npz`` file with the arrays ``embeddings`` ``(n, d)`` and ``labels`` ``(n,)``, or a ``.parquet`` file
            with a column of number lists and a column of integers or strings under these names. Other arrays of n
            numbers or booleans are columns; anything else in it is left alone.

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
    file = readers[path.suffix.lower()](path)
    _check(path, file.embeddings, file.labels)
    return file


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


def check_memory(path: Path, needed: int) -> None:
    """Refuses a file whose content is larger than the memory available; ``needed`` in bytes."""
    import psutil

    available = psutil.virtual_memory().available
    if needed > available:
        problem = f"holds {needed / 1e9:.1f} GB of arrays, more than the {available / 1e9:.1f} GB of memory available"
        raise UserError(problem, where=str(path))


def _read_npz(path: Path) -> EmbeddingFile:
    with _npz(path) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        _check_names(path, list(members))
        check_memory(path, sum(members[name].file_size for name in (EMBEDDINGS, LABELS)))
        embeddings, labels = (_read_array(path, archive, members[name]) for name in (EMBEDDINGS, LABELS))
        columns = {}
        for name in members.keys() - {EMBEDDINGS, LABELS}:
            if not members[name].filename.endswith(".npy"):
                continue
            shape, dtype = _header(path, archive, members[name])
            if shape == labels.shape and dtype.kind in "biuf":
                columns[name] = _read_array(path, archive, members[name])
        return EmbeddingFile(embeddings, labels, columns)


def read_npz_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """All arrays of an ``.npz`` file.

    Raises:
        UserError: it is damaged, larger than memory, or holds Python objects.
    """
    with _npz(path) as archive:
        check_memory(path, sum(info.file_size for info in archive.infolist()))
        return {info.filename.removesuffix(".npy"): _read_array(path, archive, info) for info in archive.infolist()}


@contextmanager
def _npz(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"is not a readable .npz file: {error}", where=str(path), allowed=_LAYOUT) from error


def _header(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """The shape and type that an array claims."""
    with _naming(path, member), archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(stream)
        return shape, dtype


def _read_array(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> NDArray[Any]:
    """One array; its header is checked against the member's size, since NumPy allocates what a header claims."""
    key = member.filename.removesuffix(".npy")
    shape, dtype = _header(path, archive, member)
    if dtype.hasobject:
        problem = "is an array of Python objects, which could run code when read and is refused"
        raise UserError(problem, where=str(path), key=key, hint="save plain numbers or strings, e.g. .astype('int64')")
    claimed = dtype.itemsize
    for side in shape:
        claimed *= int(side)
    if claimed > member.file_size:
        problem = f"claims {shape} of {dtype} and holds only {member.file_size} bytes"
        raise UserError(problem, where=str(path), key=key)
    with _naming(path, member), archive.open(member) as stream:
        return np.asarray(np.lib.format.read_array(stream, allow_pickle=False))


@contextmanager
def _naming(path: Path, member: zipfile.ZipInfo) -> Iterator[None]:
    """Turns what NumPy raises on a damaged array into an error that names it."""
    import zlib

    try:
        yield
    except (ValueError, TypeError, OSError, zlib.error) as error:
        key = member.filename.removesuffix(".npy")
        raise UserError(f"is not a readable array: {error}", where=str(path), key=key) from error


def _read_parquet(path: Path) -> EmbeddingFile:
    import pyarrow as pa

    table = open_parquet(path, (EMBEDDINGS, LABELS))
    for name in (EMBEDDINGS, LABELS):
        if table[name].null_count:
            raise UserError(f"{table[name].null_count} rows are empty", where=str(path), key=name)
    number = (pa.types.is_floating, pa.types.is_integer, pa.types.is_boolean)
    columns = {
        name: np.asarray(table[name].to_numpy())
        for name in table.column_names
        if name not in (EMBEDDINGS, LABELS) and any(kind(table[name].type) for kind in number)
    }
    return EmbeddingFile(_matrix(path, table[EMBEDDINGS]), _label_column(path, table[LABELS]), columns)


def open_parquet(path: Path, required: tuple[str, ...] | None) -> Any:
    """A Parquet file as one Arrow table of its flat columns, and of ``required`` ones of any type.

    Raises:
        UserError: it is damaged, larger than memory, or lacks one of ``required``.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
        if required is not None:
            _check_names(path, schema.names)
        groups = (file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups))
        check_memory(path, sum(groups))
        flat = [column.name for column in schema if not pa.types.is_nested(column.type)]
        return file.read(columns=[*dict.fromkeys([*(required or ()), *flat])]).combine_chunks()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"is not a readable Parquet file: {error}", where=str(path), allowed=_LAYOUT) from error


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
