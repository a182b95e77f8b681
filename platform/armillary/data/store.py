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
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from armillary.spec.errors import UserError, nearest
from armillary.spec.home import datasets_dir

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import fs

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
ColumnType = Literal["int64", "float32", "bool", "string"]
_MANIFEST_LIMIT = 256 * 2**20
_MAX_SIDE = 65_536


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


def _filesystem(location: str) -> tuple[fs.FileSystem, str]:
    """The pyarrow filesystem of a local path or an ``s3://`` URL, and the path inside it."""
    from pyarrow import fs

    if "://" not in location:
        return fs.LocalFileSystem(), str(Path(location).expanduser().absolute())
    if not location.startswith("s3://"):
        raise UserError(f"cannot read datasets from {location!r}", key="data.name", allowed="a name, a path, s3://...")
    filesystem, path = fs.FileSystem.from_uri(location)
    return filesystem, path.rstrip("/")


def _schema(columns: dict[str, ColumnType]) -> pa.Schema:
    import pyarrow as pa

    types = {"int64": pa.int64(), "float32": pa.float32(), "bool": pa.bool_(), "string": pa.string()}
    fixed = [("image", pa.large_binary()), ("height", pa.int32()), ("width", pa.int32()), ("channels", pa.int32())]
    fixed += [("label", pa.int64()), ("index", pa.int64())]
    return pa.schema([*fixed, *((name, types[kind]) for name, kind in sorted(columns.items()))])


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
        filesystem, root = _filesystem(self.location)
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
        filesystem, root = _filesystem(self.location)
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

        schema = _schema(self.manifest.columns)
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
            if shape.min() < 1 or shape.max() > _MAX_SIDE or pixels.size != int(np.prod(shape)):
                raise self._damaged(shard.file, f"{pixels.size} bytes cannot be an image of shape {tuple(shape)}")
            images.append(pixels.reshape(tuple(shape)))
        return Rows(images, label, plain["index"], {name: plain[name] for name in self.manifest.columns})


def dataset_location(name_or_path: str) -> str:
    """Where a dataset is: URLs and paths stay as they are, a plain name is a folder of the store."""
    if "://" in name_or_path:
        return name_or_path.rstrip("/")
    if NAME_PATTERN.fullmatch(name_or_path):
        return str(datasets_dir() / name_or_path)
    return str(Path(name_or_path).expanduser().absolute())


def dataset_exists(name_or_path: str) -> bool:
    """Whether there is a whole dataset of that name or at that place."""
    from pyarrow import fs

    filesystem, root = _filesystem(dataset_location(name_or_path))
    return bool(filesystem.get_file_info(f"{root}/manifest.json").type == fs.FileType.File)


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
    filesystem, root = _filesystem(location)
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


class _Writer:
    """Collects rows into shards inside a folder that nobody sees as a dataset yet."""

    def __init__(
        self,
        filesystem: fs.FileSystem,
        folder: str,
        class_names: Sequence[str],
        columns: dict[str, ColumnType],
        shard_rows: int,
    ) -> None:
        self.filesystem, self.folder = filesystem, folder
        self.columns, self.shard_rows = columns, shard_rows
        self.histogram = [0] * len(class_names)
        self.shapes: set[tuple[int, ...]] = set()
        self.shards: list[Shard] = []
        self.fingerprint = Fingerprint(class_names, columns)
        self.count = 0
        self._pending: list[dict[str, Any]] = []

    def add(self, record: Record) -> None:
        """Adds one image.

        Raises:
            ValueError: an importer's bug: not uint8 height x width x channels, an unknown label, missing columns.
        """
        image = record.image
        if image.dtype != np.uint8 or image.ndim != 3 or not 0 < min(image.shape) <= max(image.shape) <= _MAX_SIDE:
            raise ValueError(f"image must be uint8 height x width x channels, got {image.dtype} {image.shape}")
        if not 0 <= record.label < len(self.histogram):
            raise ValueError(f"label {record.label} is not in 0..{len(self.histogram) - 1}")
        if set(record.fields) != set(self.columns):
            raise ValueError(f"columns {sorted(record.fields)} instead of {sorted(self.columns)}")
        height, width, channels = image.shape
        row = {"image": np.ascontiguousarray(image).tobytes(), "height": height, "width": width, "channels": channels}
        # float32 columns are rounded before they are hashed, as that is what a reader gets back.
        fields = {
            name: float(np.float32(value)) if self.columns[name] == "float32" else value
            for name, value in record.fields.items()
        }
        self._pending.append({**row, "label": record.label, "index": self.count, **fields})
        self.fingerprint.add(self.count, record.label, image, fields)
        self.histogram[record.label] += 1
        self.shapes.add(image.shape)
        self.count += 1
        if len(self._pending) == self.shard_rows:
            self.flush()

    def flush(self) -> None:
        """Writes what is pending as a shard."""
        if not self._pending:
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        name = f"shard-{len(self.shards):05d}.parquet"
        path = f"{self.folder}/{name}"
        table = pa.Table.from_pylist(self._pending, schema=_schema(self.columns))
        with self.filesystem.open_output_stream(path) as sink:
            pq.write_table(table, sink, compression="zstd", write_page_checksum=True, use_dictionary=False)
        size = self.filesystem.get_file_info(path).size
        self.shards.append(Shard(file=name, rows=len(self._pending), size=size))
        self._pending = []

    def finish(self, unreadable: Sequence[Unreadable]) -> None:
        """Writes the last shard and the quarantine report."""
        self.flush()
        if unreadable:
            lines = "".join(json.dumps({"file": item.file, "reason": item.reason}) + "\n" for item in unreadable)
            with self.filesystem.open_output_stream(f"{self.folder}/quarantine.jsonl") as sink:
                sink.write(lines.encode())


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
    filesystem, root = _filesystem(location)
    if dataset_exists(name_or_path):
        raise UserError(f"dataset {name_or_path!r} exists already in {location}", hint="delete it or use another name")
    local = "://" not in location
    work = str(_temporary_folder(Path(root))) if local else root
    try:
        writer = _Writer(filesystem, work, class_names, columns or {}, shard_rows)
        for record in records:
            writer.add(record)
        writer.finish(unreadable or [])
        if not writer.count:
            problem = f"{len(unreadable)} unreadable files" if unreadable else "no images"
            raise UserError(f"nothing to import into {name_or_path!r}: {problem}, and not one image")
        manifest = Manifest(
            name=root.rsplit("/", 1)[-1],
            images=writer.count,
            class_names=tuple(class_names),
            histogram=tuple(writer.histogram),
            image_shape=_only(writer.shapes),
            columns=columns or {},
            shards=tuple(writer.shards),
            fingerprint=writer.fingerprint.hexdigest(),
            credits=credit,
            licence=licence,
            quarantined=len(unreadable or []),
        )
        with filesystem.open_output_stream(f"{work}/manifest.json") as sink:
            sink.write(manifest.model_dump_json(indent=2).encode())
        if local:
            _publish(Path(work), Path(root), manifest.fingerprint)
    finally:
        if local:
            shutil.rmtree(work, ignore_errors=True)
    return open_dataset(name_or_path)


def _only(shapes: set[tuple[int, ...]]) -> tuple[int, int, int] | None:
    if len(shapes) != 1:
        return None
    height, width, channels = next(iter(shapes))
    return height, width, channels


def _temporary_folder(target: Path) -> Path:
    """A hidden folder beside the target; those that killed processes of this machine left are removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}.partial-{socket.gethostname()}-"
    for left in target.parent.glob(f"{prefix}*"):
        owner = left.name.removeprefix(prefix)
        if owner.isdigit() and not Path(f"/proc/{owner}").exists() and Path("/proc/self").exists():
            shutil.rmtree(left, ignore_errors=True)
    folder = target.parent / f"{prefix}{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def _publish(work: Path, target: Path, fingerprint: str) -> None:
    """Renames the finished folder into place; another process that finished the same content first is as good."""
    for path in work.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    try:
        work.rename(target)
    except OSError as error:
        if (target / "manifest.json").is_file() and open_dataset(str(target)).fingerprint == fingerprint:
            return
        raise UserError(f"cannot write dataset {target.name!r} to {target}: {error.strerror}") from error
