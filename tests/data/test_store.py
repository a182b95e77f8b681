"""The store: round trip, atomic writing, damage, and what a fingerprint covers."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from armillary.data.store import (
    Dataset,
    Record,
    Unreadable,
    list_datasets,
    open_dataset,
    write_dataset,
)
from armillary.spec.errors import UserError

Make = Callable[..., Dataset]


def varied() -> Iterator[Record]:
    rng = np.random.default_rng(3)
    for at in range(9):
        image = rng.integers(0, 256, (4 + at, 7, 3 if at % 2 else 1), dtype=np.uint8)
        yield Record(image, at % 3, {"quality": at / 7, "caption": f"an image, {at}", "masked": at > 4, "pose": at - 5})


COLUMNS = {"quality": "float32", "caption": "string", "masked": "bool", "pose": "int64"}


def write_varied(name: str, shard_rows: int = 4) -> Dataset:
    return write_dataset(name, varied(), class_names=["a", "b", "c"], columns=COLUMNS, shard_rows=shard_rows)  # type: ignore[arg-type]


def test_what_is_read_is_what_was_written() -> None:
    dataset = write_varied("mixed")
    assert dataset.manifest.image_shape is None
    assert dataset.manifest.histogram == (3, 3, 3)
    assert [shard.rows for shard in dataset.manifest.shards] == [4, 4, 1]
    at = 0
    written = list(varied())
    for rows in dataset.rows():
        for position, image in enumerate(rows.images):
            np.testing.assert_array_equal(image, written[at].image)
            assert rows.label[position] == written[at].label
            assert rows.index[position] == at
            for name, value in written[at].fields.items():
                got = rows.fields[name][position]
                assert got == (np.float32(value) if name == "quality" else value)
            at += 1
    assert at == len(dataset) == 9
    dataset.verify()


def test_fingerprint_does_not_know_shards_names_or_places(tmp_path: Path) -> None:
    one, many = write_varied("one", 100), write_varied("many", 2)
    elsewhere = write_varied(str(tmp_path / "somewhere" / "else"))
    assert one.fingerprint == many.fingerprint == elsewhere.fingerprint
    assert len(one.manifest.shards) != len(many.manifest.shards)


@pytest.mark.parametrize("what", ["pixel", "label", "column", "class name", "order", "shape"])
def test_fingerprint_knows_the_content(what: str) -> None:
    rows = list(varied())
    names = ["a", "b", "c"]
    before = write_dataset("before", rows, class_names=names, columns=COLUMNS)  # type: ignore[arg-type]
    first = rows[0]
    assert isinstance(first.image, np.ndarray)
    if what == "pixel":
        image = first.image.copy()
        image[0, 0, 0] ^= 1
        rows[0] = Record(image, first.label, first.fields)
    elif what == "label":
        rows[0] = Record(first.image, 1, first.fields)
    elif what == "column":
        rows[0] = Record(first.image, first.label, {**first.fields, "caption": "another"})
    elif what == "class name":
        names = ["a", "b", "d"]
    elif what == "order":
        rows[0], rows[1] = rows[1], rows[0]
    else:
        rows[0] = Record(first.image.transpose(1, 0, 2), first.label, first.fields)
    after = write_dataset("after", rows, class_names=names, columns=COLUMNS)  # type: ignore[arg-type]
    assert before.fingerprint != after.fingerprint


def test_the_fingerprint_is_the_same_on_every_machine() -> None:
    # Written out by hand: little-endian int64 index, label and shape, then the pixels. If this changes, the history of
    # every leaderboard ends; raise the schema version then.
    rows = [Record(np.arange(6, dtype=np.uint8).reshape(2, 3, 1), 0), Record(np.zeros((2, 3, 1), np.uint8), 1)]
    dataset = write_dataset("constant", rows, class_names=["x", "y"])
    content = b'{"classes": ["x", "y"], "columns": {}, "schema": 1}'
    content += struct.pack("<5q", 0, 0, 2, 3, 1) + bytes(range(6))
    content += struct.pack("<5q", 1, 1, 2, 3, 1) + bytes(6)
    assert dataset.fingerprint == hashlib.sha256(content).hexdigest()


def test_an_existing_dataset_is_not_written_over(make: Make) -> None:
    before = make("small").fingerprint
    with pytest.raises(UserError, match="exists already"):
        make("small", classes=3)
    assert open_dataset("small").fingerprint == before


def test_an_importer_that_fails_leaves_nothing(armillary_home: Path) -> None:
    def broken() -> Iterator[Record]:
        yield from varied()
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        write_dataset("half", broken(), class_names=["a", "b", "c"], columns=COLUMNS, shard_rows=2)  # type: ignore[arg-type]
    assert list((armillary_home / "datasets").iterdir()) == []


KILLED = """
import os, signal, sys
import numpy as np
from armillary.data.store import Record, write_dataset
def rows():
    for at in range(50):
        if at == 30:
            print("half", flush=True)
            signal.pause()
        yield Record(np.full((4, 4, 1), at, np.uint8), 0)
write_dataset("victim", rows(), class_names=["a"], shard_rows=10)
"""


def test_a_killed_import_leaves_nothing_that_opens_and_the_next_one_cleans_up(armillary_home: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True, env=os.environ.copy())
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    left = list((armillary_home / "datasets").iterdir())
    assert len(left) == 1, "the kill came while shards were there"
    assert list(left[0].glob("shard-*.parquet"))
    assert list_datasets() == []
    with pytest.raises(UserError, match="there is no dataset 'victim'"):
        open_dataset("victim")
    rows = [Record(np.full((4, 4, 1), at, np.uint8), 0) for at in range(50)]
    assert len(write_dataset("victim", rows, class_names=["a"], shard_rows=10)) == 50
    assert [path.name for path in (armillary_home / "datasets").iterdir()] == ["victim"]


def test_two_writers_of_the_same_content_agree() -> None:
    # The second finishes inside the first, as two workers do that import on first use.
    def slow() -> Iterator[Record]:
        yield from varied()
        write_varied("shared")

    dataset = write_dataset("shared", slow(), class_names=["a", "b", "c"], columns=COLUMNS)  # type: ignore[arg-type]
    dataset.verify()


def test_a_missing_dataset_shows_what_there_is_and_how_to_import(make: Make) -> None:
    make("faces_one")
    with pytest.raises(UserError) as error:
        open_dataset("faces_noe")
    text = str(error.value)
    assert "there is no dataset 'faces_noe'" in text
    assert "did you mean 'faces_one'?" in text
    assert "armillary data import orl" in text


@pytest.mark.parametrize("name", ["../outside", "ftp://host/set", ""])
def test_strange_names_are_refused(name: str) -> None:
    with pytest.raises(UserError):
        open_dataset(name)


def test_listing_leaves_out_what_is_not_a_dataset(make: Make, armillary_home: Path) -> None:
    make("b")
    make("a")
    (armillary_home / "datasets" / "empty").mkdir()
    broken = armillary_home / "datasets" / "broken"
    broken.mkdir()
    (broken / "manifest.json").write_text("{")
    assert [dataset.name for dataset in list_datasets()] == ["a", "b"]


def edit(dataset: Dataset, change: Callable[[dict[str, object]], None]) -> None:
    path = Path(dataset.location) / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda m: m["shards"][0].update(file="../../etc/passwd"), "shards.0.file"),
        (lambda m: m["shards"][0].update(file="/etc/shard-00000.parquet"), "shards.0.file"),
        (lambda m: m["shards"].append(m["shards"][0]), "count differently"),
        (lambda m: m.update(images=10**9), "count differently"),
        (lambda m: m.update(schema_version=3), "schema_version"),
        (lambda m: m.update(surprise=1), "surprise"),
        (lambda m: m.update(fingerprint="x"), "fingerprint"),
        (lambda m: m.update(columns={"quality": "pickle"}), "columns.quality"),
        (lambda m: m.pop("class_names"), "class_names"),
        (lambda m: m["class_names"].pop(), "class names but"),
    ],
)
def test_a_manifest_that_lies_is_refused(
    make: Make, change: Callable[[dict[str, object]], None], complaint: str
) -> None:
    dataset = make()
    edit(dataset, change)
    with pytest.raises(UserError, match="broken manifest") as error:
        open_dataset("small")
    assert complaint in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\x00\xff\x00", b"[]", b"null", b'{"name": '])
def test_a_manifest_that_is_not_one_is_refused(make: Make, content: bytes) -> None:
    (Path(make().location) / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match="broken manifest"):
        open_dataset("small")


def read_all(dataset: Dataset) -> None:
    for _ in dataset.rows():
        pass


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "text", "flipped"])
def test_a_damaged_shard_is_refused(make: Make, damage: str) -> None:
    dataset = make()
    shard = Path(dataset.location) / "shard-00000.parquet"
    content = bytearray(shard.read_bytes())
    if damage == "missing":
        shard.unlink()
    elif damage == "empty":
        shard.write_bytes(b"")
    elif damage == "cut":
        shard.write_bytes(content[: len(content) // 2])
    elif damage == "text":
        shard.write_bytes(b"not parquet" * 100)
    else:
        content[len(content) // 3] ^= 0x10
        shard.write_bytes(content)
    with pytest.raises(UserError, match=r"shard-00000\.parquet is (missing|damaged)") as error:
        read_all(dataset)
    assert "import it again" in str(error.value)


@pytest.mark.parametrize(
    ("column", "value", "complaint"),
    [
        ("height", 10**6, "cannot be an image"),
        ("height", -16, "cannot be an image"),
        ("channels", 0, "cannot be an image"),
        ("label", 10, "outside the class names"),
        ("label", -1, "outside the class names"),
        ("index", 7, "does not continue"),
        ("label", None, "empty cells"),
    ],
)
def test_a_shard_that_lies_is_refused(make: Make, column: str, value: int | None, complaint: str) -> None:
    dataset = make()
    shard = Path(dataset.location) / "shard-00000.parquet"
    table = pq.read_table(shard)
    rows = table.to_pylist()
    rows[3][column] = value
    pq.write_table(type(table).from_pylist(rows, schema=table.schema), shard)
    with pytest.raises(UserError, match=complaint):
        read_all(dataset)


def test_a_shard_with_other_columns_is_refused(make: Make) -> None:
    dataset = make()
    shard = Path(dataset.location) / "shard-00000.parquet"
    pq.write_table(pq.read_table(shard).drop_columns(["label"]), shard)
    with pytest.raises(UserError, match="columns are not those"):
        read_all(dataset)


def test_verify_finds_exchanged_content(make: Make) -> None:
    # A whole, valid shard with other pixels: only the fingerprint can tell.
    dataset, other = (
        make("small"),
        write_dataset(
            "other",
            [Record(np.zeros((16, 16, 1), np.uint8), at // 6) for at in range(60)],
            class_names=[f"c{label}" for label in range(10)],
        ),
    )
    (Path(dataset.location) / "shard-00000.parquet").write_bytes(
        (Path(other.location) / "shard-00000.parquet").read_bytes()
    )
    read_all(dataset)
    with pytest.raises(UserError, match="fingerprint differs"):
        dataset.verify()


def test_nothing_to_import_is_an_error_and_leaves_nothing(armillary_home: Path) -> None:
    with pytest.raises(UserError, match="no images, and 1 unreadable files"):
        write_dataset("none", [], class_names=["a"], unreadable=[Unreadable("x.png", "cut off")])
    assert list((armillary_home / "datasets").iterdir()) == []


@pytest.mark.parametrize(
    "record",
    [
        Record(np.zeros((4, 4), np.uint8), 0),
        Record(np.zeros((4, 4, 1), np.float32), 0),
        Record(np.zeros((0, 4, 1), np.uint8), 0),
        Record(np.zeros((4, 4, 1), np.uint8), 1),
        Record(np.zeros((4, 4, 1), np.uint8), 0, {"quality": 1.0}),
    ],
)
def test_an_importers_bug_does_not_reach_the_store(record: Record) -> None:
    with pytest.raises(ValueError):
        write_dataset("bug", [record], class_names=["a"])


def test_places_that_cannot_be_written_to_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write to .*file/sub"):
        write_dataset(str(tmp_path / "file" / "sub"), varied(), class_names=["a", "b", "c"], columns=COLUMNS)  # type: ignore[arg-type]
    assert (tmp_path / "file").read_text() == "in the way"
