"""The pixels of a dataset: where they are, and all of them in memory."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from armillary.data.decode import Cells, decode_into
from armillary.data.images import UnreadableImage
from armillary.data.store import Dataset
from armillary.spec.errors import UserError

# Images are asked for in any of these ways.
Positions = Tensor | slice | list[int]


@dataclass(frozen=True)
class PixelSource:
    """All images of a dataset at one size: ``(channels, height, width)``, grey among colour repeated."""

    dataset: Dataset
    channels: int
    height: int
    width: int

    @property
    def key(self) -> str:
        """Names the content: equal keys mean equal pixels."""
        return f"{self.dataset.fingerprint}-{self.channels}x{self.height}x{self.width}"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the decoded dataset."""
        return len(self.dataset), self.channels, self.height, self.width

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded dataset."""
        return int(np.prod(self.shape, dtype=np.int64))

    def groups(self) -> list[tuple[int, int, int]]:
        """Shard, row group within it, and rows, in order of ``index``."""
        return [
            (number, group, rows)
            for number, shard in enumerate(self.dataset.shards)
            for group, rows in enumerate(shard.group_rows)
        ]

    def cells(self, shard: int, group: int) -> Cells:
        """The stored images of a row group.

        Raises:
            UserError: the shard is missing or damaged.
        """
        return Cells.of(self.dataset.read_arrow(shard, group, ["image", "height", "width", "channels"]))

    def decode(self, cells: Cells, out: NDArray[np.uint8]) -> None:
        """Fills ``out (n, C, H, W)``.

        Raises:
            UserError: an image is damaged.
        """
        try:
            decode_into(cells, self.dataset.manifest.form, out)
        except UnreadableImage as error:
            hint = "`armillary data verify` checks all of it; import it again"
            raise UserError(f"dataset {self.dataset.name!r} is damaged: {error}", key="data.name", hint=hint) from error


def decode_all(source: PixelSource) -> NDArray[np.uint8]:
    """The whole dataset in memory, ``(N, C, H, W)``, decoded by all of the machine's cores.

    Raises:
        UserError: a shard is missing or damaged.
    """
    whole = np.empty(source.shape, dtype=np.uint8)
    groups = source.groups()
    starts = np.cumsum([0, *(rows for _, _, rows in groups)]).tolist()

    def fill(number: int) -> None:
        shard, group, rows = groups[number]
        source.decode(source.cells(shard, group), whole[starts[number] : starts[number] + rows])

    with ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="decode") as threads:
        for _ in threads.map(fill, range(len(groups))):
            pass
    return whole


class ArrayImages:
    """Some images of a dataset that is in memory as a whole; folds and trials share the one array.

    The array may be read-only memory of other processes: what is handed out is always a copy.

    Args:
        array: uint8 ``(M, C, H, W)``, all images of the dataset.
        rows: ``(N,)`` int64, which of them.
        key: of the source the array was decoded from.
    """

    dtype = torch.uint8
    ndim = 4

    def __init__(self, array: NDArray[np.uint8], rows: Tensor, key: str) -> None:
        self.array, self.rows, self.key = array, rows, key

    @property
    def shape(self) -> torch.Size:
        """``(N, C, H, W)``."""
        return torch.Size((len(self.rows), *self.array.shape[1:]))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Positions) -> Tensor:
        """Images by position, ``(n, C, H, W)``; a mask serves as well."""
        return torch.from_numpy(self.array[self.rows[rows].numpy()])

    def select(self, rows: Tensor) -> ArrayImages:
        """The images at those positions."""
        return ArrayImages(self.array, self.rows[rows], self.key)


def mean_image(images: Any, chunk: int = 1024) -> Tensor:
    """The mean of uint8 images, float32 ``(C, H, W)`` in [0, 1], without holding more than a chunk in floats."""
    total = torch.zeros(images.shape[1:], dtype=torch.float64)
    for start in range(0, len(images), chunk):
        total += images[start : start + chunk].to(torch.float64).sum(dim=0)
    return (total / (255 * len(images))).to(torch.float32)
