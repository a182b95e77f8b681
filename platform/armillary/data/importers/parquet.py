"""Any Parquet with a column of images: bytes, Hugging Face's struct of bytes and path, or nested lists of pixels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from armillary.data.images import MAX_BYTES
from armillary.data.importers.contents import UNLABELLED, Classes, Contents, record, unique
from armillary.data.importers.options import ParquetOptions
from armillary.data.importers.source import MAX_RATIO, Source
from armillary.data.layout import MAX_SIDE, ColumnType, Encoded
from armillary.data.store import Record, Unreadable
from armillary.spec.errors import UserError, unknown_name

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_BATCH = 64
_RATIO_FREE = 64 * 2**20


def read_parquet(source: Source, options: ParquetOptions) -> Contents:
    """Reads a ``.parquet`` file, or a folder with files of one schema.

    Empty cells among the images are quarantined; among labels and columns they are refused.

    Raises:
        UserError: missing columns or types that cannot be kept, a damaged file, a bomb, files of different schemas.
    """
    source.need("a .parquet file or a folder of them")
    paths = [source.name] if source.is_file else [file.path for file in source.files(suffixes=(".parquet",))]
    if not paths:
        raise UserError(f"{source.location} has no .parquet files")
    renamed = {column.partition("=")[0]: column.partition("=")[2] or column.partition("=")[0]
               for column in options.columns}  # fmt: skip
    unique(renamed.values(), "--columns")
    labels: set[int | str] = set()
    counts: list[list[int]] = []
    schema: pa.Schema | None = None
    for path in paths:
        with _opened(source, path) as file:
            if schema is not None and not file.schema_arrow.equals(schema):
                raise UserError(f"{path} has other columns than {paths[0]}")
            schema = file.schema_arrow
            labelled = _check(schema, options, list(renamed), path)
            counts.append(_row_groups(file, options.image_column, path))
            if labelled:
                for batch in file.iter_batches(65_536, columns=[options.label_column]):
                    labels.update(_labels(batch.column(0), path))
    assert schema is not None, "there is a file"
    classes = Classes(labels, f"{source.location}:{options.label_column}") if labelled else None
    types = {new: _column_type(schema.field(old).type, old) for old, new in renamed.items()}

    def items(start: int) -> Iterator[Record | Unreadable]:
        wanted = [options.image_column, *renamed, *([options.label_column] if labelled else [])]
        for path, groups in zip(paths, counts, strict=True):
            with _opened(source, path) as file:
                for group, rows in enumerate(groups):
                    if start < rows:
                        yield from _rows(file, group, start, wanted, path)
                    start = max(start - rows, 0)

    def _rows(
        file: pq.ParquetFile, group: int, skip: int, wanted: list[str], path: str
    ) -> Iterator[Record | Unreadable]:
        done = 0
        for batch in file.iter_batches(_BATCH, row_groups=[group], columns=wanted):
            if done + batch.num_rows > skip:
                plain = {old: _values(batch.column(old), types[new], path) for old, new in renamed.items()}
                given = _labels(batch.column(options.label_column), path) if classes else []
                images = batch.column(options.image_column)
                for at in range(max(skip - done, 0), batch.num_rows):
                    fields = {new: plain[old][at] for old, new in renamed.items()}
                    number = classes[given[at]] if classes else 0
                    yield _record(f"{path}#{group}.{done + at}", images[at], number, options, fields)
            done += batch.num_rows

    return Contents(
        items,
        classes.names if classes else UNLABELLED,
        [source.stat(path) for path in paths],
        total=sum(map(sum, counts)),
        columns=types,
        form=options.form,
    )


@contextmanager
def _opened(source: Source, path: str) -> Iterator[pq.ParquetFile]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with source.open(path) as file:
            yield pq.ParquetFile(file, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is no Parquet file, or damaged: {str(error).splitlines()[0][:200]}") from error


def _check(schema: pa.Schema, options: ParquetOptions, columns: list[str], path: str) -> bool:
    """Checks that the wanted columns are there; returns whether there are labels."""
    for name in (options.image_column, *columns):
        if name not in schema.names:
            raise unknown_name("column", name, schema.names, where=path)
    default = type(options)().label_column
    if options.label_column not in schema.names and options.label_column != default:
        raise unknown_name("column", options.label_column, schema.names, where=path)
    return options.label_column in schema.names


def _row_groups(file: pq.ParquetFile, image_column: str, path: str) -> list[int]:
    """Rows of each row group; those whose images unpack to far too much are refused."""
    counts = []
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        for at in range(group.num_columns):
            column = group.column(at)
            unpacked, packed = column.total_uncompressed_size, max(column.total_compressed_size, 1)
            mine = column.path_in_schema.split(".")[0] == image_column
            if mine and unpacked > max(_RATIO_FREE, MAX_RATIO * packed):
                raise UserError(f"{path} unpacks to more than {MAX_RATIO} times its size: a decompression bomb")
        counts.append(group.num_rows)
    return counts


def _labels(column: pa.Array, path: str) -> list[int | str]:
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if column.null_count or not (
        pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)
    ):
        raise UserError(f"{path}: labels of type {kind}, or empty ones", allowed="whole numbers or text, none empty")
    return list(column.to_pylist())


def _column_type(kind: pa.DataType, name: str) -> ColumnType:
    import pyarrow as pa

    if pa.types.is_integer(kind):
        return "int64"
    if pa.types.is_floating(kind):
        return "float32"
    if pa.types.is_boolean(kind):
        return "bool"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "string"
    raise UserError(f"column {name} is of type {kind}", allowed="whole numbers, floats, truth values, text")


def _values(column: pa.Array, kind: ColumnType, path: str) -> list[Any]:
    if column.null_count:
        raise UserError(f"{path}: a column to keep has empty cells")
    if kind != "int64":
        return list(column.to_pylist())
    import pyarrow as pa

    try:
        return list(column.cast(pa.int64()).to_pylist())
    except pa.ArrowInvalid:
        raise UserError(f"{path}: numbers that do not fit into 64 bits") from None


def _record(
    file: str, cell: pa.Scalar, label: int, options: ParquetOptions, fields: dict[str, Any]
) -> Record | Unreadable:
    value = cell.as_py() if cell.is_valid else None
    if isinstance(value, dict):
        value = value.get("bytes")
    if isinstance(value, bytes):
        return record(file, value, label, options.form, fields)
    if not isinstance(value, list) or not value or len(value) > MAX_BYTES:
        return Unreadable(file, "no image in this cell")
    try:
        pixels = np.asarray(value)
        if pixels.dtype.kind not in "iu" or pixels.min() < 0 or pixels.max() > 255:
            return Unreadable(file, "its values are not whole numbers from 0 to 255")
    except (ValueError, OverflowError, TypeError) as error:
        return Unreadable(file, f"its rows have different lengths: {error}")
    pixels = pixels.astype(np.uint8)
    if pixels.ndim == 1:
        return record(file, pixels.tobytes(), label, options.form, fields)
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or not 0 < min(pixels.shape) <= max(pixels.shape) <= MAX_SIDE:
        return Unreadable(file, f"an array of shape {pixels.shape} is no image")
    height, width, channels = pixels.shape
    if options.form == "pixels":
        return Record(pixels, label, fields)
    return Record(Encoded(_png(pixels), (height, width, channels)), label, fields)


def _png(pixels: Any) -> bytes:
    """Pixels that came without a file, as the smallest file without loss."""
    import io

    from PIL import Image

    with io.BytesIO() as file:
        Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(file, "PNG")
        return file.getvalue()
