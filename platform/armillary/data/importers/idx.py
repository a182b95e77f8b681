"""IDX, the format of MNIST and those that follow it (Y. LeCun, "The MNIST database", file formats), plain or gzipped.

Two zero bytes, the type of the values (8: uint8), the number of axes, each axis' length as big-endian 32 bits, values.
"""

from __future__ import annotations

import gzip
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from armillary.data.importers.contents import Classes, Contents
from armillary.data.importers.options import IdxOptions
from armillary.data.importers.source import Source, Unpacking
from armillary.data.layout import MAX_SIDE
from armillary.data.store import Record, Unreadable
from armillary.spec.errors import UserError

_IMAGES = re.compile(r"(?P<start>(?:.*[/-])?)images[.-]idx[34]-ubyte(?P<end>\.gz)?")
_MAX_IMAGES = 10**9
_BLOCK = 2**20


class _Part(NamedTuple):
    name: str
    images: str
    shape: tuple[int, ...]
    labels: NDArray[np.uint8]


def read_idx(
    source: Source, options: IdxOptions, class_names: Sequence[str] = (), credit: str = "", licence: str = ""
) -> Contents:
    """Reads a folder with ``<part>-images-idx3-ubyte`` and ``<part>-labels-idx1-ubyte``, both perhaps with ``.gz``.

    With several parts, the column ``part`` says which one an image is of: train or t10k.

    Raises:
        UserError: missing files, headers that promise what is not there or cannot be, a gzip bomb.
    """
    source.need("a folder of IDX files", folder=True)
    listing = {file.path: file for file in source.files()}
    parts, used = [], []
    for path in sorted(listing):
        match = _IMAGES.fullmatch(path)
        name = match["start"].rstrip("-").rpartition("/")[2] if match else ""
        if match and (options.part == "all" or name.endswith(options.part)):
            labels = _labels_of(match["start"], listing)
            parts.append(_open_part(source, name or "all", path, labels))
            used += [listing[path], listing[labels]]
    if not parts:
        allowed = "e.g. train-images-idx3-ubyte.gz and train-labels-idx1-ubyte.gz"
        raise UserError(f"{source.location} has no IDX images of the part {options.part!r}", allowed=allowed)
    # The training part first, as everybody counts.
    parts.sort(key=lambda part: (not part.name.endswith("train"), part.name))
    classes = Classes({int(label) for part in parts for label in np.unique(part.labels)}, source.location)
    names = tuple(class_names) or classes.names
    if len(names) != len(classes.names):
        raise UserError(f"{source.location} has {len(classes.names)} classes instead of {len(names)}")
    several = len(parts) > 1

    def items(start: int) -> Iterator[Record | Unreadable]:
        for part in parts:
            count = len(part.labels)
            if start < count:
                for image, label in zip(_images(source, part, start), part.labels[start:], strict=True):
                    yield Record(image, classes[int(label)], {"part": part.name} if several else {})
            start = max(start - count, 0)

    return Contents(
        items,
        names,
        used,
        total=sum(len(part.labels) for part in parts),
        columns={"part": "string"} if several else {},
        form="pixels",
        credit=credit,
        licence=licence,
    )


def _labels_of(start: str, listing: Mapping[str, object]) -> str:
    for path in (f"{start}labels{dot}idx1-ubyte{end}" for dot in ("-", ".") for end in ("", ".gz")):
        if path in listing:
            return path
    raise UserError(f"there are no labels to {start}images", allowed=f"{start}labels-idx1-ubyte, perhaps with .gz")


def _open_part(source: Source, name: str, images: str, labels: str) -> _Part:
    with _unpacked(source, labels) as stream:
        (count,) = _shape(stream, labels, axes=(1,))
        answers = np.frombuffer(_exactly(stream, count, labels), np.uint8)
        _ended(stream, labels)
    with _unpacked(source, images) as stream:
        shape = _shape(stream, images, axes=(3, 4))
    if shape[0] != count:
        raise UserError(f"{images} promises {shape[0]:,} images, {labels} has {count:,} labels")
    if not images.endswith(".gz"):
        size, wanted = source.stat(images).size, 4 + 4 * len(shape) + int(np.prod(shape, dtype=np.int64))
        if size != wanted:
            raise UserError(f"{images} has {size:,} bytes; its header promises {wanted:,}")
    return _Part(name, images, shape, answers)


@contextmanager
def _unpacked(source: Source, path: str) -> Iterator[Unpacking]:
    with source.open(path) as packed:
        stream = gzip.GzipFile(fileobj=packed) if path.endswith(".gz") else packed
        yield Unpacking(packed, cast(IO[bytes], stream), path)


def _shape(stream: Unpacking, path: str, axes: tuple[int, ...]) -> tuple[int, ...]:
    head = stream.read(4)
    if len(head) < 4 or head[:3] != b"\0\0\x08" or head[3] not in axes:
        raise UserError(f"{path} is no IDX file of uint8 with {' or '.join(map(str, axes))} axes")
    shape = struct.unpack(f">{head[3]}I", _exactly(stream, 4 * head[3], path))
    channels = shape[3] if len(shape) == 4 else 1
    if not 0 < shape[0] <= _MAX_IMAGES or not all(0 < side <= MAX_SIDE for side in shape[1:]) or channels not in (1, 3):
        raise UserError(f"{path} promises an array of {' x '.join(map(str, shape))}, which cannot be")
    return shape


def _exactly(stream: Unpacking, size: int, path: str) -> bytes:
    parts = []
    while size:
        part = stream.read(min(size, _BLOCK))
        if not part:
            raise UserError(f"{path} is cut off: {size:,} bytes are missing")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _ended(stream: Unpacking, path: str) -> None:
    if stream.read(1):
        raise UserError(f"{path} has more than its header promises")


def _images(source: Source, part: _Part, start: int) -> Iterator[NDArray[np.uint8]]:
    height, width = part.shape[1:3]
    shape = (height, width, part.shape[3] if len(part.shape) == 4 else 1)
    size = int(np.prod(shape))
    with _unpacked(source, part.images) as stream:
        stream.seek(4 + 4 * len(part.shape) + start * size)
        for _ in range(start, part.shape[0]):
            yield np.frombuffer(_exactly(stream, size, part.images), np.uint8).reshape(shape)
        _ended(stream, part.images)
