"""Edge lists: text files with one edge a line, as interactions (user, item) or any graph of two kinds of nodes."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from itertools import islice

import numpy as np

from armillary.data.importers.contents import Classes, Contents
from armillary.data.importers.options import EdgesOptions
from armillary.data.importers.source import Source
from armillary.data.layout import Record
from armillary.spec.errors import UserError

_SEPARATORS = {"comma": ",", "tab": "\t", "semicolon": ";", "space": None}
_COMMENTS = ("#", "%")
_MAX_ID = 200
# Lines that tell whether the first one names columns, and what stands between cells.
_LOOKED_AT = 2


def read_edges(source: Source, options: EdgesOptions) -> Contents:
    """One sample an edge: its class is the node in the first column, its column ``item`` the number of the second.

    Further columns (ratings, times) are left out, empty lines and those that begin with ``#`` or ``%`` too. Nodes whose
    names are all whole numbers are numbered in that order, others alphabetically; only their names are held in memory.

    Raises:
        UserError: no edges, a line with fewer than two cells, or a name that is too long.
    """
    source.need("a text file of edges", folder=False)
    path = source.name
    users: set[str] = set()
    items: set[str] = set()
    total = 0
    for user, item in read_pairs(source, options):
        users.add(user)
        items.add(item)
        total += 1
    if not total:
        raise UserError(f"{path} holds no edges", allowed="lines of: user, item")
    classes, numbers = _numbered(users, path), _numbered(items, path)
    blank = np.zeros((1, 1, 1), np.uint8)

    def records(start: int) -> Iterator[Record]:
        for user, item in islice(read_pairs(source, options), start, None):
            yield Record(blank, classes[_name(user, classes)], {"item": numbers[_name(item, numbers)]})

    return Contents(records, classes.names, [source.stat(path)], total=total, columns={"item": "int64"}, form="pixels")


def _numbered(names: set[str], path: str) -> Classes:
    whole = all(name.isascii() and name.isdigit() and str(int(name)) == name for name in names)
    return Classes((int(name) for name in names) if whole else names, path)


def _name(name: str, classes: Classes) -> int | str:
    return int(name) if classes.whole else name


def read_pairs(source: Source, options: EdgesOptions) -> Iterator[tuple[str, str]]:
    """The names in the first two cells of every edge; see :func:`read_cells`."""
    for _, cells in read_cells(source, options):
        yield cells[0], cells[1]


def read_cells(source: Source, options: EdgesOptions) -> Iterator[tuple[str, list[str]]]:
    """The cells of every edge, the first two filled, and where they stand.

    Raises:
        UserError: a line with fewer than two cells, or a name that is too long.
    """
    path = source.name
    first = list(islice(_lines(source), _LOOKED_AT))
    separator = _separator(first[0][1] if first else "", options.separator)
    header = options.header == "yes" or (options.header == "auto" and _names_columns(first, separator))
    for number, line in islice(_lines(source), int(header), None):
        cells = _cells(line, separator)
        where = f"{path}:{number}"
        if len(cells) < 2 or not all(cells[:2]):
            raise UserError(f"fewer than two cells: {line[:80]!r}", where=where, allowed="user, item")
        if max(map(len, cells[:2])) > _MAX_ID:
            raise UserError(f"a name of more than {_MAX_ID} letters", where=where)
        yield where, cells


def _lines(source: Source) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(source.lines(source.name), start=1):
        text = line.strip()
        if text and not text.startswith(_COMMENTS):
            yield number, text


def _separator(line: str, wanted: str) -> str | None:
    """What stands between cells; ``None`` for any white space."""
    if wanted != "auto":
        return _SEPARATORS[wanted]
    return next((sign for sign in ("\t", ",", ";") if sign in line), None)


def _names_columns(lines: list[tuple[int, str]], separator: str | None) -> bool:
    """Whether the first line holds words where the second holds numbers."""
    if len(lines) < _LOOKED_AT:
        return False
    words, numbers = (_cells(line, separator)[:2] for _, line in lines)
    return not any(cell.isdigit() for cell in words) and bool(numbers) and all(cell.isdigit() for cell in numbers)


def _cells(line: str, separator: str | None) -> list[str]:
    if separator is None:
        return line.split()
    return [cell.strip() for cell in next(csv.reader([line], delimiter=separator))]
