"""Writing a dataset: rows into shards, in a folder that nobody sees as a dataset until it is whole."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from armillary.data.layout import MAX_SIDE, ColumnType, Fingerprint, Manifest, Record, Shard, Unreadable, arrow_schema
from armillary.spec.errors import UserError

if TYPE_CHECKING:
    from pyarrow import fs


class ShardWriter:
    """Collects rows into shards."""

    def __init__(
        self,
        filesystem: fs.FileSystem,
        folder: str,
        class_names: Sequence[str],
        columns: dict[str, ColumnType],
        shard_rows: int,
    ) -> None:
        self.filesystem, self.folder = filesystem, folder
        self.class_names = tuple(class_names)
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
        if image.dtype != np.uint8 or image.ndim != 3 or not 0 < min(image.shape) <= max(image.shape) <= MAX_SIDE:
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
        table = pa.Table.from_pylist(self._pending, schema=arrow_schema(self.columns))
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

    def manifest(self, name: str, *, credit: str, licence: str, unreadable: int) -> Manifest:
        """The manifest of what was written."""
        return Manifest(
            name=name,
            images=self.count,
            class_names=self.class_names,
            histogram=tuple(self.histogram),
            image_shape=_only(self.shapes),
            columns=self.columns,
            shards=tuple(self.shards),
            fingerprint=self.fingerprint.hexdigest(),
            credits=credit,
            licence=licence,
            quarantined=unreadable,
        )


def _only(shapes: set[tuple[int, ...]]) -> tuple[int, int, int] | None:
    if len(shapes) != 1:
        return None
    height, width, channels = next(iter(shapes))
    return height, width, channels


def temporary_folder(target: Path) -> Path:
    """A new hidden folder beside the target; those that killed processes of this machine left are removed."""
    import psutil

    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}.partial-{socket.gethostname()}-"
    for left in target.parent.glob(f"{prefix}*"):
        owner = left.name.removeprefix(prefix).split("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(left, ignore_errors=True)
    folder = target.parent / f"{prefix}{os.getpid()}-{secrets.token_hex(4)}"
    folder.mkdir()
    return folder


def publish(work: Path, target: Path, manifest: Manifest) -> None:
    """Renames the finished folder into place; another process that finished the same content first is as good.

    Raises:
        UserError: something else is there already.
    """
    for path in work.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    try:
        work.rename(target)
    except OSError as error:
        there = target / "manifest.json"
        if there.is_file() and json.loads(there.read_bytes()).get("fingerprint") == manifest.fingerprint:
            return
        raise UserError(f"cannot write dataset {target.name!r} to {target}: {error.strerror}") from error
