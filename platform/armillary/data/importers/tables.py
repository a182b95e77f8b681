"""CSV tables that name image files: pairs of images, or images with captions. The first line names the columns."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from armillary.data.importers.contents import UNLABELLED, Classes, Contents, read_record
from armillary.data.importers.options import CaptionsCsvOptions, PairsCsvOptions
from armillary.data.importers.pairs import Pair, pair_table
from armillary.data.importers.source import Source, safe_path
from armillary.data.store import Record, Unreadable
from armillary.spec.errors import UserError, unknown_name

if TYPE_CHECKING:
    import pyarrow as pa

_MAX_CELL = 100_000
_TRUE, _FALSE = ("1", "true", "same", "yes"), ("0", "false", "different", "no")


def read_pairs_csv(source: Source, options: PairsCsvOptions) -> Contents:
    """Every image that is named, once, in order of first mention; the pairs become the table ``pairs``.

    An image's class is its folder's name; images that lie in no folder are of one class.

    Raises:
        UserError: missing columns, paths that leave the source, answers that are neither true nor false.
    """
    source.need("a CSV file", folder=False)
    o, path = options, source.name
    position: dict[str, int] = {}
    pairs: list[Pair] = []
    folds = False
    lines = _lines(source, (o.first_column, o.second_column, o.same_column), (o.fold_column,))
    for where, row in lines:
        first, second = (_inside(o.images, row[column], where) for column in (o.first_column, o.second_column))
        answer, fold = row[o.same_column].strip().lower(), row.get(o.fold_column, "")
        if answer not in _TRUE + _FALSE:
            raise UserError(f"{o.same_column} is {answer[:80]!r}", where=where, allowed=", ".join(_TRUE + _FALSE))
        folds = folds or o.fold_column in row
        if fold and not (fold.isdigit() and len(fold) < 10):
            raise UserError(f"{o.fold_column} is {fold[:80]!r}", where=where, allowed="a whole number from 0 on")
        at = [position.setdefault(image, len(position)) for image in (first, second)]
        pairs.append(Pair(at[0], at[1], answer in _TRUE, int(fold or 0)))
    images = list(position)
    _some(images, path)
    labels = [image.removeprefix(f"{o.images}/").rpartition("/")[0] for image in images]
    classes = Classes(labels, path) if any(labels) else None

    def items(start: int) -> Iterator[Record | Unreadable]:
        for image, label in zip(images[start:], labels[start:], strict=True):
            yield read_record(source, image, classes[label] if classes else 0, o.form)

    def tables(row_of: Callable[[int], int]) -> Mapping[str, pa.Table]:
        return {"pairs": pair_table(pairs, row_of, folds=folds)}

    names = classes.names if classes else UNLABELLED
    return Contents(items, names, [source.stat(path)], total=len(images), tables=tables, form=o.form)


def read_captions_csv(source: Source, options: CaptionsCsvOptions) -> Contents:
    """One image a line, its text in the column ``caption``; an image with two captions stands on two lines.

    Raises:
        UserError: missing columns, paths that leave the source, lines without a label where others have one.
    """
    source.need("a CSV file", folder=False)
    o, path, total = options, source.name, 0
    labels: set[str] = set()
    needed, optional = (o.image_column, o.caption_column), (o.label_column,)
    for where, row in _lines(source, needed, optional):
        _inside(o.images, row[o.image_column], where)
        labels.add(row.get(o.label_column, ""))
        if "" in labels and len(labels) > 1:
            raise UserError(f"no {o.label_column}; other lines have one, or the other way round", where=where)
        total += 1
    _some(labels, path)
    classes = Classes(labels, path) if labels != {""} else None

    def items(start: int) -> Iterator[Record | Unreadable]:
        for number, (where, row) in enumerate(_lines(source, needed, optional)):
            if number >= start:
                label = classes[row[o.label_column]] if classes else 0
                image = _inside(o.images, row[o.image_column], where)
                yield read_record(source, image, label, o.form, {"caption": row[o.caption_column]})

    names, files = classes.names if classes else UNLABELLED, [source.stat(path)]
    return Contents(items, names, files, total=total, columns={"caption": "string"}, form=o.form)


def _lines(source: Source, needed: Sequence[str], optional: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """The lines of the CSV with the place of each, reduced to the wanted columns."""
    path = source.name
    reader = csv.DictReader(source.lines(path), strict=True)
    try:
        known = list(reader.fieldnames or [])
        if not known:
            raise UserError(f"{path} is empty", allowed=f"a first line that names columns: {', '.join(needed)} ...")
        for column in needed:
            if column not in known:
                raise unknown_name("column", column, known, where=path)
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row or None in row.values() or any(len(cell) > _MAX_CELL for cell in row.values()):
                raise UserError("more or fewer cells than columns, or a cell without an end", where=where)
            yield where, {column: row[column] for column in (*needed, *optional) if column in row}
    except csv.Error as error:
        raise UserError(f"{path} is no CSV of UTF-8 text: {error}") from error


def _inside(folder: str, image: str, where: str) -> str:
    path = safe_path(image, where)
    return f"{folder.rstrip('/')}/{path}" if folder else path


def _some(found: Sequence[str] | set[str], path: str) -> None:
    if not found:
        raise UserError(f"{path} names no images")
