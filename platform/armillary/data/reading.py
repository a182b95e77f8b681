"""Reading shards: what comes back has the manifest's columns, no empty cells, and images of the shapes it claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from armillary.data.images import UnreadableImage, decode_image
from armillary.data.layout import MAX_SIDE, ColumnType, Form, Rows, Shard, arrow_schema

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from pyarrow import fs

_SHAPE = ("height", "width", "channels")


class Damaged(Exception):  # noqa: N818 - reads as a statement where it is caught
    """A file of a dataset is missing or not what it should be."""

    def __init__(self, file: str, problem: str) -> None:
        super().__init__(f"{file} is {problem}")


class ShardReader:
    """Reads the shards below a folder; may be shared by threads.

    Args:
        filesystem: where the folder is.
        root: the folder.
        columns: the optional columns.
        classes: how many classes there are.
        form: how images are kept.
    """

    def __init__(
        self, filesystem: fs.FileSystem, root: str, columns: Mapping[str, ColumnType], classes: int, form: Form
    ) -> None:
        self.filesystem, self.root, self.form, self.classes = filesystem, root, form, classes
        self.schema, self._columns = arrow_schema(dict(columns)), sorted(columns)
        # Footers are small, and every row group needs its shard's; two threads may read one twice, which does no harm.
        self._footers: dict[str, pq.FileMetaData] = {}

    def table(self, shard: Shard, group: int | None = None, columns: Sequence[str] | None = None) -> pa.Table:
        """A whole shard or one of its row groups as stored, all columns or the named ones.

        Raises:
            Damaged: missing, cut off, flipped bits, other columns or rows than it should have, empty cells.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        names = None if columns is None else list(columns)
        try:
            with self.filesystem.open_input_file(f"{self.root}/{shard.file}") as source:
                footer = self._footers.get(shard.file)
                file = pq.ParquetFile(source, metadata=footer, page_checksum_verification=True)
                if footer is None:
                    self._check(file, shard)
                    self._footers[shard.file] = file.metadata
                table = file.read(columns=names) if group is None else file.read_row_group(group, columns=names)
                table.validate(full=True)
        except FileNotFoundError:
            raise Damaged(shard.file, "missing") from None
        except (pa.ArrowException, OSError) as error:
            raise Damaged(shard.file, f"damaged: {str(error).splitlines()[0][:200]}") from error
        if any(column.null_count for column in table.columns):
            raise Damaged(shard.file, "damaged: it has empty cells")
        return table.combine_chunks()

    def _check(self, file: pq.ParquetFile, shard: Shard) -> None:
        if not file.schema_arrow.equals(self.schema):
            raise Damaged(shard.file, "damaged: its columns are not those of the manifest")
        metadata = file.metadata
        groups = tuple(metadata.row_group(at).num_rows for at in range(metadata.num_row_groups))
        if groups != shard.group_rows:
            raise Damaged(shard.file, f"damaged: row groups of {groups} rows instead of {shard.group_rows}")

    def rows(self, table: pa.Table, shard: Shard) -> Rows:
        """Decodes a whole table of :meth:`table`, one with all columns.

        Raises:
            Damaged: labels without a class name, images that are not what they claim to be.
        """
        plain = {name: table[name].to_numpy() for name in table.column_names if name != "image"}
        label = plain["label"]
        if len(label) and (label.min() < 0 or label.max() >= self.classes):
            raise Damaged(shard.file, "damaged: a label outside the class names")
        images = []
        sides = np.stack([plain[name] for name in _SHAPE], axis=1).astype(np.int64)
        for shape, cell in zip(sides, table["image"], strict=True):
            height, width, channels = (int(side) for side in shape)
            if min(height, width, channels) < 1 or max(height, width, channels) > MAX_SIDE:
                raise Damaged(shard.file, f"damaged: there cannot be an image of shape {(height, width, channels)}")
            images.append(self._image(cell.as_buffer(), (height, width, channels), shard))
        return Rows(images, label, plain["index"], {name: plain[name] for name in self._columns})

    def _image(self, data: pa.Buffer, shape: tuple[int, int, int], shard: Shard) -> NDArray[np.uint8]:
        if self.form == "encoded":
            try:
                image = decode_image(memoryview(data))
            except UnreadableImage as error:
                raise Damaged(shard.file, f"damaged: an image that cannot be decoded: {error}") from error
            if image.shape != shape:
                raise Damaged(shard.file, f"damaged: an image of shape {image.shape} instead of {shape}")
            return image
        pixels = np.frombuffer(data, dtype=np.uint8)
        if pixels.size != shape[0] * shape[1] * shape[2]:
            raise Damaged(shard.file, f"damaged: {pixels.size} bytes cannot be an image of shape {shape}")
        return pixels.reshape(shape)
