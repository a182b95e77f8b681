"""Decoding image files that may be damaged, huge or hostile."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# A file of more bytes is no photograph for training; one record of a source is never larger either.
MAX_BYTES = 64 * 2**20
# Pillow warns at 89 million pixels; a photograph has fewer, a decompression bomb more.
MAX_PIXELS = 64_000_000
# Only formats whose decoders read nothing but the bytes they are given (no PostScript, no references to files).
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".pgm", ".ppm", ".webp", ".tif", ".tiff", ".gif")


class UnreadableImage(OSError):  # noqa: N818 - reads as a statement where it is caught
    """Not an image, cut off, too large, or not of a kind that fits in eight bits."""


def decode_image(data: bytes | memoryview) -> NDArray[np.uint8]:
    """Decodes an image file to uint8 ``(height, width, 1 or 3)``; palettes and transparency become RGB.

    The first picture of an animation is taken. Orientation tags are not applied, as the field does.

    Raises:
        UnreadableImage: see there; also for more than :data:`MAX_PIXELS`.
    """
    from PIL import Image

    if len(data) > MAX_BYTES:
        raise UnreadableImage(f"{len(data):,} bytes, more than {MAX_BYTES:,}")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UnreadableImage(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
            if image.mode.startswith(("I", "F")):
                raise UnreadableImage(f"pixel mode {image.mode} has more than 8 bits")
            pixels = np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"), dtype=np.uint8)
    except UnreadableImage:
        raise
    except Exception as error:
        # Decoders report damage as almost any exception.
        reason = "not an image" if type(error).__name__ == "UnidentifiedImageError" else str(error)[:200]
        raise UnreadableImage(reason or type(error).__name__) from error
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def read_image(path: Path | str) -> NDArray[np.uint8]:
    """Reads and decodes a file, see :func:`decode_image`.

    Raises:
        OSError: the file cannot be read, or it is unreadable as an image.
    """
    with Path(path).open("rb") as file:
        return decode_image(file.read(MAX_BYTES + 1))
