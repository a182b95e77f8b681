"""What an importer finds in a source, and the parts that importers share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from armillary.data.images import UnreadableImage, decode_image
from armillary.data.importers.options import Options
from armillary.data.importers.source import Source, SourceFile
from armillary.data.layout import ColumnType, Encoded, Form, Record, Unreadable
from armillary.data.store import Dataset, Items, Tables, write_dataset
from armillary.spec.errors import UserError

# (images done, images in all or None when unknown)
Progress = Callable[[int, int | None], None]

# The class of images that come without one.
UNLABELLED = ("unlabelled",)


@dataclass(frozen=True)
class Contents:
    """A source, looked through but not read yet.

    ``items(start)`` yields one record or one unreadable thing for each position from ``start`` on, always the same
    ones. ``files`` are those that the result depends on.
    """

    items: Items
    class_names: Sequence[str]
    files: Sequence[SourceFile]
    total: int | None = None
    columns: Mapping[str, ColumnType] = field(default_factory=dict)
    tables: Tables | None = None
    form: Form = "encoded"
    credit: str = ""
    licence: str = ""


class Classes:
    """Class numbers for the labels of a source: whole numbers in their order, else text in alphabetical order.

    Raises:
        UserError: no label at all, or labels of both kinds.
    """

    def __init__(self, labels: Iterable[int | str], where: str) -> None:
        distinct = set(labels)
        kinds = {type(label) for label in distinct}
        if kinds not in ({int}, {str}):
            found = "none" if not kinds else "whole numbers and text mixed"
            raise UserError(f"labels must be whole numbers or text, found {found}", where=where)
        self.whole = kinds == {int}
        self.names = tuple(str(label) for label in sorted(distinct))
        self._number = {label: number for number, label in enumerate(sorted(distinct))}

    def __getitem__(self, label: int | str) -> int:
        return self._number[label]


def record(file: str, data: bytes, label: int, form: Form, fields: dict[str, Any] | None = None) -> Record | Unreadable:
    """A record of an image file's bytes; decoding them here is what finds the damaged ones."""
    try:
        pixels = decode_image(data)
    except UnreadableImage as error:
        return Unreadable(file, str(error))
    height, width, channels = pixels.shape
    return Record(Encoded(data, (height, width, channels)) if form == "encoded" else pixels, label, fields or {})


def read_record(source: Source, path: str, label: int, form: Form, fields: dict[str, Any] | None = None) -> Any:
    """The record of an image file in a source."""
    try:
        data = source.read(path)
    except UnreadableImage as error:
        return Unreadable(path, str(error))
    return record(path, data, label, form, fields)


def unique(names: Iterable[str], where: str, reserved: Iterable[str] = ()) -> None:
    """Checks that columns have different names, other than the store's own.

    Raises:
        UserError: they do not.
    """
    taken = {"image", "label", "index", "height", "width", "channels", *reserved}
    for name in names:
        if name in taken:
            raise UserError(f"a second column {name!r}", where=where, hint=f"rename it: {name}=NEW_NAME")
        taken.add(name)


def store(name: str, contents: Contents, source: Source, options: Options, progress: Progress) -> Dataset:
    """Writes what an importer found into the store; a killed import of the same source goes on."""
    listing = hashlib.sha256()
    for file in contents.files:
        listing.update(json.dumps([file.path, file.size, file.changed]).encode())
    identity = {
        "kind": source.kind,
        "source": source.location,
        "options": options.model_dump(mode="json"),
        "files": listing.hexdigest(),
        "classes": hashlib.sha256(json.dumps(list(contents.class_names)).encode()).hexdigest(),
        "columns": dict(contents.columns),
    }

    def items(start: int) -> Iterator[Record | Unreadable]:
        for done, item in enumerate(contents.items(start), start=start + 1):
            yield item
            progress(done, contents.total)

    return write_dataset(
        name,
        items,
        class_names=contents.class_names,
        columns=contents.columns,
        tables=contents.tables,
        form=contents.form,
        credit=contents.credit,
        licence=contents.licence,
        identity=json.dumps(identity, sort_keys=True),
    )
