"""A folder of images with one subfolder a class, and LFW: the same with a list of pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from armillary.data.images import SUFFIXES
from armillary.data.importers.contents import Contents, read_record
from armillary.data.importers.options import ImageOptions, LfwOptions
from armillary.data.importers.pairs import Pair, pair_table
from armillary.data.importers.source import Source
from armillary.data.store import Record, Unreadable
from armillary.spec.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa


def read_folder(source: Source, options: ImageOptions) -> Contents:
    """``source/<class>/**/<image>``: classes by name, images by path; what cannot be read is reported, not imported.

    Raises:
        UserError: not a folder, no class folders in it, or a symbolic link that leads out of it.
    """
    source.need("a folder of images", folder=True)
    everything = source.files()
    files = [file for file in everything if "/" in file.path and file.path.lower().endswith(SUFFIXES)]
    # A class folder without one image still is a class; an object store knows no empty folders.
    classes = sorted({file.path.split("/")[0] for file in everything if "/" in file.path})
    if not classes:
        raise UserError(f"{source.location} has no class folders", allowed="FOLDER/<class>/<image>.png")
    label = {name: number for number, name in enumerate(classes)}

    def items(start: int) -> Iterator[Record | Unreadable]:
        for file in files[start:]:
            yield read_record(source, file.path, label[file.path.split("/")[0]], options.form)

    return Contents(items, classes, files, total=len(files), form=options.form)


def read_lfw(source: Source, options: LfwOptions) -> Contents:
    """Labeled Faces in the Wild: ``<person>/<person>_0001.jpg`` and a list of pairs, which becomes the table ``pairs``.

    Both forms of list are known (Huang et al., University of Massachusetts, Technical Report 07-49): ``pairs.txt``
    starts with the folds and the pairs of each kind in a fold, ``pairsDevTest.txt`` with the pairs of each kind only.
    A line of three fields is a pair of one person, one of four a pair of two people. Pairs with an image that cannot
    be read are left out.

    Raises:
        UserError: what :func:`read_folder` says; a list that does not hold what its first line promises, or that names
            images that are not there.
    """
    contents = read_folder(source, options)
    position = {}
    for at, file in enumerate(contents.files):
        person, _, image = file.path.rpartition("/")
        position[person, image.rpartition(".")[0]] = at
    pairs = _lfw_pairs(source, options.pairs, position)

    def tables(row_of: Callable[[int], int]) -> Mapping[str, pa.Table]:
        return {"pairs": pair_table(pairs, row_of, folds=True)}

    files = [*contents.files, source.stat(options.pairs)]
    return replace(contents, tables=tables, files=files)


def _lfw_pairs(source: Source, path: str, position: Mapping[tuple[str, str], int]) -> list[Pair]:
    def locate(person: str, number: str) -> int:
        try:
            return position[person, f"{person}_{int(number):04d}"]
        except (ValueError, KeyError):
            raise UserError(f"there is no image {number!r} of {person!r}", where=where) from None

    where = path
    lines = source.lines(path)
    head = next(lines, "").split()
    if len(head) not in (1, 2) or not all(part.isdigit() and 0 < int(part) < 10**7 for part in head):
        raise UserError(f"{path} starts with {' '.join(head)[:80]!r}", allowed="`FOLDS PAIRS` or `PAIRS`")
    folds, each = (int(head[0]), int(head[1])) if len(head) == 2 else (1, int(head[0]))
    pairs: list[Pair] = []
    for number, line in enumerate(lines):
        fields = line.rstrip("\r\n").split("\t") if "\t" in line else line.split()
        where = f"{path}:{number + 2}"
        if not "".join(fields).strip():
            continue
        if len(fields) not in (3, 4):
            raise UserError(f"{line[:80]!r} is no pair", where=where, allowed="3 or 4 fields")
        same = len(fields) == 3
        second = fields[0] if same else fields[2]
        first = locate(fields[0], fields[1])
        pairs.append(Pair(first, locate(second, fields[-1]), same, len(pairs) // (2 * each)))
    alike = sum(pair.same for pair in pairs)
    if (alike, len(pairs)) != (folds * each, 2 * folds * each):
        found = f"{alike} pairs of one person and {len(pairs) - alike} of two"
        raise UserError(f"{path} holds {found}", allowed=f"{folds * each} of each, by its first line")
    return pairs
