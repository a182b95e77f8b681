"""Every importer: round trip here and on S3, resumption after SIGKILL, constant memory, truncation at any byte."""

from __future__ import annotations

import functools
import importlib.util
import io
import os
import pickle
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pyarrow import fs

from armillary.data.importers import IMPORTERS, import_dataset
from armillary.data.layout import filesystem_of
from armillary.data.store import Dataset, list_datasets, open_dataset
from armillary.spec.errors import UserError


def _archives() -> ModuleType:
    # Test folders are no packages; this one is loaded by its path.
    spec = importlib.util.spec_from_file_location("archives", Path(__file__).with_name("archives.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["archives"] = module
    spec.loader.exec_module(module)
    return module


archives = _archives()
FORMATS: dict[str, Any] = archives.FORMATS


def check(dataset: Dataset, made: Any) -> None:
    manifest = dataset.manifest
    assert manifest.form == made.form
    assert manifest.quarantined == 0
    images = [image for rows in dataset.rows() for image in rows.images]
    assert len(images) == len(made.pictures) == len(dataset)
    for image, number in zip(images, made.pictures, strict=True):
        blank = number == archives.BLANK
        np.testing.assert_array_equal(image, np.zeros((1, 1, 1)) if blank else archives.pixels(number))
    assert [manifest.class_names[label] for label in dataset.column("label")] == list(made.classes)
    assert set(manifest.columns) == set(made.columns)
    for name, values in made.columns.items():
        assert dataset.column(name).tolist() == values
    assert set(manifest.tables) == set(made.tables)
    for name, rows in made.tables.items():
        assert dataset.table(name).to_pylist() == rows
    dataset.verify()


def upload(folder: Path, bucket: str) -> None:
    filesystem, root = filesystem_of(bucket)
    for path in folder.rglob("*"):
        if path.is_file():
            with filesystem.open_output_stream(
                f"{root}/{path.relative_to(folder).as_posix()}", compression=None
            ) as sink:
                sink.write(path.read_bytes())


@pytest.mark.parametrize("case", FORMATS)
def test_what_goes_in_comes_out(case: str, tmp_path: Path) -> None:
    kind, write = FORMATS[case]
    (tmp_path / "in").mkdir()
    made = write(tmp_path / "in")
    seen: list[tuple[int, int | None]] = []
    dataset = import_dataset(kind, "out", made.source, lambda done, total: seen.append((done, total)), made.options)
    check(dataset, made)
    assert seen == [(done, len(dataset)) for done in range(1, len(dataset) + 1)]


@pytest.mark.parametrize("case", FORMATS)
def test_the_same_through_s3(case: str, tmp_path: Path, bucket: str) -> None:
    kind, write = FORMATS[case]
    folder = tmp_path / "in"
    folder.mkdir()
    made = write(folder)
    upload(folder, f"{bucket}/raw")
    source = f"{bucket}/raw/{made.source.relative_to(folder).as_posix()}"
    dataset = import_dataset(kind, f"{bucket}/sets/out", source, options=made.options)
    check(open_dataset(f"{bucket}/sets/out"), made)
    assert dataset.fingerprint == import_dataset(kind, "here", made.source, options=made.options).fingerprint


def test_every_kind_that_reads_a_source_is_tested() -> None:
    read = {kind for kind, importer in IMPORTERS.items() if not importer.embedded}
    # Graphs are no images: test_graphs.py reads them.
    assert read - {"ego", "tu", "pyg"} == {kind for kind, _ in FORMATS.values()}


def _bytes(made: Any, root: Path) -> list[Path]:
    """The files that are the archive itself: not the single images, whose damage is quarantined."""
    return sorted(path for path in root.rglob("*") if path.is_file() and path.suffix not in (".png", ".txt", ".csv"))


# Text that ends early is a shorter text.
CUT = [
    case
    for case, (kind, _) in FORMATS.items()
    if kind not in ("folder", "lfw", "ijb", "pairs-csv", "captions-csv", "edges")
]


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.999])
@pytest.mark.parametrize("case", CUT)
def test_truncated_archives_are_refused_and_leave_nothing(
    case: str, share: float, tmp_path: Path, armillary_home: Path
) -> None:
    kind, write = FORMATS[case]
    root = tmp_path / "in"
    root.mkdir()
    made = write(root)
    for path in _bytes(made, root):
        if path.suffix == ".tar" and share > 0.9:
            # Tars end in kilobytes of zeros, which nobody needs.
            continue
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(UserError) as error:
            import_dataset(kind, "out", made.source, options=made.options)
        assert len(str(error.value)) < 1000
        path.write_bytes(content)
        assert not list((armillary_home / "datasets").glob("out*"))
        assert not list((armillary_home / "datasets").glob(".out*"))


@pytest.mark.parametrize("case", CUT)
def test_flipped_bytes_never_do_worse_than_an_error(case: str, tmp_path: Path) -> None:
    kind, write = FORMATS[case]
    root = tmp_path / "in"
    root.mkdir()
    made = write(root)
    rng = np.random.default_rng(5)
    for path in _bytes(made, root):
        content = path.read_bytes()
        for at in rng.integers(0, len(content), 8):
            damaged = bytearray(content)
            damaged[at] ^= int(rng.integers(1, 256))
            path.write_bytes(damaged)
            try:
                dataset = import_dataset(kind, f"out{at}", made.source, options=made.options)
            except UserError:
                continue
            # What is imported all the same must be whole.
            dataset.verify()
            shutil.rmtree(dataset.location)
        path.write_bytes(content)


KILLED = """
import functools, os, signal, sys
from armillary.data import importers, store
from armillary.data.importers import contents
contents.write_dataset = functools.partial(store.write_dataset, shard_rows=2)
for kind, name, source, options in eval(sys.argv[1]):
    # Starting Python anew for each would take most of the time.
    child = os.fork()
    if child == 0:
        def progress(done, total):
            if done == 7:
                os.kill(os.getpid(), signal.SIGKILL)
        importers.import_dataset(kind, name, source, progress, options)
        os._exit(3)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, (kind, name)
"""


def kill(*cases: tuple[str, str, Any]) -> None:
    """Imports, each in a process that gets SIGKILL at the seventh image; shards have two."""
    plain = [(kind, name, str(made.source), made.options) for kind, name, made in cases]
    subprocess.run([sys.executable, "-c", KILLED, repr(plain)], check=True, env=os.environ.copy(), timeout=120)


class Seen:
    """A progress report that remembers."""

    def __init__(self) -> None:
        self.done: list[int] = []

    def __call__(self, done: int, _: int | None) -> None:
        self.done.append(done)


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    from armillary.data.importers import contents
    from armillary.data.store import write_dataset

    monkeypatch.setattr(contents, "write_dataset", functools.partial(write_dataset, shard_rows=2))


def test_killed_imports_go_on_and_give_the_same_bytes(tmp_path: Path, armillary_home: Path, small_shards: None) -> None:
    cases = {}
    for case in ("folder", "recordio", "bin", "webdataset", "parquet", "idx", "npz", "lfw"):
        kind, write = FORMATS[case]
        root = tmp_path / kind
        root.mkdir()
        cases[kind] = write(root)
    for kind in ("folder", "lfw"):
        # One that cannot be read, before and after the kill.
        (cases[kind].source / "ann" / "broken.png").write_bytes(b"no image")
        (cases[kind].source / "cyd" / "broken.png").write_bytes(b"no image")
    kill(*((kind, kind, made) for kind, made in cases.items()))
    assert list_datasets() == []
    store = armillary_home / "datasets"
    for kind, made in cases.items():
        assert len(list(store.glob(f".{kind}.partial-*/shard-00001.parquet"))) == 1
        seen = Seen()
        resumed = import_dataset(kind, kind, made.source, seen, made.options)
        assert seen.done[0] > 4, f"{kind}: whole shards were imported again"
        resumed.verify()
        after = content(Path(resumed.location))
        shutil.rmtree(resumed.location)
        assert after == content(Path(import_dataset(kind, kind, made.source, options=made.options).location)), kind
    assert sorted(path.name for path in store.iterdir()) == sorted(cases)


def test_a_killed_import_to_s3_goes_on(tmp_path: Path, bucket: str, small_shards: None) -> None:
    made = archives.folder(tmp_path)
    kill(("folder", f"{bucket}/out", made))
    with pytest.raises(UserError, match="there is no dataset"):
        open_dataset(f"{bucket}/out")
    seen: list[int] = []
    dataset = import_dataset("folder", f"{bucket}/out", made.source, lambda done, _: seen.append(done))
    assert seen[0] > 4
    check(dataset, made)
    filesystem, root = filesystem_of(f"{bucket}/out")
    left = {info.base_name for info in filesystem.get_file_info(fs.FileSelector(root, recursive=True)) if info.is_file}
    assert left == {"manifest.json", *(shard.file for shard in dataset.shards)}


def test_a_changed_source_is_imported_from_the_start(tmp_path: Path) -> None:
    made = archives.folder(tmp_path)
    kill(("folder", "out", made))
    (made.source / "ann" / "0.png").write_bytes(archives.png(77))
    seen: list[int] = []
    dataset = import_dataset("folder", "out", made.source, lambda done, _: seen.append(done))
    assert seen[0] == 1
    np.testing.assert_array_equal(next(dataset.rows()).images[0], archives.pixels(77))


def test_an_interrupted_import_goes_on_in_the_same_process(tmp_path: Path, small_shards: None) -> None:
    made = archives.folder(tmp_path)

    def interrupt(done: int, _: int | None) -> None:
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_dataset("folder", "out", made.source, interrupt)
    seen: list[int] = []
    check(import_dataset("folder", "out", made.source, lambda done, _: seen.append(done)), made)
    assert seen[0] > 4


def test_a_shard_that_the_power_failure_cut_is_made_again(
    tmp_path: Path, armillary_home: Path, small_shards: None
) -> None:
    made = archives.folder(tmp_path)
    kill(("folder", "out", made))
    (shard,) = (armillary_home / "datasets").glob(".out.partial-*/shard-00001.parquet")
    shard.write_bytes(shard.read_bytes()[:-5])
    seen: list[int] = []
    check(import_dataset("folder", "out", made.source, lambda done, _: seen.append(done)), made)
    assert seen[0] == 3


def test_pairs_with_an_unreadable_image_are_left_out(tmp_path: Path) -> None:
    made = archives.lfw(tmp_path)
    (made.source / "ann" / "ann_0002.png").write_bytes(b"broken")
    dataset = import_dataset("lfw", "out", made.source)
    assert [item.file for item in dataset.quarantine()] == ["ann/ann_0002.png"]
    pairs = dataset.table("pairs").to_pylist()
    assert [(pair["first"], pair["second"]) for pair in pairs] == [(0, 3), (2, 4), (2, 7)]


@pytest.mark.parametrize("kind", ["idx", "npz", "bin", "webdataset", "parquet"])
def test_memory_does_not_grow_with_the_source(kind: str, tmp_path: Path) -> None:
    count, side = 1200, 128
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    labels = np.arange(count) % 5

    def bmp(at: int) -> bytes:
        with io.BytesIO() as file:
            Image.fromarray(images[at]).save(file, "BMP")
            return file.getvalue()

    if kind == "idx":
        source = tmp_path / "big"
        source.mkdir()
        (source / "train-images-idx3-ubyte").write_bytes(archives.idx_bytes(images))
        (source / "train-labels-idx1-ubyte").write_bytes(archives.idx_bytes(labels.astype(np.uint8)))
    elif kind == "npz":
        source = tmp_path / "big.npz"
        np.savez(source, images=images, labels=labels)
    elif kind == "bin":
        source = tmp_path / "big.bin"
        source.write_bytes(pickle.dumps(([bmp(at) for at in range(count)], [True] * (count // 2)), protocol=4))
    elif kind == "webdataset":
        members = [part for at in range(count) for part in ((f"{at}.bmp", bmp(at)), (f"{at}.cls", b"%d" % (at % 5)))]
        source = archives.tar_of(tmp_path / "big.tar", members)
    else:
        source = tmp_path / "big.parquet"
        table = pa.table({"image": [bmp(at) for at in range(count)], "label": labels})
        pq.write_table(table, source, row_group_size=100)
    size = count * side * side * 3
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    peak_arrow = 0

    def watch(done: int, _: int | None) -> None:
        nonlocal peak_arrow
        peak_arrow = max(peak_arrow, pa.total_allocated_bytes() - before)

    import_dataset(kind, "big", source, watch)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # A row group is 32 MiB at most, held as bytes and as Arrow for a moment; the source has 59 MB.
    assert size > 55e6
    assert peak < 48e6
    assert peak_arrow < 48e6


def test_a_bucket_that_is_not_there_is_named(tmp_path: Path, bucket: str) -> None:
    made = archives.folder(tmp_path)
    with pytest.raises(UserError, match="there is no bucket 'no-such-bucket'"):
        import_dataset("folder", "s3://no-such-bucket/out", made.source)
