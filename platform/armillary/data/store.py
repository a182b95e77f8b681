"""The dataset store: one folder (or S3 prefix) of Parquet shards and a manifest.

::

    <datasets>/<name>/
      manifest.json          Manifest: counts, classes, shards, fingerprint, credits
      shard-00000.parquet    image, height, width, channels, label, index and the optional columns
      quarantine.jsonl       one line for every source file that could not be read, if there were any

Pixels are stored decoded (uint8, height x width x channels) and compressed by Parquet, so that reading needs no codec.
A folder without ``manifest.json`` is not a dataset: it is written last, into a temporary folder that is renamed when
everything is there.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import ValidationError

from armillary.data.layout import (
    MAX_SIDE,
    ColumnType,
    Fingerprint,
    Manifest,
    Record,
    Rows,
    Shard,
    Unreadable,
    arrow_schema,
    dataset_location,
    filesystem_of,
)
from armillary.data.writing import ShardWriter, publish, temporary_folder
from armillary.spec.errors import UserError, nearest
from armillary.spec.home import datasets_dir

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import fs

__all__ = [
    "Dataset",
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


class Dataset:
    """A dataset in the store, opened for reading."""

    def __init__(self, location: str, manifest: Manifest) -> None:
        self.location, self.manifest = location, manifest

    @property
    def name(self) -> str:
        """The name it was imported under."""
        return self.manifest.name

    @property
    def fingerprint(self) -> str:
        """sha256 over the content."""
        return self.manifest.fingerprint

    def __len__(self) -> int:
        return self.manifest.images

    def rows(self) -> Iterator[Rows]:
        """All rows in order of ``index``, one shard at a time.

        Raises:
            UserError: a shard is missing, damaged, or not what the manifest says.
        """
        filesystem, root = filesystem_of(self.location)
        start = 0
        for shard in self.manifest.shards:
            rows = self._read(filesystem, f"{root}/{shard.file}", shard)
            if not np.array_equal(rows.index, np.arange(start, start + shard.rows)):
                raise self._damaged(shard.file, f"index does not continue at {start}")
            start += shard.rows
            yield rows

    def verify(self) -> None:
        """Reads everything and compares the content with the fingerprint.

        Raises:
            UserError: the content is not what was imported.
        """
        check = Fingerprint(self.manifest.class_names, self.manifest.columns)
        for rows in self.rows():
            columns = {name: values.tolist() for name, values in rows.fields.items()}
            for at, image in enumerate(rows.images):
                values = {name: column[at] for name, column in columns.items()}
                check.add(int(rows.index[at]), int(rows.label[at]), image, values)
        if check.hexdigest() != self.fingerprint:
            raise UserError(
                f"dataset {self.name!r} is not what was imported: its fingerprint differs", hint=self._again
            )

    def quarantine(self) -> list[Unreadable]:
        """The source files that the import left out."""
        if not self.manifest.quarantined:
            return []
        filesystem, root = filesystem_of(self.location)
        with filesystem.open_input_stream(f"{root}/quarantine.jsonl") as stream:
            return [Unreadable(**json.loads(line)) for line in stream.read().decode().splitlines()]

    @property
    def _again(self) -> str:
        return f"delete {self.location} and import it again"

    def _damaged(self, file: str, problem: str) -> UserError:
        return UserError(f"dataset {self.name!r}: {file} is damaged: {problem}", hint=self._again)

    def _read(self, filesystem: fs.FileSystem, path: str, shard: Shard) -> Rows:
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = arrow_schema(self.manifest.columns)
        try:
            with filesystem.open_input_file(path) as source:
                file = pq.ParquetFile(source, page_checksum_verification=True)
                if not file.schema_arrow.equals(schema):
                    raise self._damaged(shard.file, "its columns are not those of the manifest")
                if file.metadata.num_rows != shard.rows:
                    raise self._damaged(shard.file, f"{file.metadata.num_rows} rows instead of {shard.rows}")
                table = file.read()
                table.validate(full=True)
        except FileNotFoundError:
            raise UserError(f"dataset {self.name!r}: {shard.file} is missing", hint=self._again) from None
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(shard.file, str(error).splitlines()[0][:200]) from error
        if any(column.null_count for column in table.columns):
            raise self._damaged(shard.file, "it has empty cells")
        return self._decode(table, shard)

    def _decode(self, table: pa.Table, shard: Shard) -> Rows:
        plain = {name: table[name].to_numpy() for name in table.column_names if name != "image"}
        label = plain["label"]
        if label.min() < 0 or label.max() >= len(self.manifest.class_names):
            raise self._damaged(shard.file, "a label outside the class names")
        sides = np.stack([plain[name] for name in ("height", "width", "channels")], axis=1).astype(np.int64)
        images = []
        for shape, cell in zip(sides, table["image"], strict=True):
            pixels = np.frombuffer(cell.as_buffer(), dtype=np.uint8)
            if shape.min() < 1 or shape.max() > MAX_SIDE or pixels.size != int(np.prod(shape)):
                raise self._damaged(shard.file, f"{pixels.size} bytes cannot be an image of shape {tuple(shape)}")
            images.append(pixels.reshape(tuple(shape)))
        return Rows(images, label, plain["index"], {name: plain[name] for name in self.manifest.columns})


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
        with filesystem.open_input_stream(f"{root}/manifest.json") as stream:
            content = stream.read(_MANIFEST_LIMIT)
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
    records: Iterable[Record],
    *,
    class_names: Sequence[str],
    columns: dict[str, ColumnType] | None = None,
    credit: str = "",
    licence: str = "",
    unreadable: list[Unreadable] | None = None,
    shard_rows: int = 4096,
) -> Dataset:
    """Streams records into a new dataset; memory holds one shard.

    Locally everything goes into a hidden temporary folder that is renamed at the end. Object stores cannot rename, but
    there the manifest, written last, is what makes a dataset. A killed write therefore leaves nothing that opens; the
    next write under the same name on the same machine removes what it left.

    Args:
        name_or_path: a name in the store, a local path or an ``s3://`` URL.
        records: images in the order of their ``index``; labels count from 0 in ``class_names``.
        class_names: one name a class; a class may stay empty.
        columns: the optional columns and their types; every record must have them all.
        credit: whom to thank for the data.
        licence: its terms.
        unreadable: the files left out; may be filled while ``records`` is consumed.
        shard_rows: images a shard; does not change the fingerprint.

    Raises:
        UserError: the dataset exists already, or there was not one image.
    """
    location = dataset_location(name_or_path)
    filesystem, root = filesystem_of(location)
    if dataset_exists(name_or_path):
        raise UserError(f"dataset {name_or_path!r} exists already in {location}", hint="delete it or use another name")
    local = "://" not in location
    work = str(temporary_folder(Path(root))) if local else root
    try:
        writer = ShardWriter(filesystem, work, class_names, columns or {}, shard_rows)
        for record in records:
            writer.add(record)
        writer.finish(unreadable or [])
        if not writer.count:
            left = f", and {len(unreadable)} unreadable files" if unreadable else ""
            raise UserError(f"nothing to import into {name_or_path!r}: no images{left}")
        name, left_out = root.rsplit("/", 1)[-1], len(unreadable or [])
        manifest = writer.manifest(name, credit=credit, licence=licence, unreadable=left_out)
        with filesystem.open_output_stream(f"{work}/manifest.json") as sink:
            sink.write(manifest.model_dump_json(indent=2).encode())
        if local:
            publish(Path(work), Path(root), manifest)
    finally:
        if local:
            shutil.rmtree(work, ignore_errors=True)
    return open_dataset(name_or_path)
