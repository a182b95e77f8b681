"""The dataset store: one folder (or S3 prefix) of Parquet shards and a manifest.

::

    <datasets>/<name>/
      manifest.json          Manifest: counts, classes, shards, tables, fingerprint, credits
      shard-00000.parquet    image, height, width, channels, label, index and the optional columns
      tables/pairs.parquet   extra tables, if there are any: pairs, templates, a graph
      quarantine.jsonl       one line for every source file that could not be read, if there were any

Images are kept in one of two forms: ``pixels`` (uint8, height x width x channels, compressed by Parquet, so that
reading needs no codec) or ``encoded`` (the JPEG or PNG bytes as they came, decoded when read). A folder without
``manifest.json`` is not a dataset: it is written last, into a temporary folder that is renamed when everything is
there. On S3, where nothing can be renamed, it is written last too.

Object stores other than Amazon's are reached as usual: ``AWS_ENDPOINT_URL``, ``AWS_ACCESS_KEY_ID``,
``AWS_SECRET_ACCESS_KEY``, ``AWS_DEFAULT_REGION``.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from armillary.data.layout import (
    ColumnType,
    Encoded,
    Fingerprint,
    Form,
    Manifest,
    Record,
    Rows,
    Shard,
    Unreadable,
    dataset_location,
    filesystem_of,
    table_columns,
)
from armillary.data.reading import Damaged, ShardReader
from armillary.data.writing import JOURNAL, ShardWriter, place_to_write, publish, release, write_bytes
from armillary.spec.errors import UserError, nearest, unknown_name
from armillary.spec.home import datasets_dir

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import fs

__all__ = [
    "Dataset",
    "Encoded",
    "Manifest",
    "Record",
    "Rows",
    "Unreadable",
    "dataset_exists",
    "list_datasets",
    "open_dataset",
    "write_dataset",
]

_MANIFEST_LIMIT = 256 * 2**20

# What an importer yields, from a position of its source on; one thing for each position, readable or not.
Items = Callable[[int], Iterator[Record | Unreadable]]
# Extra tables, or how to make them once it is known which row every position of the source has (-1: left out).
Tables = Mapping[str, "pa.Table"] | Callable[[Callable[[int], int]], Mapping[str, "pa.Table"]]


class Dataset:
    """A dataset in the store, opened for reading. May be shared by threads."""

    def __init__(self, location: str, manifest: Manifest) -> None:
        self.location, self.manifest = location, manifest
        self._filesystem, self._root = filesystem_of(location)
        classes = len(manifest.class_names)
        self._reader = ShardReader(self._filesystem, self._root, manifest.columns, classes, manifest.form)

    @property
    def name(self) -> str:
        """The name it was imported under."""
        return self.manifest.name

    @property
    def fingerprint(self) -> str:
        """sha256 over the content."""
        return self.manifest.fingerprint

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The Parquet files: name, rows, bytes, rows of each row group (``group_rows``)."""
        return self.manifest.shards

    def __len__(self) -> int:
        return self.manifest.images

    def rows(self) -> Iterator[Rows]:
        """All rows in order of ``index``, one row group at a time.

        Raises:
            UserError: a shard is missing, damaged, or not what the manifest says.
        """
        for shard, table in self._tables():
            with self._blame():
                yield self._reader.rows(table, shard)

    def read_shard(self, number: int) -> Rows:
        """All rows of a shard, decoded.

        Raises:
            IndexError: there is no such shard.
            UserError: it is missing, damaged, or not what the manifest says.
        """
        with self._blame():
            return self._reader.rows(self._reader.table(self.shards[number]), self.shards[number])

    def read_group(self, shard: int, group: int) -> Rows:
        """The rows of one row group of a shard, decoded; ``shards[shard].group_rows`` tells how many there are.

        Raises:
            IndexError: there is no such shard or row group.
            UserError: the shard is missing, damaged, or not what the manifest says.
        """
        self.shards[shard].group_rows[group]
        with self._blame():
            return self._reader.rows(self._reader.table(self.shards[shard], group), self.shards[shard])

    def read_arrow(self, shard: int, group: int | None = None, columns: Sequence[str] | None = None) -> pa.Table:
        """A shard or a row group as stored, without decoding; all columns or the named ones.

        Raises:
            UserError: the shard is missing, damaged, or not what the manifest says.
        """
        with self._blame():
            return self._reader.table(self.shards[shard], group, columns)

    def column(self, name: str) -> NDArray[Any]:
        """One column of all rows: ``label``, ``height``, ``width``, ``channels`` or an optional one.

        Raises:
            UserError: there is none of that name, or a shard is damaged.
        """
        known = ["label", "index", "height", "width", "channels", *sorted(self.manifest.columns)]
        if name not in known:
            raise unknown_name("column", name, known)
        parts = [self.read_arrow(at, columns=[name])[name].to_numpy() for at in range(len(self.shards))]
        return np.concatenate(parts)

    def table(self, name: str) -> pa.Table:
        """An extra table, e.g. ``pairs``.

        Raises:
            UserError: there is none of that name, or it is damaged.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        if name not in self.manifest.tables:
            raise unknown_name(f"table of dataset {self.name!r}:", name, list(self.manifest.tables))
        entry, file = self.manifest.tables[name], f"tables/{name}.parquet"
        try:
            with self._filesystem.open_input_file(f"{self._root}/{file}") as source:
                table = pq.ParquetFile(source, page_checksum_verification=True).read()
                table.validate(full=True)
            if (table.num_rows, table_columns(table)) != (entry.rows, entry.columns):
                raise self._damaged(f"{file} is damaged: its columns and rows are not those of the manifest")
        except FileNotFoundError:
            raise self._damaged(f"{file} is missing") from None
        except (pa.ArrowException, OSError, ValueError) as error:
            raise self._damaged(f"{file} is damaged: {str(error).splitlines()[0][:200]}") from error
        return table

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Reads everything and compares the content with the fingerprint.

        Args:
            progress: called with the rows read and the rows there are.

        Raises:
            UserError: the content is not what was imported.
        """
        check, done = Fingerprint(self.manifest.class_names, self.manifest.columns, self.manifest.form), 0
        for _, table in self._tables():
            check.add_rows(table)
            done += table.num_rows
            if progress is not None:
                progress(done, len(self))
        for name in sorted(self.manifest.tables):
            check.add_table(name, self.table(name))
        if check.hexdigest() != self.fingerprint:
            raise UserError(
                f"dataset {self.name!r} is not what was imported: its fingerprint differs", hint=self._again
            )

    def quarantine(self) -> list[Unreadable]:
        """The source files that the import left out."""
        if not self.manifest.quarantined:
            return []
        with self._filesystem.open_input_stream(f"{self._root}/quarantine.jsonl") as stream:
            return [Unreadable(**json.loads(line)) for line in stream.read().decode().splitlines()]

    @property
    def _again(self) -> str:
        return f"delete {self.location} and import it again"

    def _damaged(self, problem: str) -> UserError:
        return UserError(f"dataset {self.name!r}: {problem}", hint=self._again)

    @contextlib.contextmanager
    def _blame(self) -> Iterator[None]:
        """Turns what a reader finds into the message a user gets."""
        try:
            yield
        except Damaged as error:
            raise self._damaged(str(error)) from error

    def _tables(self) -> Iterator[tuple[Shard, pa.Table]]:
        """All row groups as stored, in order; ``index`` counts on without a gap."""
        start = 0
        for number, shard in enumerate(self.shards):
            for group, rows in enumerate(shard.group_rows):
                table = self.read_arrow(number, group)
                if not np.array_equal(table["index"].to_numpy(), np.arange(start, start + rows)):
                    raise self._damaged(f"{shard.file} is damaged: index does not continue at {start}")
                start += rows
                yield shard, table


def dataset_exists(name_or_path: str) -> bool:
    """Whether there is a whole dataset of that name or at that place."""
    from pyarrow import fs

    filesystem, root = filesystem_of(dataset_location(name_or_path))
    try:
        info = filesystem.get_file_info(f"{root}/manifest.json")
    except OSError as error:
        raise UserError(f"cannot look for dataset {name_or_path!r}: {error}", key="data.name") from error
    return bool(info.type == fs.FileType.File)


def list_datasets() -> list[Dataset]:
    """The datasets of the local store, by name; one with a broken manifest is left out here and reported on opening."""
    found = []
    for path in sorted(datasets_dir().glob("*/manifest.json")):
        if not path.parent.name.startswith("."):
            with contextlib.suppress(UserError):
                found.append(open_dataset(path.parent.name))
    return found


def open_dataset(name_or_path: str) -> Dataset:
    """Opens a dataset by name, local path or ``s3://`` URL.

    Raises:
        UserError: there is none (what there is, and how to import it, is shown), or its manifest is broken.
    """
    location = dataset_location(name_or_path)
    filesystem, root = filesystem_of(location)
    try:
        with filesystem.open_input_file(f"{root}/manifest.json") as file:
            content = file.read(min(file.size(), _MANIFEST_LIMIT))
    except FileNotFoundError:
        raise _missing(name_or_path) from None
    except OSError as error:
        raise UserError(f"cannot read dataset {name_or_path!r}: {error}", key="data.name") from error
    try:
        return Dataset(location, Manifest.model_validate_json(content))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        problem = f"dataset {name_or_path!r} has a broken manifest: {key or 'file'}: {first['msg']}"
        raise UserError(problem, where=f"{location}/manifest.json") from None


def _missing(name: str) -> UserError:
    known = sorted(path.parent.name for path in datasets_dir().glob("[!.]*/manifest.json"))
    close = nearest(name, known)
    hint = f"did you mean {close[0]!r}? " if close else ""
    command = "`armillary data import orl`, or your own images with `armillary data import folder FOLDER --name NAME`"
    return UserError(
        f"there is no dataset {name!r}",
        key="data.name",
        allowed=", ".join(known) or "nothing is imported yet",
        hint=f"{hint}import one with {command}",
    )


def write_dataset(
    name_or_path: str,
    records: Iterable[Record | Unreadable] | Items,
    *,
    class_names: Sequence[str],
    columns: Mapping[str, ColumnType] | None = None,
    tables: Tables | None = None,
    form: Form = "pixels",
    credit: str = "",
    licence: str = "",
    unreadable: list[Unreadable] | None = None,
    shard_rows: int = 4096,
    identity: str | None = None,
) -> Dataset:
    """Streams records into a new dataset; memory holds one row group.

    Locally everything goes into a hidden temporary folder that is renamed at the end. Object stores cannot rename, but
    there the manifest, written last, is what makes a dataset. A killed write therefore leaves nothing that opens. With
    an ``identity``, the next write of the same identity under that name takes over the whole shards and asks
    ``records`` for what follows; the result is the same to the byte. Without one, it removes them.

    Args:
        name_or_path: a name in the store, a local path or an ``s3://`` URL.
        records: images in the order of their ``index``, labels counting from 0 in ``class_names``, and what could not
            be read; or a function that yields them from a position on.
        class_names: one name a class; a class may stay empty.
        columns: the optional columns and their types; every record must have them all.
        tables: extra tables by name, of int64, float32, float64, bool and string columns without empty cells; or a
            function that makes them, given the row of each position of ``records``.
        form: ``pixels``: records hold arrays; ``encoded``: they hold :class:`Encoded`.
        credit: whom to thank for the data.
        licence: its terms.
        unreadable: more files that were left out; may be filled while ``records`` is consumed.
        shard_rows: images a shard; does not change the fingerprint.
        identity: names source and options; the same identity must give the same records. Needs ``records`` to be a
            function.

    Raises:
        UserError: the dataset exists already, its place cannot be written to, or there was not one image.
    """
    location = dataset_location(name_or_path)
    filesystem, root = filesystem_of(location)
    if dataset_exists(name_or_path):
        raise UserError(f"dataset {name_or_path!r} exists already in {location}", hint="delete it or use another name")
    if identity is not None and not callable(records):
        raise ValueError("to resume, records must be a function of the position to start at")
    local = "://" not in location
    work = place_to_write(filesystem, root, location, local, identity)
    writer = ShardWriter(filesystem, work, class_names, columns or {}, shard_rows, form, identity)
    try:
        writer.resume()
        for item in records(writer.position) if callable(records) else records:
            if isinstance(item, Unreadable):
                writer.leave_out(item)
            else:
                writer.add(item)
        left_out = [item for _, item in writer.left_out] + (unreadable or [])
        if not writer.count:
            left = f", and {len(left_out)} unreadable files, e.g. {left_out[0].file}" if left_out else ""
            raise UserError(f"nothing to import into {name_or_path!r}: no images{left}")
        extra = tables(writer.row_of) if callable(tables) else tables or {}
        writer.finish(left_out, extra)
        name = root.rsplit("/", 1)[-1]
        manifest = writer.manifest(name, credit=credit, licence=licence, unreadable=len(left_out))
        write_bytes(filesystem, f"{work}/manifest.json", manifest.model_dump_json(indent=2).encode())
        if local:
            publish(Path(work), Path(root), manifest)
        else:
            _tidy(filesystem, root, manifest)
    except BaseException as error:
        writer.abandon()
        # What a user interrupts, or a lost connection, can go on later; a source that is wrong stays wrong.
        if identity is not None and not isinstance(error, UserError | ValueError):
            if local:
                release(Path(work))
        elif not local:
            _tidy(filesystem, root, None)
        raise
    finally:
        if local:
            shutil.rmtree(work, ignore_errors=True)
    return open_dataset(name_or_path)


def _tidy(filesystem: fs.FileSystem, root: str, manifest: Manifest | None) -> None:
    """Removes from an S3 prefix the journal, and whatever the manifest does not list."""
    from pyarrow import fs

    wanted = set[str]()
    if manifest is not None:
        wanted = {f"{root}/{shard.file}" for shard in manifest.shards}
        wanted |= {f"{root}/tables/{name}.parquet" for name in manifest.tables}
        wanted |= {f"{root}/quarantine.jsonl"} if manifest.quarantined else set()
    ours = tuple(f"{root}/{start}" for start in (f"{JOURNAL}/", "shard-", "tables/", "quarantine.jsonl"))
    for info in filesystem.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True)):
        if info.type == fs.FileType.File and info.path.startswith(ours) and info.path not in wanted:
            filesystem.delete_file(info.path)
