"""What a stored dataset consists of: manifest, columns, fingerprint, and where it lies."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from armillary.spec.errors import UserError
from armillary.spec.home import datasets_dir

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import fs

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
TABLE_PATTERN = r"^[a-z][a-z0-9_]{0,39}$"
ColumnType = Literal["int64", "float32", "bool", "string"]
TableType = Literal["int64", "float32", "float64", "bool", "string"]
# How images are kept: decoded, or as the bytes of the file they came from.
Form = Literal["pixels", "encoded"]
MAX_SIDE = 65_536


class Shard(BaseModel):
    """One Parquet file of a dataset."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # No separators: a manifest from a stranger cannot name files outside its own folder.
    file: str = Field(pattern=r"^shard-[0-9]{5,9}\.parquet$")
    rows: int = Field(ge=1)
    size: int = Field(ge=1, description="bytes")
    groups: tuple[int, ...] = Field((), description="rows of each Parquet row group; empty: one group")

    @property
    def group_rows(self) -> tuple[int, ...]:
        """Rows of each row group, in order."""
        return self.groups or (self.rows,)

    @model_validator(mode="after")
    def _groups_agree(self) -> Shard:
        if self.groups and (min(self.groups) < 1 or sum(self.groups) != self.rows):
            raise ValueError(f"row groups {self.groups} do not make {self.rows} rows")
        return self


class TableEntry(BaseModel):
    """An extra table beside the images, ``tables/<name>.parquet``: pairs, templates, a graph."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows: int = Field(ge=0)
    size: int = Field(ge=1, description="bytes")
    columns: dict[str, TableType] = Field(min_length=1)


class Manifest(BaseModel):
    """What a dataset says of itself.

    ``histogram[c]`` counts the images of class ``class_names[c]``. ``image_shape`` is (height, width, channels), or
    null when the images differ. ``fingerprint`` is :class:`Fingerprint` over rows and tables. Version 1 knew decoded
    images in shards of one row group and no tables; its manifests are read as they are.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1, 2] = 2
    name: str
    images: int = Field(ge=1)
    form: Form = "pixels"
    class_names: tuple[str, ...] = Field(min_length=1)
    histogram: tuple[int, ...]
    image_shape: tuple[int, int, int] | None
    columns: dict[str, ColumnType] = Field(default_factory=dict)
    shards: tuple[Shard, ...] = Field(min_length=1)
    tables: dict[Annotated[str, Field(pattern=TABLE_PATTERN)], TableEntry] = Field(default_factory=dict)
    fingerprint: str = Field(pattern=r"^[0-9a-f]{64}$")
    credits: str = ""
    licence: str = ""
    quarantined: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _counts_agree(self) -> Manifest:
        if len(self.histogram) != len(self.class_names):
            raise ValueError(f"{len(self.class_names)} class names but {len(self.histogram)} counts")
        if sum(self.histogram) != self.images or sum(shard.rows for shard in self.shards) != self.images:
            raise ValueError("images, histogram and shards count differently")
        if len({shard.file for shard in self.shards}) != len(self.shards):
            raise ValueError("a shard is listed twice")
        return self


@dataclass(frozen=True)
class Encoded:
    """An image as the bytes of its file, and the shape it decodes to."""

    data: bytes
    shape: tuple[int, int, int]


@dataclass(frozen=True)
class Record:
    """One image on its way into the store: its class, its optional columns.

    ``image`` is uint8 ``(height, width, channels)``, or :class:`Encoded` for a dataset of that form.
    """

    image: NDArray[np.uint8] | Encoded
    label: int
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Unreadable:
    """A source file that was left out, and why."""

    file: str
    reason: str


@dataclass(frozen=True)
class Rows:
    """Some consecutive rows: images as uint8 ``(height, width, channels)`` arrays, the other columns as arrays."""

    images: list[NDArray[np.uint8]]
    label: NDArray[np.int64]
    index: NDArray[np.int64]
    fields: dict[str, NDArray[Any]]


class Fingerprint:
    """sha256 over classes, rows and tables in order: the same content gives the same one, on every machine.

    Shard sizes, names and compression do not count. Decoded images count by pixels, encoded ones by their bytes, so the
    two forms of a dataset have different fingerprints.
    """

    def __init__(self, class_names: Sequence[str], columns: dict[str, ColumnType], form: Form = "pixels") -> None:
        self._hash = hashlib.sha256()
        self._columns, self._form = sorted(columns), form
        head: dict[str, Any] = {"schema": 1, "classes": list(class_names), "columns": dict(sorted(columns.items()))}
        if form != "pixels":
            head["form"] = form
        self._hash.update(json.dumps(head, sort_keys=True).encode())

    def add(self, index: int, label: int, shape: Sequence[int], data: Any, fields: dict[str, Any]) -> None:
        """Adds one row; ``data`` is the image's buffer, ``fields`` holds plain Python values."""
        numbers = [index, label, *shape]
        if self._form == "encoded":
            numbers.append(memoryview(data).nbytes)
        self._hash.update(np.array(numbers, dtype="<i8").tobytes())
        self._hash.update(data)
        if self._columns:
            self._hash.update(json.dumps([fields[name] for name in self._columns]).encode())

    def add_rows(self, table: pa.Table) -> None:
        """Adds the rows of a part of a shard, see :func:`arrow_schema`."""
        plain = {name: table[name].to_pylist() for name in table.column_names if name != "image"}
        shapes = zip(plain["height"], plain["width"], plain["channels"], strict=True)
        for at, (shape, cell) in enumerate(zip(shapes, table["image"], strict=True)):
            fields = {name: plain[name][at] for name in self._columns}
            self.add(plain["index"][at], plain["label"][at], shape, cell.as_buffer(), fields)

    def add_table(self, name: str, table: pa.Table) -> None:
        """Adds an extra table of :data:`TableType` columns; call in the order of the names, after all rows."""
        columns = table_columns(table)
        head = {"table": name, "columns": columns, "rows": table.num_rows}
        self._hash.update(json.dumps(head, sort_keys=True).encode())
        for column, kind in sorted(columns.items()):
            for chunk in table[column].chunks:
                if kind == "string":
                    self._hash.update("".join(json.dumps(value) for value in chunk.to_pylist()).encode())
                else:
                    values = chunk.to_numpy(zero_copy_only=False)
                    self._hash.update(values.astype(values.dtype.newbyteorder("<")).tobytes())

    def hexdigest(self) -> str:
        """64 hexadecimal digits."""
        return self._hash.hexdigest()


def table_columns(table: pa.Table) -> dict[str, TableType]:
    """The columns of an extra table and their types.

    Raises:
        ValueError: a type that tables do not have, or an empty cell.
    """
    names: dict[str, TableType] = {
        "int64": "int64", "float": "float32", "double": "float64", "bool": "bool", "string": "string",
    }  # fmt: skip
    for column in table.schema:
        if str(column.type) not in names:
            raise ValueError(f"column {column.name} of type {column.type}; allowed: {', '.join(names.values())}")
        if table[column.name].null_count:
            raise ValueError(f"column {column.name} has empty cells")
    return {column.name: names[str(column.type)] for column in table.schema}


def filesystem_of(location: str) -> tuple[fs.FileSystem, str]:
    """The pyarrow filesystem of a local path or an ``s3://`` URL, and the path inside it."""
    from pyarrow import fs

    if "://" not in location:
        return fs.LocalFileSystem(), str(Path(location).expanduser().absolute())
    if not location.startswith("s3://"):
        raise UserError(f"cannot read datasets from {location!r}", key="data.name", allowed="a name, a path, s3://...")
    # Only the bucket goes through the parser of URIs: keys may hold any letter. pyarrow's options may follow.
    base, options = re.fullmatch(r"s3://(.*?)(\?[a-z_]+=.*)?", location, re.DOTALL).groups("")  # type: ignore[union-attr]
    bucket, _, path = base.partition("/")
    try:
        filesystem, _ = fs.FileSystem.from_uri(f"s3://{bucket}{options}")
    except (ValueError, OSError) as error:
        raise UserError(f"cannot open {location!r}: {error}", key="data.name") from error
    return filesystem, f"{bucket}/{path}".rstrip("/")


def arrow_schema(columns: dict[str, ColumnType]) -> pa.Schema:
    """The columns of a shard."""
    import pyarrow as pa

    types = {"int64": pa.int64(), "float32": pa.float32(), "bool": pa.bool_(), "string": pa.string()}
    fixed = [("image", pa.large_binary()), ("height", pa.int32()), ("width", pa.int32()), ("channels", pa.int32())]
    fixed += [("label", pa.int64()), ("index", pa.int64())]
    return pa.schema([*fixed, *((name, types[kind]) for name, kind in sorted(columns.items()))])


def dataset_location(name_or_path: str) -> str:
    """Where a dataset is: URLs and paths stay as they are, a plain name is a folder of the store."""
    if "://" in name_or_path:
        return name_or_path.rstrip("/")
    if NAME_PATTERN.fullmatch(name_or_path):
        return str(datasets_dir() / name_or_path)
    return str(Path(name_or_path).expanduser().absolute())
