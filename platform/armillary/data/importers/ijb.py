"""IJB-B and IJB-C: single face crops, templates of several crops, and comparisons of templates.

The lists are those that the field passes around (Whitelam et al. 2017, "IARPA Janus Benchmark-B Face Dataset", CVPR
workshops; Maze et al. 2018, "IARPA Janus Benchmark-C", ICB; in the layout of InsightFace's evaluation): a line
``image template media`` for every crop of a template, and a line ``template template same`` for every comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from armillary.data.importers.contents import Contents, read_record
from armillary.data.importers.options import IjbOptions
from armillary.data.importers.source import Source, safe_path
from armillary.data.store import Record, Unreadable
from armillary.spec.errors import UserError

if TYPE_CHECKING:
    from array import array

    import pyarrow as pa


def read_ijb(source: Source, options: IjbOptions) -> Contents:
    """Reads crops and lists; they become the tables ``templates`` (row, template, media) and ``matches``.

    ``matches`` holds template numbers ``first`` and ``second``, and ``same``. An image's class is the first template
    that it belongs to; who is on it the lists do not say. A crop that cannot be read leaves its template.

    Raises:
        UserError: missing or damaged lists, a crop outside the folder, a comparison of an unknown template.
    """
    source.need("a folder with IJB's images and lists", folder=True)
    templates_file = source.matching(options.templates, "list of templates")
    matches_file = source.matching(options.matches, "list of comparisons")
    images, numbers = _read_templates(source, templates_file)
    matches = _read_matches(source, matches_file, set(numbers[1]))
    paths = list(images)
    folder = safe_path(options.images, "--images")
    classes = sorted(set(images.values()))
    label = {template: number for number, template in enumerate(classes)}

    def items(start: int) -> Iterator[Record | Unreadable]:
        for path in paths[start:]:
            yield read_record(source, f"{folder}/{path}", label[images[path]], options.form)

    def tables(row_of: Callable[[int], int]) -> Mapping[str, pa.Table]:
        import pyarrow as pa

        kept = [(row, at) for at, row in enumerate(row_of(position) for position in numbers[0]) if row >= 0]
        templates = {
            "row": pa.array([row for row, _ in kept], pa.int64()),
            "template": pa.array([numbers[1][at] for _, at in kept], pa.int64()),
            "media": pa.array([numbers[2][at] for _, at in kept], pa.int64()),
        }
        first, second, same = (pa.array(column, pa.int64()) for column in matches)
        return {
            "templates": pa.table(templates),
            "matches": pa.table({"first": first, "second": second, "same": same.cast(pa.bool_())}),
        }

    files = [source.stat(templates_file), source.stat(matches_file)]
    names = [str(template) for template in classes]
    return Contents(items, names, files, total=len(paths), tables=tables, form=options.form)


def _read_templates(source: Source, path: str) -> tuple[dict[str, int], tuple[array[int], array[int], array[int]]]:
    """The first template of each image, and for every line: the image's position, template and media."""
    from array import array

    images: dict[str, int] = {}
    position: dict[str, int] = {}
    columns = array("q"), array("q"), array("q")
    for number, line in enumerate(source.lines(path), start=1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) != 3:
            raise UserError(f"{line[:80]!r}", where=f"{path}:{number}", allowed="image template media")
        image = safe_path(fields[0], f"{path}:{number}")
        template, media = _numbers(fields[1:], f"{path}:{number}")
        images.setdefault(image, template)
        columns[0].append(position.setdefault(image, len(position)))
        columns[1].append(template)
        columns[2].append(media)
    if not images:
        raise UserError(f"{path} is empty")
    return images, columns


def _read_matches(source: Source, path: str, known: set[int]) -> tuple[array[int], array[int], array[int]]:
    from array import array

    columns = array("q"), array("q"), array("q")
    for number, line in enumerate(source.lines(path), start=1):
        fields = line.split()
        if not fields:
            continue
        where = f"{path}:{number}"
        if len(fields) != 3 or fields[2] not in ("0", "1"):
            raise UserError(f"{line[:80]!r}", where=where, allowed="template template 1, or 0 for two people")
        first, second, same = _numbers(fields, where)
        if first not in known or second not in known:
            raise UserError(f"there is no template {first if first not in known else second}", where=where)
        for column, value in zip(columns, (first, second, same), strict=True):
            column.append(value)
    return columns


def _numbers(fields: list[str], where: str) -> list[int]:
    try:
        numbers = [int(field) for field in fields]
    except ValueError:
        raise UserError(f"{' '.join(fields)[:80]!r} are not whole numbers", where=where) from None
    if not all(0 <= number < 2**62 for number in numbers):
        raise UserError(f"{' '.join(fields)[:80]!r} are out of range", where=where)
    return numbers
