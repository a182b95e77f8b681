"""What a stored dataset consists of: manifest, columns, fingerprint, and where it lies."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from armillary.spec.errors import UserError
from armillary.spec.home import datasets_dir

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import fs

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
ColumnType = Literal["int64", "float32", "bool", "string"]
MAX_SIDE = 65_536


class Shard(BaseModel):
    """One Parquet file of a dataset."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # No separators: a manifest from a stranger cannot name files outside its own folder.
    file: str = Field(pattern=r"^shard-[0-9]{5,9}\.parquet$")
    rows: int = Field(ge=1)
    size: int = Field(ge=1, description="bytes")


class Manifest(BaseModel):
    """What a dataset says of itself.

    ``histogram[c]`` counts the images of class ``class_names[c]``. ``image_shape`` is (height, width, channels), or
    null when the images differ. ``fingerprint`` is :class:`Fingerprint` over the rows.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    name: str
    images: int = Field(ge=1)
    class_names: tuple[str, ...] = Field(min_length=1)
    histogram: tuple[int, ...]
    image_shape: tuple[int, int, int] | None
    columns: dict[str, ColumnType] = Field(default_factory=dict)
    shards: tuple[Shard, ...] = Field(min_length=1)
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
class Record:
    """One image on its way into the store: uint8 ``(height, width, channels)``, its class, its optional columns."""

    image: NDArray[np.uint8]
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
    """sha256 over classes and rows in order: the same for the same content, whatever the shard size or the machine."""

    def __init__(self, class_names: Sequence[str], columns: dict[str, ColumnType]) -> None:
        self._hash = hashlib.sha256()
        self._columns = sorted(columns)
        head = {"schema": 1, "classes": list(class_names), "columns": dict(sorted(columns.items()))}
        self._hash.update(json.dumps(head, sort_keys=True).encode())

    def add(self, index: int, label: int, image: NDArray[np.uint8], fields: dict[str, Any]) -> None:
        """Adds one row; ``fields`` holds plain Python values."""
        self._hash.update(np.array([index, label, *image.shape], dtype="<i8").tobytes())
        self._hash.update(np.ascontiguousarray(image).tobytes())
        if self._columns:
            self._hash.update(json.dumps([fields[name] for name in self._columns]).encode())

    def hexdigest(self) -> str:
        """64 hexadecimal digits."""
        return self._hash.hexdigest()


def filesystem_of(location: str) -> tuple[fs.FileSystem, str]:
    """The pyarrow filesystem of a local path or an ``s3://`` URL, and the path inside it."""
    from pyarrow import fs

    if "://" not in location:
        return fs.LocalFileSystem(), str(Path(location).expanduser().absolute())
    if not location.startswith("s3://"):
        raise UserError(f"cannot read datasets from {location!r}", key="data.name", allowed="a name, a path, s3://...")
    try:
        filesystem, path = fs.FileSystem.from_uri(location)
    except (ValueError, OSError) as error:
        raise UserError(f"cannot open {location!r}: {error}", key="data.name") from error
    return filesystem, path.rstrip("/")


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
