"""Small archives in the formats that the importers read, made byte by byte or by the format's own writer."""

from __future__ import annotations

import csv
import gzip
import io
import json
import pickle
import struct
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

MAGIC = struct.pack("<I", 0xCED7230A)
PEOPLE = ("ann", "bob", "cyd")


def pixels(at: int, height: int = 12, width: int = 10) -> NDArray[np.uint8]:
    """Picture number ``at``: colours that no other has."""
    rng = np.random.default_rng(at)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(at: int) -> bytes:
    with io.BytesIO() as file:
        Image.fromarray(pixels(at)).save(file, "PNG")
        return file.getvalue()


@dataclass(frozen=True)
class Made:
    """An archive, and what must come out of it: picture numbers in order, the class of each, tables, columns."""

    source: Path
    pictures: Sequence[int]
    classes: Sequence[str]
    options: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    columns: dict[str, list[Any]] = field(default_factory=dict)
    form: str = "encoded"


def folder(root: Path) -> Made:
    for at in range(9):
        path = root / "faces" / PEOPLE[at // 3] / f"{at}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(at))
    return Made(root / "faces", range(9), [PEOPLE[at // 3] for at in range(9)])


def record(data: bytes) -> bytes:
    """A RecordIO record as dmlc-core writes it: data is split where an aligned word is the magic word."""
    parts, start = [], 0
    for at in range(0, len(data) - 3, 4):
        if data[at : at + 4] == MAGIC:
            parts.append(data[start:at])
            start = at + 4
    parts.append(data[start:])
    out = b""
    for number, part in enumerate(parts):
        flag = 0 if len(parts) == 1 else 1 if number == 0 else 3 if number == len(parts) - 1 else 2
        out += MAGIC + struct.pack("<I", flag << 29 | len(part)) + part + bytes(-len(part) % 4)
    return out


def write_records(root: Path, records: Sequence[bytes], name: str = "train") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    content, index = b"", ""
    for key, data in enumerate(records):
        index += f"{key}\t{len(content)}\n"
        content += record(data)
    (root / f"{name}.rec").write_bytes(content)
    (root / f"{name}.idx").write_text(index.rstrip("\n"))
    return root


def recordio(root: Path) -> Made:
    # As InsightFace ships it: record 0 tells the keys, images follow, then one record a person.
    records = [struct.pack("<IfQQ2f", 2, 0, 0, 0, 10, 13)]
    for at in range(9):
        # Half have one label in the header, half an array of labels as the aligned faces have.
        one = struct.pack("<IfQQ", 0, at // 3, at + 1, 0)
        several = struct.pack("<IfQQ2f", 2, 0, at + 1, 0, at // 3, 1)
        records.append((one if at % 2 else several) + png(at))
    records += [struct.pack("<IfQQ2f", 2, 0, 0, 0, 1 + 3 * who, 4 + 3 * who) for who in range(3)]
    return Made(write_records(root / "ms1m", records), range(9), [str(at // 3) for at in range(9)])


def recordio_plain(root: Path) -> Made:
    # im2rec's: no header record, any labels; and an image that holds the magic word.
    with io.BytesIO() as file:
        Image.fromarray(pixels(0)).save(file, "BMP")
        bmp = bytearray(file.getvalue())
    bmp += bytes(-len(bmp) % 4) + MAGIC + b"tail" + MAGIC
    records = [struct.pack("<IfQQ", 0, 70, 0, 0) + bytes(bmp)]
    records += [struct.pack("<IfQQ", 0, 7 if at % 2 else 70, at, 0) + png(at) for at in range(1, 6)]
    classes = ["7" if at % 2 else "70" for at in range(6)]
    return Made(write_records(root / "plain", records) / "train.rec", range(6), classes)


def _bin(root: Path, content: Any, protocol: int) -> Made:
    (root / "lfw.bin").write_bytes(pickle.dumps(content, protocol=protocol))
    pairs = [{"first": 2 * at, "second": 2 * at + 1, "same": at % 2 == 0} for at in range(4)]
    return Made(root / "lfw.bin", range(8), ["unlabelled"] * 8, tables={"pairs": pairs})


def face_bin(root: Path) -> Made:
    return _bin(root, ([png(at) for at in range(8)], [True, False, True, False]), 4)


def face_bin_old(root: Path) -> Made:
    return _bin(root, ([png(at) for at in range(8)], [True, False, True, False]), 2)


def face_bin_arrays(root: Path) -> Made:
    images = [np.frombuffer(png(at), np.uint8).copy() for at in range(8)]
    return _bin(root, (images, np.array([True, False, True, False])), 4)


def face_bin_numbers(root: Path) -> Made:
    images = [np.frombuffer(png(at), np.uint8) for at in range(8)]
    return _bin(root, (images, [np.bool_(at % 2 == 0) for at in range(4)]), 5)


def face_bin_python2(root: Path) -> Made:
    # Python 2's pickle of (list of str, list of bool), protocol 2, written opcode by opcode.
    images = b"".join(b"T" + struct.pack("<i", len(png(at))) + png(at) + b"q" + bytes([at]) for at in range(8))
    content = b"\x80\x02](" + images + b"e](" + b"\x88\x89\x88\x89" + b"e\x86q\x14."
    (root / "agedb_30.bin").write_bytes(content)
    pairs = [{"first": 2 * at, "second": 2 * at + 1, "same": at % 2 == 0} for at in range(4)]
    return Made(root / "agedb_30.bin", range(8), ["unlabelled"] * 8, tables={"pairs": pairs})


def _lfw_folder(root: Path) -> Path:
    for at in range(9):
        path = root / "lfw" / PEOPLE[at // 3] / f"{PEOPLE[at // 3]}_{at % 3 + 1:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(at))
    return root / "lfw"


def lfw(root: Path) -> Made:
    source = _lfw_folder(root)
    lines = ["2\t1", "ann\t1\t2", "ann\t1\tbob\t2", "bob\t1\t3", "bob\t1\tcyd\t3"]
    (source / "pairs.txt").write_text("\n".join(lines) + "\n")
    wanted = [(0, 1, True, 0), (0, 4, False, 0), (3, 5, True, 1), (3, 8, False, 1)]
    pairs = [dict(zip(("first", "second", "same", "fold"), pair, strict=True)) for pair in wanted]
    return Made(source, range(9), [PEOPLE[at // 3] for at in range(9)], tables={"pairs": pairs})


def lfw_dev(root: Path) -> Made:
    source = _lfw_folder(root)
    (source / "lists").mkdir()
    (source / "lists" / "pairsDevTest.txt").write_text(
        "2\r\nann\t1\t2\r\ncyd\t1\t3\r\nann\t1\tbob\t2\r\nann\t2\tcyd\t2"
    )
    wanted = [(0, 1, True, 0), (6, 8, True, 0), (0, 4, False, 0), (1, 7, False, 0)]
    pairs = [dict(zip(("first", "second", "same", "fold"), pair, strict=True)) for pair in wanted]
    # A folder of lists is a class without images.
    made = Made(source, range(9), [PEOPLE[at // 3] for at in range(9)], tables={"pairs": pairs})
    return Made(made.source, made.pictures, made.classes, {"pairs": "lists/pairsDevTest.txt"}, made.tables)


def ijb(root: Path) -> Made:
    source = root / "IJBB"
    (source / "loose_crop").mkdir(parents=True)
    (source / "meta").mkdir()
    for at in range(6):
        (source / "loose_crop" / f"{at + 1}.png").write_bytes(png(at))
    lines = [(1, 10, 100), (2, 10, 100), (3, 10, 101), (4, 11, 102), (5, 12, 103), (6, 12, 104), (1, 12, 100)]
    text = "".join(f"{image}.png {template} {media}\n" for image, template, media in lines)
    (source / "meta" / "ijbb_face_tid_mid.txt").write_text(text)
    (source / "meta" / "ijbb_template_pair_label.txt").write_text("10 11 1\n11 12 0\n")
    templates = [{"row": image - 1, "template": template, "media": media} for image, template, media in lines]
    matches = [{"first": 10, "second": 11, "same": True}, {"first": 11, "second": 12, "same": False}]
    classes = ["10", "10", "10", "11", "12", "12"]
    return Made(source, range(6), classes, tables={"templates": templates, "matches": matches})


def tar_of(path: Path, members: Sequence[tuple[str, bytes]], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def webdataset(root: Path) -> Made:
    for shard in range(2):
        members = []
        for at in range(4 * shard, 4 * shard + 4):
            members += [(f"set/{at:04d}.png", png(at)), (f"set/{at:04d}.cls", f"{at // 3}\n".encode())]
            members += [(f"set/{at:04d}.txt", f"picture {at}".encode())]
        tar_of(root / "wds" / f"train-{shard:03d}.tar", members)
    captions: dict[str, list[Any]] = {"caption": [f"picture {at}" for at in range(8)]}
    classes = [str(at // 3) for at in range(8)]
    return Made(root / "wds" / "train-{000..001}.tar", range(8), classes, columns=captions)


def webdataset_json(root: Path) -> Made:
    members = []
    long = "a" * 150
    for at in range(6):
        meta = json.dumps({"who": PEOPLE[at // 2], "more": [1, 2]}).encode()
        members += [(f"./{long}/{at}.json", meta), (f"./{long}/{at}.PNG", png(at))]
    path = tar_of(root / "wds" / "one.tar.gz", members, "w:gz")
    return Made(path, range(6), [PEOPLE[at // 2] for at in range(6)], {"label_key": "who"})


def parquet(root: Path) -> Made:
    images = [{"bytes": png(at), "path": f"{at}.png"} for at in range(8)]
    labels = [PEOPLE[at // 3] for at in range(8)]
    table = pa.table({"image": images, "label": labels, "age": list(range(20, 28)), "note": ["n"] * 8})
    pq.write_table(table, root / "hub.parquet", row_group_size=3)
    columns: dict[str, list[Any]] = {"years": list(range(20, 28)), "note": ["n"] * 8}
    return Made(root / "hub.parquet", range(8), labels, {"columns": ("age=years", "note")}, columns=columns)


def parquet_folder(root: Path) -> Made:
    (root / "parts").mkdir()
    for part in range(2):
        numbers = range(4 * part, 4 * part + 4)
        table = pa.table({"jpg": [png(at) for at in numbers], "id": pa.array([5 - part] * 4, pa.int32())})
        pq.write_table(table, root / "parts" / f"{part}.parquet")
    options = {"image_column": "jpg", "label_column": "id"}
    return Made(root / "parts", range(8), ["5"] * 4 + ["4"] * 4, options)


def parquet_lists(root: Path) -> Made:
    kind = pa.list_(pa.list_(pa.list_(pa.uint8())))
    table = pa.table({"image": pa.array([pixels(at).tolist() for at in range(4)], kind)})
    pq.write_table(table, root / "lists.parquet")
    return Made(root / "lists.parquet", range(4), ["unlabelled"] * 4, {"form": "pixels"}, form="pixels")


def idx_bytes(array: NDArray[np.uint8]) -> bytes:
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def idx(root: Path) -> Made:
    source = root / "mnist"
    source.mkdir()
    for part, numbers in (("train", range(6)), ("t10k", range(6, 9))):
        images = idx_bytes(np.stack([pixels(at) for at in numbers]))
        labels = idx_bytes(np.array([at // 3 for at in numbers], np.uint8))
        (source / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (source / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    parts = {"part": ["train"] * 6 + ["t10k"] * 3}
    return Made(source, range(9), [str(at // 3) for at in range(9)], columns=parts, form="pixels")


def write_csv(path: Path, rows: Sequence[Sequence[object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def pairs_csv(root: Path) -> Made:
    source = folder(root).source
    rows = [("a", "b", "same", "fold"), ("ann/0.png", "ann/1.png", 1, 0), ("ann/0.png", "bob/3.png", "False", 0)]
    rows += [("cyd/8.png", "ann/1.png", "no", 1), ("cyd/8.png", "cyd/7.png", "same", 1)]
    path = write_csv(root / "pairs.csv", rows)
    wanted = [(0, 1, True, 0), (0, 2, False, 0), (3, 1, False, 1), (3, 4, True, 1)]
    pairs = [dict(zip(("first", "second", "same", "fold"), pair, strict=True)) for pair in wanted]
    options = {"images": source.name, "first_column": "a", "second_column": "b"}
    return Made(path, (0, 1, 3, 8, 7), ["ann", "ann", "bob", "cyd", "cyd"], options, tables={"pairs": pairs})


def captions_csv(root: Path) -> Made:
    source = folder(root).source
    texts = ['one, "quoted"', "zwei\nZeilen", "trois ê"]
    rows: list[Sequence[object]] = [("image", "caption")]
    rows += [(f"{PEOPLE[at]}/{4 * at}.png", text) for at, text in enumerate(texts)]
    path = write_csv(source / "captions.csv", rows)
    return Made(path, (0, 4, 8), ["unlabelled"] * 3, columns={"caption": texts})


def npz(root: Path) -> Made:
    images = np.stack([pixels(at) for at in range(7)])
    labels = np.array([PEOPLE[at // 3] for at in range(7)])
    np.savez_compressed(
        root / "set.npz", images=images, labels=labels, quality=np.linspace(0, 1, 7), left=labels == "ann"
    )
    columns: dict[str, list[Any]] = {
        "q": np.linspace(0, 1, 7, dtype=np.float32).tolist(),
        "left": (labels == "ann").tolist(),
    }
    options = {"columns": ("quality=q", "left")}
    return Made(root / "set.npz", range(7), labels.tolist(), options, columns=columns, form="pixels")


def npz_floats(root: Path) -> Made:
    images = np.stack([pixels(at) for at in range(5)]).transpose(0, 3, 1, 2).astype(np.float32) / 255
    np.savez(root / "floats.npz", x=images, y=np.array([3, 3, -1, 3, 3]))
    classes = ["3", "3", "-1", "3", "3"]
    return Made(root / "floats.npz", range(5), classes, {"images_key": "x", "labels_key": "y"}, form="pixels")


# The number of a picture that says nothing.
BLANK = -1


def edges_tsv(root: Path) -> Made:
    """MovieLens' u.data: user, item, rating, time, numbers that are no positions."""
    lines = [
        "% who chose what",
        "10\t7\t5\t881250949",
        "2\t30\t3\t891717742",
        "",
        "10\t30\t1\t878887116",
        "2\t30\t3\t1",
    ]
    path = root / "u.data"
    path.write_text("\n".join(lines) + "\n")
    return Made(path, [BLANK] * 4, ["10", "2", "10", "2"], columns={"item": [0, 1, 1, 1]}, form="pixels")


def edges_csv(root: Path) -> Made:
    """With a line that names columns, and Windows' line ends."""
    path = root / "ratings.txt"
    path.write_bytes(b'userId,movieId,rating\r\n1,"31",2.5\r\n1,1029,3.0\r\n')
    return Made(path, [BLANK] * 2, ["1", "1"], columns={"item": [0, 1]}, form="pixels")


def edges_of_names(root: Path) -> Made:
    path = root / "edges.txt"
    path.write_text("bob  tea\nann coffee 3\nbob coffee\n")
    return Made(path, [BLANK] * 3, ["bob", "ann", "bob"], columns={"item": [1, 0, 0]}, form="pixels")


# Every writer under the kind that reads it.
FORMATS: dict[str, tuple[str, Callable[[Path], Made]]] = {
    "folder": ("folder", folder),
    "recordio": ("recordio", recordio),
    "recordio without header": ("recordio", recordio_plain),
    "bin": ("bin", face_bin),
    "bin, protocol 2": ("bin", face_bin_old),
    "bin, Python 2": ("bin", face_bin_python2),
    "bin of arrays": ("bin", face_bin_arrays),
    "bin of arrays, protocol 5": ("bin", face_bin_numbers),
    "lfw": ("lfw", lfw),
    "lfw, development list": ("lfw", lfw_dev),
    "ijb": ("ijb", ijb),
    "webdataset": ("webdataset", webdataset),
    "webdataset, json and gz": ("webdataset", webdataset_json),
    "parquet": ("parquet", parquet),
    "parquet folder": ("parquet", parquet_folder),
    "parquet of lists": ("parquet", parquet_lists),
    "idx": ("idx", idx),
    "pairs-csv": ("pairs-csv", pairs_csv),
    "captions-csv": ("captions-csv", captions_csv),
    "edges": ("edges", edges_tsv),
    "edges, header": ("edges", edges_csv),
    "edges of names": ("edges", edges_of_names),
    "npz": ("npz", npz),
    "npz of floats": ("npz", npz_floats),
}
