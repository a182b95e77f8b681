"""From the cells of a shard to batches of pixels of one size.

JPEGs go through libjpeg-turbo straight into the batch, without the interpreter's lock, so that threads add up; its
pixels are those that Pillow gives. Everything else, and whatever is damaged, is left to
:func:`armillary.data.images.decode_image`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from armillary.data.images import MAX_PIXELS, UnreadableImage, decode_image
from armillary.data.layout import Form

if TYPE_CHECKING:
    import pyarrow as pa

_JPEG = b"\xff\xd8\xff"
# Large photographs are decoded and resized a few at a time.
_WORKING_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Cells:
    """The images of some rows as they are stored: bytes, and the ``(n, 3)`` shapes (height, width, channels)."""

    data: list[memoryview]
    shapes: NDArray[np.int64]

    @classmethod
    def of(cls, table: pa.Table) -> Cells:
        """The images of a row group; the bytes stay where Arrow keeps them."""
        column = table["image"].combine_chunks()
        shapes = np.stack([table[name].to_numpy() for name in ("height", "width", "channels")], axis=1)
        if not len(column):
            return cls([], shapes.astype(np.int64))
        _, offsets, content = column.buffers()
        bounds = np.frombuffer(offsets, dtype=np.int64)[column.offset : column.offset + len(column) + 1].tolist()
        # Arrow calls its bytes signed.
        view = memoryview(content).cast("B")
        cells = [view[start:end] for start, end in pairwise(bounds)]
        return cls(cells, shapes.astype(np.int64))

    def __len__(self) -> int:
        return len(self.data)

    def select(self, rows: list[int]) -> Cells:
        """Some of the rows."""
        return Cells([self.data[row] for row in rows], self.shapes[rows])


def decode_into(cells: Cells, form: Form, out: NDArray[np.uint8]) -> None:
    """Decodes and resizes images; grey ones among colour are repeated.

    Args:
        cells: n images.
        form: how they are stored.
        out: ``(n, C, H, W)``, filled.

    Raises:
        UnreadableImage: a damaged image, or one of another shape than the shard says.
    """
    _, _, height, width = out.shape
    shapes, inverse = np.unique(cells.shapes, axis=0, return_inverse=True)
    for number, (h, w, c) in enumerate(shapes.tolist()):
        if min(h, w, c) < 1 or h * w > MAX_PIXELS or c > 4:
            raise UnreadableImage(f"there cannot be an image of shape {(h, w, c)}")
        rows = np.flatnonzero(inverse.reshape(-1) == number)
        for part in np.array_split(rows, max(1, -(-len(rows) * h * w * c // _WORKING_BYTES))):
            pixels = np.empty((len(part), h, w, c), dtype=np.uint8)
            for at, row in enumerate(part.tolist()):
                _decode(cells.data[row], form, pixels[at])
            planes = pixels.transpose(0, 3, 1, 2)
            if (h, w) != (height, width):
                planes = resize(torch.from_numpy(planes), height, width).numpy()
            # Assigning repeats a single channel; a slice is several times faster than a list of rows.
            out[slice(part[0], part[-1] + 1) if len(rows) == len(out) else part] = planes


def _decode(cell: memoryview, form: Form, out: NDArray[np.uint8]) -> None:
    """One image into ``out (height, width, channels)``."""
    if form == "pixels":
        if len(cell) != out.size:
            raise UnreadableImage(f"{len(cell)} bytes cannot be an image of shape {out.shape}")
        out[:] = np.frombuffer(cell, dtype=np.uint8).reshape(out.shape)
        return
    if cell[:3] == _JPEG and _decode_jpeg(cell, out):
        return
    image = decode_image(cell)
    if image.shape != out.shape:
        raise UnreadableImage(f"an image of shape {image.shape} instead of {out.shape}")
    out[:] = image


def _decode_jpeg(cell: memoryview, out: NDArray[np.uint8]) -> bool:
    """Whether it was a JPEG of that shape in grey or RGB without a fault."""
    import simplejpeg

    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(cell)
        channels = {"Gray": 1, "YCbCr": 3, "RGB": 3}.get(space)
        if (height, width, channels) != out.shape:
            return False
        simplejpeg.decode_jpeg(cell, "GRAY" if channels == 1 else "RGB", buffer=out)
    except ValueError:
        return False
    return True


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """uint8 ``(N, C, H, W)``, bilinear with antialiasing (a triangle as wide as the step, as Pillow does)."""
    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(images, size=(height, width), mode="bilinear", antialias=True, align_corners=False)
