"""NPZ archives: an array of images, one of labels, perhaps more. Arrays are read from the archive in parts."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from armillary.data.importers.contents import UNLABELLED, Classes, Contents, unique
from armillary.data.importers.options import NpzOptions
from armillary.data.importers.source import Source, Unpacking
from armillary.data.layout import MAX_SIDE, ColumnType
from armillary.data.store import Record, Unreadable
from armillary.spec.errors import UserError, unknown_name

_MAX_HEADER = 10_000
_BLOCK = 2**20
_COLUMN_LIMIT = 2**31


class _Array(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    start: int


def read_npz(source: Source, options: NpzOptions) -> Contents:
    """Reads ``images``, uint8 or floats in [0, 1], and ``labels``.

    Images are ``(N, H, W)``, ``(N, H, W, C)`` or ``(N, C, H, W)``. Floats are stretched to 0..255 and rounded.

    Raises:
        UserError: missing arrays, arrays of Python objects, other types or shapes, a damaged archive, a bomb.
    """
    source.need("an .npz file", folder=False)
    path = source.name
    with _archive(source) as archive:
        names = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        for key in (options.images_key, *(column.partition("=")[0] for column in options.columns)):
            if key not in names:
                raise unknown_name("array", key, list(names), where=path)
        with _entry(archive, options.images_key, path) as stream:
            images = _header(stream, f"{path}:{options.images_key}")
        count = images.shape[0] if images.shape else 0
        labels = _column(archive, options.labels_key, path, count) if options.labels_key in names else None
        wanted = {column.partition("=")[2] or column.partition("=")[0]: column for column in options.columns}
        unique(wanted, "--columns")
        columns = {new: _column(archive, column.partition("=")[0], path, count) for new, column in wanted.items()}
    shape, channels_first = _image_shape(images, options, path)
    answers = None if labels is None else labels.tolist()
    classes = None if answers is None else Classes(answers, f"{path}:{options.labels_key}")

    def items(start: int) -> Iterator[Record | Unreadable]:
        for number, image in enumerate(_images(source, options, images, start), start=start):
            pixels = image.reshape(shape[2], *shape[:2]).transpose(1, 2, 0) if channels_first else image.reshape(shape)
            fields = {name: values[number].item() for name, values in columns.items()}
            yield Record(pixels, classes[answers[number]] if classes and answers else 0, fields)

    types = {name: _column_type(values, f"{path}:{name}") for name, values in columns.items()}
    names_of_classes, files = classes.names if classes else UNLABELLED, [source.stat(path)]
    return Contents(items, names_of_classes, files, total=count, columns=types, form="pixels")


@contextmanager
def _archive(source: Source) -> Iterator[zipfile.ZipFile]:
    with source.open(source.name) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                yield archive
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
            raise UserError(f"{source.name} is no NPZ archive, or damaged: {error}") from error


@contextmanager
def _entry(archive: zipfile.ZipFile, key: str, path: str) -> Iterator[Unpacking]:
    info = archive.NameToInfo.get(f"{key}.npy") or archive.getinfo(key)
    with archive.open(info) as stream:
        yield Unpacking(cast(IO[bytes], _Packed(info.compress_size)), stream, f"{path}:{key}")


class _Packed:
    """What a zip entry takes up, in the place of a position in it."""

    def __init__(self, size: int) -> None:
        self._size = size

    def tell(self) -> int:
        return self._size


def _header(stream: Unpacking, where: str) -> _Array:
    from numpy.lib import format as npy

    try:
        version = npy.read_magic(cast(Any, stream))
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
        if read is None:
            raise UserError(f"{where}: version {version} of the NPY format", allowed="1.0 or 2.0")
        shape, fortran, dtype = read(cast(Any, stream), max_header_size=_MAX_HEADER)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise UserError(f"{where} is no NumPy array: {str(error)[:200]}") from error
    if dtype.hasobject:
        raise UserError(f"{where} holds Python objects, which are pickles and can run code", allowed="numbers or text")
    if fortran and len(shape) > 1:
        raise UserError(f"{where} is in Fortran order", hint="save numpy.ascontiguousarray(...)")
    if any(side < 0 or side > 2**40 for side in shape):
        raise UserError(f"{where} has the shape {shape}, which cannot be")
    return _Array(tuple(shape), dtype, stream.tell())


def _exactly(stream: Unpacking, size: int, where: str) -> bytes:
    parts = []
    while size:
        part = stream.read(min(size, _BLOCK))
        if not part:
            raise UserError(f"{where} is cut off: {size:,} bytes are missing")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _column(archive: zipfile.ZipFile, key: str, path: str, count: int) -> NDArray[Any]:
    where = f"{path}:{key}"
    with _entry(archive, key, path) as stream:
        array = _header(stream, where)
        size = array.dtype.itemsize * count
        if array.shape != (count,) or array.dtype.kind not in "iubfU" or size > _COLUMN_LIMIT:
            raise UserError(f"{where} is {array.dtype} of shape {array.shape}", allowed=f"{count} numbers or texts")
        return np.frombuffer(_exactly(stream, size, where), array.dtype)


def _column_type(values: NDArray[Any], where: str) -> ColumnType:
    types: dict[str, ColumnType] = {"i": "int64", "u": "int64", "b": "bool", "f": "float32", "U": "string"}
    if values.dtype == np.uint64:
        raise UserError(f"{where} is uint64", allowed="int64 or smaller")
    return types[values.dtype.kind]


def _image_shape(images: _Array, options: NpzOptions, path: str) -> tuple[tuple[int, int, int], bool]:
    """An image's height, width and channels, and whether channels come first."""
    where, sides = f"{path}:{options.images_key}", images.shape[1:]
    real = images.dtype == np.uint8 or images.dtype.kind == "f"
    if not real or len(sides) not in (2, 3) or not images.shape[0]:
        found = f"{images.dtype} of shape {images.shape}"
        raise UserError(f"{where} is {found}", allowed="uint8 or float, (N, H, W), (N, H, W, C) or (N, C, H, W)")
    last = len(sides) == 2 or sides[-1] in (1, 3)
    first = not last if options.layout == "auto" else options.layout == "NCHW" and len(sides) == 3
    height, width, channels = (*sides, 1) if len(sides) == 2 else (*sides[1:], sides[0]) if first else sides
    if channels not in (1, 3) or not 0 < min(height, width) <= max(height, width) <= MAX_SIDE:
        raise UserError(f"{where} of shape {images.shape} has images of {height} x {width} x {channels}",
                        allowed="1 or 3 channels", hint="--layout NHWC or NCHW")  # fmt: skip
    return (height, width, channels), first


def _images(source: Source, options: NpzOptions, images: _Array, start: int) -> Iterator[NDArray[np.uint8]]:
    where = f"{source.name}:{options.images_key}"
    size = int(np.prod(images.shape[1:])) * images.dtype.itemsize
    with _archive(source) as archive, _entry(archive, options.images_key, source.name) as stream:
        stream.seek(images.start + start * size)
        for number in range(start, images.shape[0]):
            image = np.frombuffer(_exactly(stream, size, where), images.dtype)
            if images.dtype != np.uint8:
                if not (np.isfinite(image).all() and image.min() >= 0 and image.max() <= 1):
                    raise UserError(f"{where}: image {number} has values outside [0, 1]", hint="save it as uint8")
                image = np.rint(image.astype(np.float64) * 255).astype(np.uint8)
            yield image
