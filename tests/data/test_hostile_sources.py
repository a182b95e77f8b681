"""Sources made to do harm: each is refused with a clear message, or its images are quarantined; nothing is left."""

from __future__ import annotations

import gzip
import importlib.util
import io
import os
import pickle
import struct
import sys
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from armillary.data.importers import import_dataset
from armillary.spec.errors import UserError


def _archives() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hostile_archives", Path(__file__).with_name("archives.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["hostile_archives"] = module
    spec.loader.exec_module(module)
    return module


archives = _archives()


def refused(kind: str, source: Path, match: str, options: dict[str, Any] | None = None) -> UserError:
    """The import fails with that message, in little memory, and leaves nothing in the store."""
    store = Path(os.environ["ARMILLARY_HOME"]) / "datasets"
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=match) as error:
            import_dataset(kind, "out", source, options=options)
        assert tracemalloc.get_traced_memory()[1] < 150e6
    finally:
        tracemalloc.stop()
    assert not store.exists() or list(store.iterdir()) == []
    assert len(str(error.value)) < 1500
    return error.value


# Pickles


class Harm:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("function", [os.system, eval, exec, open, getattr, __import__])
def test_pickles_with_code_are_refused_unrun(function: Callable[..., Any], protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "lfw.bin"
    target = tmp_path / "ran"
    arguments = {os.system: f"touch {target}", open: (str(target), "w")}.get(function, f"open({str(target)!r}, 'w')")
    harm = Harm(function, *(arguments if isinstance(arguments, tuple) else (arguments,)))
    path.write_bytes(pickle.dumps(([harm], [True]), protocol=protocol))
    refused("bin", path, "which such files do not need")
    assert not target.exists()


def _bin(body: bytes) -> bytes:
    return b"\x80\x04" + body + b"."


@pytest.mark.parametrize(
    ("content", "match"),
    [
        # BUILD would set attributes of our own functions.
        (_bin(b"c_codecs\nencode\n}(\x8c\x0c__defaults__Nub"), "do not need"),
        (_bin(b"cnumpy\nndarray\n}(\x8c\x01aK\x01ub"), "do not need"),
        # Lengths that nothing has.
        (_bin(b"B\xff\xff\xff\xff"), "byte string of 4,294,967,295 bytes"),
        (_bin(b"\x8e" + struct.pack("<Q", 2**62)), "byte string of"),
        (_bin(b"X\xff\xff\xff\xff"), "a text of"),
        (_bin(b"\x96" + struct.pack("<Q", 2**62)), "byte string of"),
        # Bytes that a call makes out of a number.
        (_bin(b"cbuiltins\nbytes\nJ\x00\x00\x00\x70\x85R"), "bytes made by a call"),
        # Other ways to name globals and to call.
        (_bin(b"\x8c\x02os\x8c\x06system\x93"), "os.system, which"),
        (_bin(b"(S'true'\nios\nsystem\n"), "do not need"),
        (_bin(b"Ptext\n"), "do not need"),
        (_bin(b"\x82\x01"), "do not need"),
        # Not what such a file holds.
        (_bin(b"}"), "holds dict"),
        (_bin(b"]]\x86"), "no images"),
        (_bin(b"](K\x01K\x02e](\x88e\x86"), "images must be"),
        (_bin(b"](C\x01aC\x01be](K\x07e\x86"), "answers must be"),
        (_bin(b"](C\x01ae](\x88e\x86"), "1 images and 1 answers"),
        (b"", "no pickle"),
        (b"not a pickle", "no pickle"),
    ],
)
def test_pickles_that_are_no_lists_of_images_are_refused(content: bytes, match: str, tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    refused("bin", tmp_path / "x.bin", match)
    assert pickle.loads(pickle.dumps(b"a", protocol=2)) == b"a"


def test_arrays_of_objects_in_a_pickle_are_refused(tmp_path: Path) -> None:
    images = np.array([b"a", b"b"], dtype=object)
    (tmp_path / "x.bin").write_bytes(pickle.dumps((images, [True])))
    refused("bin", tmp_path / "x.bin", "single bytes")


# Names that lead elsewhere


OUTSIDE = ["../secret.png", "/etc/secret.png", "a/../../secret.png", "..\\secret.png", "C:\\secret.png", "a\0.png"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_tar_members_that_lead_out_are_refused(name: str, tmp_path: Path) -> None:
    if "\0" in name:
        pytest.skip("a tar cannot hold such a name")
    path = archives.tar_of(tmp_path / "x.tar", [("0.png", archives.png(0)), (name, archives.png(1))])
    refused("webdataset", path, "leaves the source")


def test_tar_links_and_devices_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(archives.png(9))
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for number, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)):
            link = tarfile.TarInfo(f"{number}.png")
            link.type, link.linkname = kind, str(tmp_path / "secret.png")
            tar.addfile(link)
        info = tarfile.TarInfo("real.png")
        info.size = len(archives.png(0))
        tar.addfile(info, io.BytesIO(archives.png(0)))
    assert len(import_dataset("webdataset", "out", path)) == 1


@pytest.mark.parametrize("name", OUTSIDE)
def test_csv_paths_that_lead_out_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(archives.png(0))
    source = tmp_path / "in"
    rows = [("image", "caption"), (name, "text")]
    refused("captions-csv", archives.write_csv(source / "a.csv", rows), "leaves the source")
    pairs = [("first", "second", "same"), (name, name, 1)]
    refused("pairs-csv", archives.write_csv(source / "b.csv", pairs), "leaves the source")


@pytest.mark.parametrize("name", [name for name in OUTSIDE if " " not in name])
def test_ijb_lists_that_lead_out_are_refused(name: str, tmp_path: Path) -> None:
    made = archives.ijb(tmp_path)
    (made.source / "meta" / "ijbb_face_tid_mid.txt").write_text(f"{name} 10 100\n")
    refused("ijb", made.source, "leaves the source")
    refused("ijb", made.source, "leaves the source", {"images": "../elsewhere"})


@pytest.mark.parametrize("person", ["../ann", "/etc/ann", ".."])
def test_lfw_pairs_that_lead_out_name_no_image(person: str, tmp_path: Path) -> None:
    made = archives.lfw(tmp_path)
    (made.source / "pairs.txt").write_text(f"1\n{person}\t1\t2\nann\t1\tbob\t1\n")
    refused("lfw", made.source, "there is no image")
    refused("lfw", made.source, "leaves the source", {"pairs": "../pairs.txt"})


@pytest.mark.parametrize("what", ["file", "folder"])
def test_symbolic_links_that_lead_out_are_refused(what: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "s.png").write_bytes(archives.png(9))
    made = archives.folder(tmp_path)
    link = made.source / ("ann/link.png" if what == "file" else "zed")
    link.symlink_to(secret / "s.png" if what == "file" else secret)
    refused("folder", made.source, "leads out of the source")
    rows = [("image", "caption"), ("ann/link.png" if what == "file" else "zed/s.png", "text")]
    refused("captions-csv", archives.write_csv(made.source / "a.csv", rows), "leads out of the source")


def test_symbolic_links_inside_are_followed(tmp_path: Path) -> None:
    made = archives.folder(tmp_path)
    (made.source / "ann" / "again.png").symlink_to(made.source / "bob" / "3.png")
    assert len(import_dataset("folder", "out", made.source)) == 10


# Bombs and lengths that lie


def png_bomb(side: int = 30_000) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">2I5B", side, side, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")
    )


def test_image_bombs_are_quarantined_in_every_kind(tmp_path: Path) -> None:
    made = archives.folder(tmp_path)
    (made.source / "ann" / "bomb.png").write_bytes(png_bomb())
    tar = archives.tar_of(tmp_path / "x.tar", [("0.png", archives.png(0)), ("1.png", png_bomb())])
    pq.write_table(pa.table({"image": [archives.png(0), png_bomb(), None]}), tmp_path / "x.parquet")
    (tmp_path / "x.bin").write_bytes(pickle.dumps(([archives.png(0), png_bomb()], [True])))
    sources = {"folder": made.source, "webdataset": tar, "parquet": tmp_path / "x.parquet", "bin": tmp_path / "x.bin"}
    for kind, source in sources.items():
        tracemalloc.start()
        dataset = import_dataset(kind, kind, source)
        assert tracemalloc.get_traced_memory()[1] < 50e6
        tracemalloc.stop()
        # Pillow's own limit comes first.
        assert "900000000 pixels" in dataset.quarantine()[0].reason
    assert import_dataset("bin", "again", tmp_path / "x.bin").table("pairs").num_rows == 0


def _zeros_gz(path: Path, head: bytes, megabytes: int) -> None:
    with gzip.open(path, "wb", compresslevel=9) as file:
        file.write(head)
        for _ in range(megabytes):
            file.write(bytes(10**6))


def test_gzip_bombs_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "mnist"
    source.mkdir()
    head = b"\0\0\x08\x03" + struct.pack(">3I", 1000, 1000, 300)
    _zeros_gz(source / "train-images-idx3-ubyte.gz", head, 300)
    (source / "train-labels-idx1-ubyte").write_bytes(archives.idx_bytes(np.zeros(1000, np.uint8)))
    refused("idx", source, "decompression bomb")
    info = tarfile.TarInfo("0.bin")
    info.size = 300 * 10**6
    _zeros_gz(tmp_path / "x.tar.gz", info.tobuf(), 300)
    refused("webdataset", tmp_path / "x.tar.gz", "decompression bomb")


def test_zip_bombs_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    archive = zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9)
    with archive, archive.open("images.npy", "w", force_zip64=True) as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (300, 1000, 1000)}
        np.lib.format.write_array_header_1_0(file, header)
        for _ in range(300):
            file.write(bytes(10**6))
    refused("npz", path, "decompression bomb")


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ((2**32 - 1, 28, 28), "cannot be"),
        ((3, 2**31, 2**31), "cannot be"),
        ((3, 0, 28), "cannot be"),
        ((10**8, 28, 28), "labels"),
    ],
)
def test_idx_headers_that_lie_are_refused(shape: tuple[int, ...], match: str, tmp_path: Path) -> None:
    content = b"\0\0\x08\x03" + struct.pack(">3I", *shape) + bytes(3 * 28 * 28)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(archives.idx_bytes(np.zeros(3, np.uint8)))
    refused("idx", tmp_path, match)


@pytest.mark.parametrize("head", [b"\0\0\x0d\x03", b"\0\0\x08\xff", b"\1\0\x08\x03", b"PK\3\4"])
def test_what_is_no_idx_is_refused(head: bytes, tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(head + struct.pack(">3I", 3, 2, 2) + bytes(12))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(archives.idx_bytes(np.zeros(3, np.uint8)))
    refused("idx", tmp_path, "no IDX file")


IR = struct.pack("<IfQQ", 0, 1, 0, 0)


@pytest.mark.parametrize(
    ("content", "index", "match"),
    [
        (archives.MAGIC + struct.pack("<I", 2**29 - 1) + IR, "0\t0", "536,870,911 bytes"),
        (archives.MAGIC + struct.pack("<I", 1000) + IR, "0\t0", "has no end"),
        (archives.record(IR + b"x"), "0\t4", "no record starts"),
        (archives.record(IR + b"x"), "0\t999999", "outside the"),
        (archives.record(IR + b"x"), "0\t-8", "outside the"),
        (archives.record(IR + b"x"), "zero\t0", "not `key offset`"),
        (archives.record(IR + b"x"), "0 0 0", "not `key offset`"),
        (archives.record(IR + b"x"), "", "is empty"),
        (archives.record(b"short"), "0\t0", "has no header"),
        (archives.record(struct.pack("<IfQQ", 2**31, 0, 0, 0)), "0\t0", "2147483648 labels"),
        (archives.record(struct.pack("<IfQQ", 0, float("nan"), 0, 0)), "0\t0", "label nan"),
        (archives.record(struct.pack("<IfQQ", 0, 1e30, 0, 0)), "0\t0", "label 1"),
        (archives.record(struct.pack("<IfQQ", 0, 0.5, 0, 0)), "0\t0", "label 0.5"),
        (archives.record(struct.pack("<IfQQ2f", 2, 0, 0, 0, 1e9, 2e9)), "0\t0", "promises 999999999 images"),
        (archives.record(struct.pack("<IfQQ2f", 2, 0, 0, 0, float("inf"), 2)), "0\t0", "label inf"),
        (archives.record(struct.pack("<IfQQ2f", 2, 0, 0, 0, 1, 1e9)), "0\t0", "people in 0 images"),
        (archives.MAGIC + struct.pack("<I", 2 << 29 | 24) + IR, "0\t0", "a part 2"),
        (archives.MAGIC + struct.pack("<I", 1 << 29 | 24) + IR, "0\t0", "cut off"),
        (archives.record(IR + b"x") * 2, "0\t0", "does not reach the end"),
    ],
)
def test_records_that_lie_are_refused(content: bytes, index: str, match: str, tmp_path: Path) -> None:
    (tmp_path / "x.rec").write_bytes(content)
    (tmp_path / "x.idx").write_text(index)
    refused("recordio", tmp_path, match)


def test_tar_sizes_that_lie_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    for name, size, match in [
        ("0.png", 10**12, "cut off"),
        ("0.cls", 10**12, "up to 1,048,576"),
        ("0.png", 10**5, "cut off"),
    ]:
        info = tarfile.TarInfo(name)
        info.size = size
        path.write_bytes(info.tobuf() + bytes(2048))
        refused("webdataset", path, match)
    # A header of attributes that is larger than any could be.
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, 10**12
    path.write_bytes(info.tobuf() + bytes(4096))
    refused("webdataset", path, "cannot be|cut off")
    # Damage in the middle, which the library takes for the end.
    archives.tar_of(path, [("0.png", archives.png(0)), ("1.png", archives.png(1))])
    content = bytearray(path.read_bytes())
    content[512 + 512 * -(-len(archives.png(0)) // 512) + 100] ^= 1
    path.write_bytes(content)
    refused("webdataset", path, "end mark")


def test_too_many_shards_in_braces_are_refused(tmp_path: Path) -> None:
    refused("webdataset", tmp_path / "x-{0..999999999}.tar", "1,000,000,000 files")
    refused("webdataset", tmp_path / "x-{5..2}.tar", "files")


def _npy(descr: str, shape: str, extra: bytes = b"", order: str = "False") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + extra


@pytest.mark.parametrize(
    ("npy", "match"),
    [
        (_npy("'|O'", "(2,)", pickle.dumps([1, 2])), "Python objects"),
        (_npy("[('a', '|O')]", "(2, 4, 4)"), "Python objects"),
        (_npy("'|u1'", "(1000000000000, 28, 28)"), "cut off"),
        (_npy("'|u1'", "(9000000000000000000, 28, 28)"), "cannot be"),
        (_npy("'|u1'", "(-1, 28, 28)"), "cannot be"),
        (_npy("'|u1'", "(2, 100000, 3)"), "images of 100000"),
        (_npy("'|u1'", "(2, 4, 4)", bytes(31)), "cut off"),
        (_npy("'|u1'", "(2, 4, 4)", bytes(32), order="True"), "Fortran"),
        (_npy("'<i8'", "(2, 4, 4)", bytes(256)), "int64 of shape"),
        (_npy("'<f4'", "(1, 1, 1)", struct.pack("<f", 1.5)), "outside"),
        (_npy("'<f4'", "(1, 1, 1)", struct.pack("<f", float("nan"))), "outside"),
        (_npy("'|u1'", "(0, 4, 4)"), "of shape"),
        (_npy("__import__('os').system('true')", "(2,)"), "no NumPy array"),
        (b"\x93NUMPY\x09\0", "version|magic|no NumPy array"),
        (b"", "no NumPy array"),
    ],
)
def test_npz_arrays_that_lie_are_refused(npy: bytes, match: str, tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", npy)
    refused("npz", path, match)


def test_npz_labels_of_objects_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, images=np.zeros((2, 4, 4), np.uint8), labels=np.array([{}, []], dtype=object))
    refused("npz", path, "Python objects")


def test_parquet_without_what_it_needs_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"img": [b"x"], "label": [1.5]}), path)
    assert "did you mean 'img'" in str(refused("parquet", path, "unknown column 'image'"))
    refused("parquet", path, "labels of type", {"image_column": "img"})
    refused("parquet", path, "second column 'label'", {"image_column": "img", "columns": ("label",)})
    pq.write_table(pa.table({"image": [b"x"], "label": pa.array([None], pa.int64())}), path)
    refused("parquet", path, "empty ones")
    path.write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    refused("parquet", path, "no Parquet file")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "x.csv is empty"),
        ("first,second\na.png,b.png\n", "unknown column 'same'"),
        ("first,second,same\na.png,b.png\n", "cells"),
        ("first,second,same\na.png,b.png,1,2\n", "cells"),
        ("first,second,same\na.png,b.png,perhaps\n", "same is 'perhaps'"),
        ("first,second,same,fold\na.png,b.png,1,-1\n", "fold is '-1'"),
        ("first,second,same\n", "names no images"),
        ('first,second,same\n"a.png,b.png,1\n', "no CSV|cells"),
        ("first,second,same\n" + "a" * 200_000 + ",b.png,1\n", "no CSV|without an end"),
        ("first,second,same\n" + "a" * 3_000_000, "a line of more than"),
    ],
)
def test_csv_files_that_are_none_are_refused(text: str, match: str, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(text)
    refused("pairs-csv", tmp_path / "x.csv", match)
    (tmp_path / "y.csv").write_bytes(b"first,second,same\n\xff\xfe,b,1\n")
    refused("pairs-csv", tmp_path / "y.csv", "not UTF-8")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "starts with ''"),
        ("ten 300\n", "starts with"),
        ("10 300 5\n", "starts with"),
        ("1\nann\t1\t2\n", "1 pairs of one person and 0 of two"),
        ("1\nann\t1\t2\nann\t1\n", "is no pair"),
        ("1\nann\t1\t9\nann\t1\tbob\t1\n", "there is no image '9' of 'ann'"),
    ],
)
def test_lfw_lists_that_do_not_fit_are_refused(text: str, match: str, tmp_path: Path) -> None:
    made = archives.lfw(tmp_path)
    (made.source / "pairs.txt").write_text(text)
    refused("lfw", made.source, match)


@pytest.mark.parametrize(
    ("file", "text", "match"),
    [
        ("ijbb_face_tid_mid.txt", "", "is empty"),
        ("ijbb_face_tid_mid.txt", "1.png 10\n", "1.png 10"),
        ("ijbb_face_tid_mid.txt", "1.png ten 100\n", "not whole numbers"),
        ("ijbb_face_tid_mid.txt", f"1.png {10**30} 100\n", "out of range"),
        ("ijbb_template_pair_label.txt", "10 99 1\n", "there is no template 99"),
        ("ijbb_template_pair_label.txt", "10 11 2\n", "10 11 2"),
    ],
)
def test_ijb_lists_that_do_not_fit_are_refused(file: str, text: str, match: str, tmp_path: Path) -> None:
    made = archives.ijb(tmp_path)
    (made.source / "meta" / file).write_text(text)
    refused("ijb", made.source, match)


@pytest.mark.parametrize("kind", ["recordio", "bin", "lfw", "ijb", "webdataset", "parquet", "idx", "pairs-csv", "npz"])
def test_sources_that_are_not_there(kind: str, tmp_path: Path) -> None:
    refused(kind, tmp_path / "absent.x", "there is no .*absent")
    refused("captions-csv", tmp_path, "not a CSV file")


def test_options_are_checked(tmp_path: Path) -> None:
    made = archives.folder(tmp_path)
    error = refused("folder", made.source, "folder has no option --label-key", {"label_key": "x"})
    assert error.allowed == "--form"
    refused("folder", made.source, "--form is 'jpeg'", {"form": "jpeg"})
    with pytest.raises(UserError, match="gives no name"):
        import_dataset("webdataset", None, archives.tar_of(tmp_path / "x y.tar", [("0.png", archives.png(0))]))
