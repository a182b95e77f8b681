"""Embedding files: what is read, and what strangers' files are told."""

import io
import os
import pickle
import zipfile
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from armillary.evaluation.files import read_embeddings
from armillary.spec.errors import UserError

POINTS = np.arange(12, dtype=np.float32).reshape(4, 3)


def write_parquet(path: Any, embeddings: Any, labels: Any, **columns: Any) -> Any:
    pq.write_table(pa.table({"embeddings": embeddings, "labels": labels, **columns}), path)
    return path


@pytest.mark.parametrize("labels", [np.array([0, 0, 5, 5]), np.array(["ann", "ann", "bo", "bo"])])
def test_npz_round_trip(tmp_path: Any, labels: Any) -> None:
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", embeddings=POINTS, labels=labels, extra=np.zeros(3))
        embeddings, found = read_embeddings(tmp_path / "a.npz")
        np.testing.assert_array_equal(embeddings, POINTS)
        assert embeddings.dtype == POINTS.dtype
        assert found.tolist() == labels.tolist()


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.float32()), pa.list_(pa.float64(), 3), pa.large_list(pa.float32()), pa.list_(pa.int8())]
)
def test_parquet_round_trip(tmp_path: Any, kind: Any) -> None:
    column = pa.array(POINTS.astype(int if kind.value_type == pa.int8() else float).tolist(), type=kind)
    for labels in (pa.array([0, 0, 5, 5]), pa.array(["a", "a", "b", "b"]), pa.array(list("aabb")).dictionary_encode()):
        embeddings, found = read_embeddings(write_parquet(tmp_path / "a.parquet", column, labels))
        np.testing.assert_array_equal(embeddings, POINTS)
        assert found.tolist() == labels.to_pylist()


def test_parquet_in_several_row_groups(tmp_path: Any) -> None:
    table = pa.table({"embeddings": POINTS.tolist(), "labels": [0, 0, 1, 1]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    embeddings, labels = read_embeddings(tmp_path / "a.parquet")
    np.testing.assert_array_equal(embeddings, POINTS)
    assert labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"embedding": POINTS, "labels": [0, 0, 1, 1]}, "rename 'embedding' to 'embeddings'"),
        ({"embeddings": POINTS}, "no 'labels'"),
        ({"embeddings": POINTS[0], "labels": [0, 0, 1]}, "shape"),
        ({"embeddings": np.zeros((0, 3)), "labels": []}, "shape"),
        ({"embeddings": POINTS, "labels": [0, 0, 1]}, "one an embedding"),
        ({"embeddings": POINTS, "labels": [0.0, 0.0, 1.0, 1.0]}, "cast them to int64"),
        ({"embeddings": POINTS.astype(str), "labels": [0, 0, 1, 1]}, "real numbers"),
        ({"embeddings": np.where(POINTS == 7, np.nan, POINTS), "labels": [0, 0, 1, 1]}, "1 of 4 rows .* row 2"),
    ],
)
def test_wrong_arrays_are_named(tmp_path: Any, arrays: Any, words: Any) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, **arrays)
    with pytest.raises(UserError) as caught:
        read_embeddings(path)
    assert str(path) in str(caught.value)
    caught.match(f"(?s){words}")


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["BOMB"],)


def test_object_arrays_are_refused_and_never_unpickled(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    path = tmp_path / "a.npz"
    np.savez(path, embeddings=POINTS, labels=np.array([Bomb()] * 4, dtype=object))
    with pytest.raises(UserError, match="Python objects"):
        read_embeddings(path)
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="not a readable"):
        read_embeddings(tmp_path / "b.npz")
    assert not (tmp_path / "exploded").exists()


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def write_zip(path: Any, embeddings: bytes, labels: bytes) -> Any:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("embeddings.npy", embeddings)
        archive.writestr("labels.npy", labels)
    return path


def test_a_header_that_claims_more_than_there_is_costs_no_memory(tmp_path: Any) -> None:
    honest = npy(POINTS)
    lying = honest.replace(b"'shape': (4, 3), ", b"'shape': (9999999999, 9999), ")
    lying = lying[:8] + (len(lying) - len(POINTS.tobytes()) - 10).to_bytes(2, "little") + lying[10:]
    path = write_zip(tmp_path / "a.npz", lying, npy(np.zeros(4, int)))
    with pytest.raises(UserError, match="claims"):
        read_embeddings(path)


def test_a_file_larger_than_memory_is_refused_before_it_is_read(tmp_path: Any, monkeypatch: Any) -> None:
    import psutil

    class Tiny:
        available = 10

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Tiny)
    np.savez(tmp_path / "a.npz", embeddings=POINTS, labels=[0, 0, 1, 1])
    write_parquet(tmp_path / "a.parquet", POINTS.tolist(), [0, 0, 1, 1])
    for name in ("a.npz", "a.parquet"):
        with pytest.raises(UserError, match="memory available"):
            read_embeddings(tmp_path / name)


@pytest.mark.parametrize("ending", ["npz", "parquet"])
def test_every_truncation_is_a_clear_error(tmp_path: Any, ending: Any) -> None:
    whole = tmp_path / f"whole.{ending}"
    if ending == "npz":
        np.savez_compressed(whole, embeddings=POINTS, labels=[0, 0, 1, 1])
    else:
        write_parquet(whole, POINTS.tolist(), [0, 0, 1, 1])
    content = whole.read_bytes()
    for length in range(0, len(content), 7):
        path = tmp_path / f"cut.{ending}"
        path.write_bytes(content[:length])
        with pytest.raises(UserError):
            read_embeddings(path)


@pytest.mark.parametrize("ending", ["npz", "parquet"])
def test_damage_is_read_rightly_or_refused(tmp_path: Any, ending: Any) -> None:
    path = tmp_path / f"a.{ending}"
    if ending == "npz":
        np.savez_compressed(path, embeddings=POINTS, labels=[0, 0, 1, 1])
    else:
        write_parquet(path, POINTS.tolist(), [0, 0, 1, 1])
    content, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(150):
        damaged = bytearray(content)
        damaged[rng.integers(len(content))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            read_embeddings(path)
        except UserError:
            refused += 1
    assert refused > 20


@pytest.mark.parametrize(
    ("embeddings", "labels", "words"),
    [
        ([[1.0, 2.0], [1.0]], [0, 1], "differ in width"),
        ([[1.0, 2.0], None], [0, 1], "1 rows are empty"),
        ([[1.0, None], [1.0, 2.0]], [0, 1], "1 values are empty"),
        ([[1.0, 2.0], [1.0, 2.0]], [0, None], "1 rows are empty"),
        ([[1.0, 2.0], [1.0, 2.0]], [0.5, 1.0], "integers or strings"),
        ([1.0, 2.0], [0, 1], "number lists"),
        ([["a"], ["b"]], [0, 1], "number lists"),
        ([[], []], [0, 1], "shape"),
        ([[1.0, 2.0], [1.0, float("inf")]], [0, 1], "row 1"),
    ],
)
def test_wrong_parquet_columns_are_named(tmp_path: Any, embeddings: Any, labels: Any, words: Any) -> None:
    column = pa.array(embeddings, type=pa.list_(pa.float32())) if embeddings == [[], []] else pa.array(embeddings)
    with pytest.raises(UserError, match=words):
        read_embeddings(write_parquet(tmp_path / "a.parquet", column, labels))


def test_what_is_no_file_of_ours(tmp_path: Any) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_embeddings(tmp_path / "none.npz")
    with pytest.raises(UserError, match="is not a file"):
        read_embeddings(tmp_path)
    (tmp_path / "a.csv").write_text("1,2")
    with pytest.raises(UserError, match=r"'\.csv'"):
        read_embeddings(tmp_path / "a.csv")
