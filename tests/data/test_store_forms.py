"""The store's second version: encoded images, extra tables, row groups at random, manifests of the first version."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

from armillary.data import writing
from armillary.data.store import Dataset, Encoded, Record, Unreadable, open_dataset, write_dataset
from armillary.spec.errors import UserError


def picture(at: int) -> NDArray[np.uint8]:
    return np.random.default_rng(at).integers(0, 256, (5 + at % 4, 7, 3), dtype=np.uint8)


def encoded(at: int, kind: str = "PNG") -> Encoded:
    with io.BytesIO() as file:
        Image.fromarray(picture(at)).save(file, kind)
        return Encoded(file.getvalue(), (5 + at % 4, 7, 3))


def write_encoded(name: str, count: int = 10, **more: object) -> Dataset:
    rows = [Record(encoded(at), at % 2, {"q": at / 3}) for at in range(count)]
    return write_dataset(name, rows, class_names=["a", "b"], columns={"q": "float32"}, form="encoded", **more)  # type: ignore[arg-type]


def pairs(count: int = 4) -> pa.Table:
    numbers = np.arange(count)
    names = pa.array([f"p{at}" for at in numbers], pa.string())
    return pa.table({"first": numbers, "second": numbers + 1, "same": numbers % 2 == 0, "name": names})


def test_encoded_images_keep_their_bytes_and_decode_when_read() -> None:
    dataset = write_encoded("set", shard_rows=4)
    assert dataset.manifest.form == "encoded"
    assert dataset.manifest.image_shape is None
    images = [image for rows in dataset.rows() for image in rows.images]
    for at, image in enumerate(images):
        np.testing.assert_array_equal(image, picture(at))
    cells = dataset.read_arrow(1, columns=["image"])["image"].to_pylist()
    assert cells == [encoded(at).data for at in range(4, 8)]
    dataset.verify()


def test_the_forms_have_different_fingerprints_and_bytes_count() -> None:
    first = write_encoded("png")
    rows = [Record(picture(at), at % 2, {"q": at / 3}) for at in range(10)]
    pixels = write_dataset("pixels", rows, class_names=["a", "b"], columns={"q": "float32"})
    others = [Record(encoded(at, "BMP"), at % 2, {"q": at / 3}) for at in range(10)]
    bmp = write_dataset("bmp", others, class_names=["a", "b"], columns={"q": "float32"}, form="encoded")
    assert len({first.fingerprint, pixels.fingerprint, bmp.fingerprint}) == 3
    assert write_encoded("again", shard_rows=3).fingerprint == first.fingerprint


@pytest.mark.parametrize("form", ["pixels", "encoded"])
def test_the_other_form_of_record_is_an_importers_bug(form: str) -> None:
    record = Record(encoded(0) if form == "pixels" else picture(0), 0)
    with pytest.raises(ValueError, match=form):
        write_dataset("bug", [record], class_names=["a"], form=form)  # type: ignore[arg-type]


def test_an_encoded_image_that_lies_is_refused() -> None:
    wrong = Encoded(encoded(0).data, (6, 7, 3))
    dataset = write_dataset("lies", [Record(wrong, 0)], class_names=["a"], form="encoded")
    with pytest.raises(UserError, match=r"shape \(5, 7, 3\) instead of \(6, 7, 3\)"):
        next(dataset.rows())
    broken = Encoded(encoded(0).data[:40], (5, 7, 3))
    dataset = write_dataset("broken", [Record(broken, 0)], class_names=["a"], form="encoded")
    with pytest.raises(UserError, match="cannot be decoded"):
        dataset.read_shard(0)


def test_tables_come_back_and_count() -> None:
    plain, with_tables = write_encoded("plain"), write_encoded("with", tables={"pairs": pairs(), "graph": pairs(0)})
    assert with_tables.table("pairs").equals(pairs())
    assert with_tables.table("graph").num_rows == 0
    assert with_tables.manifest.tables["pairs"].columns == {
        "first": "int64", "second": "int64", "same": "bool", "name": "string",
    }  # fmt: skip
    with_tables.verify()
    other = write_encoded("other", tables={"pairs": pairs(5), "graph": pairs(0)})
    renamed = write_encoded("renamed", tables={"links": pairs(), "graph": pairs(0)})
    assert len({plain.fingerprint, with_tables.fingerprint, other.fingerprint, renamed.fingerprint}) == 4
    with pytest.raises(UserError, match="unknown table") as error:
        with_tables.table("pears")
    assert "'pairs'" in str(error.value)


def test_the_fingerprint_of_a_table_does_not_know_how_it_was_cut() -> None:
    whole = write_encoded("whole", tables={"pairs": pairs(6)})
    parts = pa.concat_tables([pairs(6).slice(0, 2), pairs(6).slice(2)])
    assert write_encoded("cut", tables={"pairs": parts}).fingerprint == whole.fingerprint


def test_tables_know_the_rows_of_what_was_read() -> None:
    def items(start: int) -> Iterator[Record | Unreadable]:
        for at in range(start, 8):
            yield Unreadable(f"{at}.png", "broken") if at in (0, 3, 4) else Record(picture(at), 0)

    dataset = write_dataset(
        "set",
        items,
        class_names=["a"],
        tables=lambda row_of: {"rows": pa.table({"row": pa.array([row_of(at) for at in range(8)], pa.int64())})},
    )
    assert dataset.table("rows")["row"].to_pylist() == [-1, 0, 1, -1, -1, 2, 3, 4]
    assert [item.file for item in dataset.quarantine()] == ["0.png", "3.png", "4.png"]


@pytest.mark.parametrize("damage", ["missing", "cut", "other rows", "other type", "flipped", "other values"])
def test_damaged_tables_are_refused(damage: str) -> None:
    dataset = write_encoded("set", tables={"pairs": pairs(200)})
    path = Path(dataset.location) / "tables" / "pairs.parquet"
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[:-100])
    elif damage == "flipped":
        content[len(content) // 4] ^= 4
        path.write_bytes(content)
    else:
        table = {"other rows": pairs(3), "other type": pairs(200).drop_columns("name"), "other values": pairs(200)}[
            damage
        ]
        if damage == "other values":
            table = table.set_column(0, "first", pa.array(np.arange(200) + 7))
        pq.write_table(table, path)
    with pytest.raises(UserError, match=r"pairs\.parquet is (missing|damaged)|fingerprint differs"):
        dataset.verify()


@pytest.mark.parametrize("column", [pa.array([1, None]), pa.array([[1], [2]]), pa.array([1, 2], pa.int8())])
def test_tables_of_other_types_are_an_importers_bug(column: pa.Array, armillary_home: Path) -> None:
    with pytest.raises(ValueError, match="column x"):
        write_encoded("bug", tables={"t": pa.table({"x": column})})
    assert list((armillary_home / "datasets").iterdir()) == []


def test_row_groups_are_read_at_random(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "GROUP_ROWS", 4)
    dataset = write_encoded("set", 25, shard_rows=10)
    assert [shard.group_rows for shard in dataset.shards] == [(4, 4, 2), (4, 4, 2), (4, 1)]
    places = [(shard, group) for shard, entry in enumerate(dataset.shards) for group in range(len(entry.group_rows))]
    rows = {place: dataset.read_group(*place) for place in reversed(places)}
    assert np.concatenate([rows[place].index for place in places]).tolist() == list(range(25))
    np.testing.assert_array_equal(rows[1, 1].images[2], picture(16))
    assert dataset.read_shard(2).index.tolist() == [20, 21, 22, 23, 24]
    assert dataset.read_arrow(0, 1, ["label"]).column_names == ["label"]
    assert dataset.column("q").tolist() == [float(np.float32(at / 3)) for at in range(25)]
    for place in ((3, 0), (0, 3)):
        with pytest.raises(IndexError):
            dataset.read_group(*place)


def test_groups_are_bounded_in_bytes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "GROUP_BYTES", 3 * len(encoded(0).data))
    dataset = write_encoded("set", 12)
    assert len(dataset.shards[0].group_rows) >= 3


def test_threads_share_a_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "GROUP_ROWS", 4)
    dataset = open_dataset(write_encoded("set", 40, shard_rows=12).name)
    places = [(shard, group) for shard, entry in enumerate(dataset.shards) for group in range(len(entry.group_rows))]
    barrier = threading.Barrier(4)

    def read(_: int) -> list[int]:
        barrier.wait()
        return [int(at) for place in places for at in dataset.read_group(*place).index]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read, range(4))) == [list(range(40))] * 4


def test_datasets_of_version_1_are_read() -> None:
    # What the first release wrote: one row group a shard, and none of the new keys.
    rows = [Record(picture(at), 0) for at in range(3)]
    dataset = write_dataset("old", rows, class_names=["a"])
    path = Path(dataset.location) / "manifest.json"
    manifest = json.loads(path.read_text())
    for key in ("form", "tables"):
        del manifest[key]
    for shard in manifest["shards"]:
        del shard["groups"]
    path.write_text(json.dumps(manifest | {"schema_version": 1}))
    old = open_dataset("old")
    assert old.fingerprint == dataset.fingerprint
    assert old.shards[0].group_rows == (3,)
    old.verify()


@pytest.mark.parametrize("change", [{"groups": [1, 1]}, {"groups": [3, 0]}, {"groups": [4, -1]}])
def test_row_groups_that_lie_are_refused(change: dict[str, object]) -> None:
    dataset = write_dataset("set", [Record(picture(at), 0) for at in range(3)], class_names=["a"])
    path = Path(dataset.location) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][0] |= change
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="broken manifest"):
        open_dataset("set")


def test_s3_holds_the_same_dataset(bucket: str) -> None:
    here = write_encoded("here", tables={"pairs": pairs()})
    there = write_encoded(f"{bucket}/deep/there", tables={"pairs": pairs()})
    assert there.fingerprint == here.fingerprint == open_dataset(f"{bucket}/deep/there").fingerprint
    there.verify()
    assert there.table("pairs").equals(pairs())
    with pytest.raises(UserError, match="exists already"):
        write_encoded(f"{bucket}/deep/there")

    def broken() -> Iterator[Record]:
        for at in range(9):
            yield Record(picture(at), 0)
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError):
        write_dataset(f"{bucket}/half", broken(), class_names=["a"], shard_rows=2)
    assert (
        there._filesystem.get_file_info(f"{there._root.split('/')[0]}/half/shard-00000.parquet").type.name == "NotFound"
    )
