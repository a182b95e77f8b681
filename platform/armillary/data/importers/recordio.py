"""InsightFace's RecordIO: ``train.rec`` and ``train.idx`` as MS1MV3 and Glint360K ship, read without MXNet.

A record (dmlc-core, ``recordio.h``) is the magic word, a word of three bits ``cflag`` and 29 bits of length, the data,
and zeros up to a multiple of four bytes. Data that holds the magic word is split there into parts of cflag 1, 2..., 3;
whoever reads puts the word back between them. The data starts with MXNet's ``IRHeader``: flag, label, two ids; with a
flag above 0, that many float32 labels follow and stand for the one in the header. Then comes the image file.

InsightFace's record 0 is no image. Its two labels are the first key after the images and the key after the last
identity; the records between tell which images a person has, and are not needed here.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from typing import IO, NamedTuple

from armillary.data.images import MAX_BYTES
from armillary.data.importers.contents import Classes, Contents, record
from armillary.data.importers.options import ImageOptions
from armillary.data.importers.source import Source
from armillary.data.store import Record, Unreadable
from armillary.spec.errors import UserError

MAGIC = 0xCED7230A
_MAGIC_BYTES = struct.pack("<I", MAGIC)
_WORDS = struct.Struct("<II")
_HEADER = struct.Struct("<IfQQ")
# Labels are float32, which cannot tell neighbours beyond 2**24 apart; keys in the first record reach further.
_MAX_LABEL = 2**31
_MAX_LABELS = 1024


class _Header(NamedTuple):
    labels: tuple[float, ...]
    size: int


def read_recordio(source: Source, options: ImageOptions) -> Contents:
    """Reads a ``.rec`` file, or a folder with one, beside its ``.idx``.

    Raises:
        UserError: no such file, or records and index that do not fit together.
    """
    source.need("a .rec file or a folder with one")
    path = source.name if source.is_file else source.matching("*.rec", "records")
    if not path.endswith(".rec"):
        raise UserError(f"{path} is not a .rec file", hint="give the folder, or its .rec file")
    index_path = path[: -len(".rec")] + ".idx"
    size = source.stat(path).size
    keys, offsets = _read_index(source, index_path, size)
    with source.open(path) as file:
        _read_record(file, max(offsets), path)
        if file.tell() + -file.tell() % 4 != size:
            raise UserError(f"{index_path} does not reach the end of {path}: one of them is cut off or damaged")
        first = _header(_read_record(file, offsets[0], path), path) if keys[0] == 0 else None
        if first is not None and len(first.labels) == 2:
            end, last = (_whole(label, path, offsets[0]) for label in first.labels)
            count = sum(1 for key in keys if 0 < key < end)
            if not 0 < end <= last or count != end - 1:
                raise UserError(f"{path}: its first record promises {end - 1} images, {index_path} has {count}")
            offsets = array("q", (offset for key, offset in zip(keys, offsets, strict=True) if 0 < key < end))
            names: Classes | None = None
            class_names = tuple(str(label) for label in range(_people(path, last - end, offsets)))
        else:
            names = Classes((_label(file, offset, path) for offset in offsets), path)
            class_names = names.names

    def items(start: int) -> Iterator[Record | Unreadable]:
        with source.open(path) as file:
            for offset in offsets[start:]:
                data = _read_record(file, offset, path)
                header = _header(data, path)
                label = _whole(header.labels[0], path, offset)
                if names is None and label >= len(class_names):
                    raise UserError(f"{path}: label {label} at byte {offset}; there are {len(class_names)} people")
                number = label if names is None else names[label]
                yield record(f"{path}@{offset}", data[header.size :], number, options.form)

    files = [source.stat(path), source.stat(index_path)]
    return Contents(items, class_names, files, total=len(offsets), form=options.form)


def _people(path: str, people: int, offsets: array[int]) -> int:
    if not 0 < people <= len(offsets):
        raise UserError(f"{path}: its first record promises {people} people in {len(offsets)} images")
    return people


def _read_index(source: Source, path: str, size: int) -> tuple[array[int], array[int]]:
    keys, offsets = array("q"), array("q")
    for number, line in enumerate(source.lines(path), start=1):
        try:
            key, offset = (int(part) for part in line.split())
        except ValueError:
            raise UserError(f"{path}:{number} is not `key offset`: the index is damaged") from None
        if not (0 <= key < 2**62 and 0 <= offset <= size - _WORDS.size):
            where = f"{path}:{number}"
            raise UserError(f"record {key} at byte {offset} is outside the {size:,} bytes", where=where)
        keys.append(key)
        offsets.append(offset)
    if not keys:
        raise UserError(f"{path} is empty")
    return keys, offsets


def _read_record(file: IO[bytes], offset: int, path: str, limit: int | None = None) -> bytes:
    """The data of the record at an offset, joined where it was split; with a limit, only its first bytes."""
    file.seek(offset)
    parts: list[bytes] = []
    length = 0
    while True:
        words = file.read(_WORDS.size)
        if len(words) < _WORDS.size:
            raise UserError(f"{path} is cut off: no record at byte {offset}")
        magic, word = _WORDS.unpack(words)
        if magic != MAGIC:
            raise UserError(f"{path} is damaged: no record starts at byte {offset}")
        flag, size = word >> 29, word & (2**29 - 1)
        if flag not in ((0, 1) if not parts else (2, 3)):
            raise UserError(f"{path} is damaged: a part {flag} of a split record at byte {offset}")
        length += size
        if length > MAX_BYTES:
            raise UserError(f"{path} is damaged: a record of {length:,} bytes at byte {offset}")
        wanted = size if limit is None else min(size, limit)
        part = file.read(wanted)
        if len(part) < wanted:
            raise UserError(f"{path} is cut off: the record at byte {offset} has no end")
        parts.append(part)
        if flag in (0, 3) or limit is not None:
            return _MAGIC_BYTES.join(parts)
        file.seek(-size % 4, 1)


def _header(data: bytes, path: str) -> _Header:
    if len(data) < _HEADER.size:
        raise UserError(f"{path} is damaged: a record of {len(data)} bytes has no header")
    flag, label, _, _ = _HEADER.unpack_from(data)
    if flag == 0:
        return _Header((label,), _HEADER.size)
    if flag > _MAX_LABELS or len(data) < _HEADER.size + 4 * flag:
        raise UserError(f"{path} is damaged: a record of {len(data)} bytes with {flag} labels")
    return _Header(struct.unpack_from(f"<{flag}f", data, _HEADER.size), _HEADER.size + 4 * flag)


def _label(file: IO[bytes], offset: int, path: str) -> int:
    data = _read_record(file, offset, path, limit=_HEADER.size + 4 * _MAX_LABELS)
    return _whole(_header(data, path).labels[0], path, offset)


def _whole(label: float, path: str, offset: int) -> int:
    if not (0 <= label <= _MAX_LABEL and label == int(label)):
        raise UserError(f"{path}: label {label} at byte {offset}", allowed=f"whole numbers from 0 to {_MAX_LABEL}")
    return int(label)
