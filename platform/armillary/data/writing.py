"""Writing a dataset: rows into shards, in a place that nobody sees as a dataset until it is whole.

Beside the shards lies a journal, one small file a finished shard, with how far in the source it came. A writer that is
told the same source takes over what a killed one left: it reads the whole shards once more, which checks them and
brings the fingerprint up to date, and goes on behind them.
"""

from __future__ import annotations

import bisect
import json
import os
import secrets
import shutil
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from armillary.data.layout import (
    MAX_SIDE,
    ColumnType,
    Encoded,
    Fingerprint,
    Form,
    Manifest,
    Record,
    Shard,
    TableEntry,
    Unreadable,
    arrow_schema,
    table_columns,
)
from armillary.data.reading import Damaged, ShardReader
from armillary.spec.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from pyarrow import fs

# A row group is what a streaming reader holds of a shard.
GROUP_ROWS = 512
GROUP_BYTES = 32 * 2**20
JOURNAL = "journal"
# Stands for the process of a writer that failed and left its folder to the next one.
NOBODY = "0"


class ShardWriter:
    """Collects rows into row groups and shards; memory holds one row group.

    ``position`` counts what came from the source, stored or left out.
    """

    def __init__(
        self,
        filesystem: fs.FileSystem,
        folder: str,
        class_names: Sequence[str],
        columns: Mapping[str, ColumnType],
        shard_rows: int,
        form: Form = "pixels",
        identity: str | None = None,
    ) -> None:
        self.filesystem, self.folder, self.form = filesystem, folder, form
        self.class_names, self.columns = tuple(class_names), dict(columns)
        self.shard_rows, self.identity = shard_rows, identity
        self.histogram = np.zeros(len(self.class_names), np.int64)
        self.shards: list[Shard] = []
        self.tables: dict[str, TableEntry] = {}
        self.fingerprint = Fingerprint(class_names, self.columns, form)
        self.count = self.position = 0
        self.left_out: list[tuple[int, Unreadable]] = []
        self._shape: tuple[int, ...] | None = None
        self._uniform = True
        self._pending: list[dict[str, Any]] = []
        self._pending_bytes = self._noted = 0
        self._open: pq.ParquetWriter | None = None
        self._groups: list[int] = []

    def add(self, record: Record) -> None:
        """Adds one image.

        Raises:
            ValueError: an importer's bug: not uint8 height x width x channels, an unknown label, missing columns.
        """
        shape, data = self._content(record)
        if not 0 <= record.label < len(self.histogram):
            raise ValueError(f"label {record.label} is not in 0..{len(self.histogram) - 1}")
        if set(record.fields) != set(self.columns):
            raise ValueError(f"columns {sorted(record.fields)} instead of {sorted(self.columns)}")
        row = {"image": data, "height": shape[0], "width": shape[1], "channels": shape[2]}
        # float32 columns are rounded before they are hashed, as that is what a reader gets back.
        fields = {
            name: float(np.float32(value)) if self.columns[name] == "float32" else value
            for name, value in record.fields.items()
        }
        self._pending.append({**row, "label": record.label, "index": self.count, **fields})
        self._pending_bytes += len(data)
        self.fingerprint.add(self.count, record.label, shape, data, fields)
        self.histogram[record.label] += 1
        self._see(shape)
        self.count += 1
        self.position += 1
        if len(self._pending) + sum(self._groups) == self.shard_rows:
            self._close_shard()
        elif len(self._pending) == GROUP_ROWS or self._pending_bytes >= GROUP_BYTES:
            self._write_group()

    def leave_out(self, unreadable: Unreadable) -> None:
        """Notes that the next thing of the source cannot be stored."""
        self.left_out.append((self.position, unreadable))
        self.position += 1

    def row_of(self, position: int) -> int:
        """The row of what stood at a position of the source; -1 when it was left out."""
        before = bisect.bisect_left(self.left_out, position, key=lambda entry: entry[0])
        if before < len(self.left_out) and self.left_out[before][0] == position:
            return -1
        return position - before

    def _content(self, record: Record) -> tuple[tuple[int, ...], bytes]:
        image = record.image
        if isinstance(image, Encoded) != (self.form == "encoded"):
            raise ValueError(f"{type(image).__name__} in a dataset of the form {self.form}")
        shape = image.shape
        if isinstance(image, Encoded):
            return shape, image.data
        if image.dtype != np.uint8 or image.ndim != 3 or not 0 < min(shape) <= max(shape) <= MAX_SIDE:
            raise ValueError(f"image must be uint8 height x width x channels, got {image.dtype} {shape}")
        return shape, np.ascontiguousarray(image).tobytes()

    def _see(self, shape: tuple[int, ...]) -> None:
        self._shape = self._shape or shape
        self._uniform = self._uniform and shape == self._shape

    def _file(self) -> str:
        return f"shard-{len(self.shards):05d}.parquet"

    def _write_group(self) -> None:
        if not self._pending:
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = arrow_schema(self.columns)
        if self._open is None:
            # Encoded images are compressed already.
            image = "none" if self.form == "encoded" else "zstd"
            compression = {name: image if name == "image" else "zstd" for name in schema.names}
            sink = self.filesystem.open_output_stream(f"{self.folder}/{self._file()}")
            self._sink = sink
            self._open = pq.ParquetWriter(
                sink, schema, compression=compression, write_page_checksum=True, use_dictionary=False
            )
        table = pa.Table.from_pylist(self._pending, schema=schema)
        self._open.write_table(table, row_group_size=len(self._pending))
        self._groups.append(len(self._pending))
        self._pending, self._pending_bytes = [], 0

    def _close_shard(self) -> None:
        self._write_group()
        if self._open is None:
            return
        self._open.close()
        self._sink.close()
        file = self._file()
        size = self.filesystem.get_file_info(f"{self.folder}/{file}").size
        shard = Shard(file=file, rows=sum(self._groups), size=size, groups=tuple(self._groups))
        self._open, self._groups = None, []
        if self.identity is not None:
            self._note(shard)
        self.shards.append(shard)

    def _note(self, shard: Shard) -> None:
        news = [[position, item.file, item.reason] for position, item in self.left_out[self._noted :]]
        entry = {"shard": shard.model_dump(mode="json"), "position": self.position, "left_out": news}
        self._noted = len(self.left_out)
        write_bytes(self.filesystem, f"{self.folder}/{JOURNAL}/{len(self.shards):05d}.json", json.dumps(entry).encode())

    def resume(self) -> None:
        """Takes over the whole shards of a killed writer of the same content, or clears what another left.

        Afterwards ``position`` says where in the source to go on.
        """
        start = f"{self.folder}/{JOURNAL}/identity"
        if read_if_there(self.filesystem, start) == (self.identity or "").encode():
            reader = ShardReader(self.filesystem, self.folder, self.columns, len(self.class_names), self.form)
            while entry := read_if_there(self.filesystem, f"{self.folder}/{JOURNAL}/{len(self.shards):05d}.json"):
                try:
                    self._take_over(reader, json.loads(entry))
                except (Damaged, ValueError, KeyError):
                    # Cut off by a power failure: this shard and those behind it are made again.
                    break
        if self.identity is not None:
            self.filesystem.create_dir(f"{self.folder}/{JOURNAL}", recursive=True)
            write_bytes(self.filesystem, start, self.identity.encode())

    def _take_over(self, reader: ShardReader, entry: dict[str, Any]) -> None:
        shard = Shard.model_validate(entry["shard"])
        tables = [reader.table(shard, group) for group in range(len(shard.group_rows))]
        for table in tables:
            self.fingerprint.add_rows(table)
            self.histogram += np.bincount(table["label"].to_numpy(), minlength=len(self.histogram))
            sides = [table[name].to_pylist() for name in ("height", "width", "channels")]
            for shape in set(zip(*sides, strict=True)):
                self._see(shape)
        self.left_out += [(position, Unreadable(file, reason)) for position, file, reason in entry["left_out"]]
        self._noted = len(self.left_out)
        self.count += shard.rows
        self.position = entry["position"]
        self.shards.append(shard)

    def finish(self, unreadable: Sequence[Unreadable], tables: Mapping[str, pa.Table]) -> None:
        """Writes the last shard, the tables and the quarantine report.

        Raises:
            ValueError: an importer's bug: a table with columns of a type that tables do not have.
        """
        import pyarrow.parquet as pq

        self._close_shard()
        for name, table in sorted(tables.items()):
            columns = table_columns(table)
            path = f"{self.folder}/tables/{name}.parquet"
            self.filesystem.create_dir(f"{self.folder}/tables", recursive=True)
            with self.filesystem.open_output_stream(path) as sink:
                pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
            self.fingerprint.add_table(name, table)
            size = self.filesystem.get_file_info(path).size
            self.tables[name] = TableEntry(rows=table.num_rows, size=size, columns=columns)
        if unreadable:
            lines = "".join(json.dumps({"file": item.file, "reason": item.reason}) + "\n" for item in unreadable)
            write_bytes(self.filesystem, f"{self.folder}/quarantine.jsonl", lines.encode())

    def abandon(self) -> None:
        """Closes what is open, after a failure."""
        if self._open is not None:
            self._open.close()
            self._sink.close()
            self._open = None

    def manifest(self, name: str, *, credit: str, licence: str, unreadable: int) -> Manifest:
        """The manifest of what was written."""
        height, width, channels = self._shape or (0, 0, 0)
        return Manifest(
            name=name,
            images=self.count,
            form=self.form,
            class_names=self.class_names,
            histogram=tuple(self.histogram.tolist()),
            image_shape=(height, width, channels) if self._uniform else None,
            columns=self.columns,
            shards=tuple(self.shards),
            tables=self.tables,
            fingerprint=self.fingerprint.hexdigest(),
            credits=credit,
            licence=licence,
            quarantined=unreadable,
        )


def write_bytes(filesystem: fs.FileSystem, path: str, content: bytes) -> None:
    """Writes a small file."""
    with filesystem.open_output_stream(path) as sink:
        sink.write(content)


def read_if_there(filesystem: fs.FileSystem, path: str) -> bytes:
    """A small file's content; empty when there is none."""
    try:
        with filesystem.open_input_stream(path) as stream:
            return bytes(stream.read())
    except FileNotFoundError:
        return b""


def temporary_folder(target: Path, identity: str | None = None) -> Path:
    """A hidden folder beside the target: one that a killed writer of the same content left, or a new one.

    What other killed processes of this machine left under that name is removed.
    """
    import psutil

    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}.partial-{socket.gethostname()}-"
    folder = target.parent / f"{prefix}{os.getpid()}-{secrets.token_hex(4)}"
    for left in sorted(target.parent.glob(f"{prefix}*")):
        owner = left.name.removeprefix(prefix).split("-")[0]
        if not owner.isdigit() or (owner != NOBODY and psutil.pid_exists(int(owner))):
            continue
        note = left / JOURNAL / "identity"
        if identity and not folder.exists() and note.is_file() and note.read_text() == identity:
            # Of two processes that find it, one renames; the other starts afresh.
            try:
                left.rename(folder)
            except FileNotFoundError:
                continue
        else:
            shutil.rmtree(left, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    return folder


def place_to_write(filesystem: fs.FileSystem, root: str, location: str, local: bool, identity: str | None) -> str:
    """Where to write: a temporary folder, or the prefix of an object store itself.

    Raises:
        UserError: no folder can be made there, or there is no such bucket.
    """
    from pyarrow import fs

    if local:
        try:
            return str(temporary_folder(Path(root), identity))
        except OSError as error:
            raise UserError(f"cannot write to {location}: {error.strerror or error}") from error
    bucket = root.split("/", 1)[0]
    if filesystem.get_file_info(bucket).type == fs.FileType.NotFound:
        raise UserError(f"cannot write to {location}: there is no bucket {bucket!r}")
    return root


def release(work: Path) -> None:
    """Leaves a folder to the next writer of the same content, even to one of this process."""
    name, random = work.name.rsplit("-", 2)[0], work.name.rsplit("-", 1)[1]
    work.rename(work.with_name(f"{name}-{NOBODY}-{random}"))


def publish(work: Path, target: Path, manifest: Manifest) -> None:
    """Renames the finished folder into place; another process that finished the same content first is as good.

    Raises:
        UserError: something else is there already.
    """
    shutil.rmtree(work / JOURNAL, ignore_errors=True)
    for path in work.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    try:
        work.rename(target)
    except OSError as error:
        there = target / "manifest.json"
        if there.is_file() and json.loads(there.read_bytes()).get("fingerprint") == manifest.fingerprint:
            return
        raise UserError(f"cannot write dataset {target.name!r} to {target}: {error.strerror}") from error
