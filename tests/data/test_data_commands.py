"""``armillary data``: what the commands print, write and refuse."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from armillary.cli.main import main
from armillary.data.importers import IMPORTERS
from armillary.data.store import Record, write_dataset


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["data", *arguments])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


@pytest.fixture
def people(tmp_path: Path) -> Path:
    for name, count in (("ann", 4), ("bob", 1), ("cyd", 1)):
        for at in range(count):
            path = tmp_path / "people" / name / f"{at}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((10 + at, 8, 3), 40 * at, np.uint8)).save(path)
    (tmp_path / "people" / "cyd" / "broken.jpg").write_bytes(b"no")
    return tmp_path / "people"


def test_import_inspect_verify(people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "import", "folder", str(people), "--name", "mine")
    assert code == 0
    assert "imported mine: 6 images of 3 classes" in out
    assert "1 files could not be read, the first: cyd/broken.jpg: not an image" in err
    sheet = tmp_path / "sheet.png"
    code, out, err = run(capsys, "inspect", "mine", "--json", "--sheet", str(sheet))
    assert code == 0
    details: dict[str, Any] = json.loads(out)
    assert details["class_balance"] == pytest.approx(
        {"empty": 0, "single": 2, "min": 1, "median": 1, "max": 4, "effective": 2.3811, "gini": 1 / 3}, abs=1e-4
    )
    assert details["sizes"]["height"] == {"min": 10, "median": 10.5, "max": 13}
    assert details["left_out"] == [{"file": "cyd/broken.jpg", "reason": "not an image"}]
    assert details["form"] == "encoded"
    with Image.open(sheet) as picture:
        # Six pictures, of which the first is black and the fourth brighter.
        assert picture.getpixel((10, 10)) == (0, 0, 0)
        assert picture.getpixel((4 + 3 * 100 + 10, 10)) == (120, 120, 120)
    code, out, _ = run(capsys, "inspect", "mine")
    assert code == 0
    assert "3, 0 without images, 2 with one" in out
    assert "cyd/broken.jpg" in out
    code, out, _ = run(capsys, "verify", "mine", "--json")
    assert code == 0
    assert json.loads(out) == {"name": "mine", "fingerprint": details["fingerprint"], "verified": True}


def test_verify_finds_what_was_exchanged(capsys: pytest.CaptureFixture[str]) -> None:
    def write(name: str, value: int) -> Path:
        rows = [Record(np.full((4, 4, 1), value, np.uint8), 0)]
        return Path(write_dataset(name, rows, class_names=["a"]).location)

    shard = write("good", 1) / "shard-00000.parquet"
    shard.write_bytes((write("other", 2) / "shard-00000.parquet").read_bytes())
    code, _, err = run(capsys, "verify", "good")
    assert code == 2
    assert "fingerprint differs" in err


def test_columns_and_tables_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    import pyarrow as pa

    fields = [{"q": at / 4, "text": f"t{at % 2}", "masked": at > 2} for at in range(5)]
    rows = [Record(np.zeros((4, 4, 1), np.uint8), 0, values) for values in fields]
    write_dataset(
        "rich",
        rows,
        class_names=["a"],
        columns={"q": "float32", "text": "string", "masked": "bool"},
        tables={"pairs": pa.table({"first": [0], "second": [1], "same": [True]})},
    )
    code, out, _ = run(capsys, "inspect", "rich", "--json")
    details = json.loads(out)
    assert code == 0
    assert details["column_ranges"]["q"] == {"type": "float32", "min": 0.0, "median": 0.5, "max": 1.0}
    assert details["column_ranges"]["masked"] == {"type": "bool", "true": 2, "false": 3}
    assert details["column_ranges"]["text"] == {"type": "string", "distinct": 2, "examples": ["t0", "t1"]}
    assert details["tables"]["pairs"]["rows"] == 1
    code, out, _ = run(capsys, "inspect", "rich")
    assert "first, second, same" in out
    assert "true 2, false 3" in out


def test_the_table_of_kinds_does_not_load_what_it_names() -> None:
    code = "import sys, armillary.data.importers; print(sorted({'torch', 'pyarrow', 'PIL'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_kinds_show_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "kinds", "--json")
    shown = json.loads(out)
    assert code == 0
    assert set(shown) == set(IMPORTERS)
    assert shown["idx"]["options"]["part"]["enum"] == ["all", "train", "t10k"]
    code, out, _ = run(capsys, "kinds")
    assert "--label-column" in out
    code, out, _ = run(capsys, "import", "--help")
    for importer in IMPORTERS.values():
        for name in importer.options.model_fields:
            assert f"--{name.replace('_', '-')}" in out, "an option that the command line does not take"


def test_options_reach_the_importer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = np.zeros((3, 4, 4), np.uint8)
    np.savez(tmp_path / "x.npz", pics=images, who=np.array(["a", "b", "a"]), age=np.array([3, 4, 5]))
    arguments = ("--images-key", "pics", "--labels-key", "who", "--columns", "age=years")
    code, out, _ = run(capsys, "import", "npz", str(tmp_path / "x.npz"), *arguments, "--json")
    assert code == 0
    details = json.loads(out)
    assert details["columns"] == {"years": "int64"}
    assert details["images_per_class"] == {"a": 2, "b": 1}
    code, _, err = run(capsys, "import", "folder", str(tmp_path), "--layout", "NCHW")
    assert code == 2
    assert "folder has no option --layout" in err
    code, _, err = run(capsys, "import", "npz", str(tmp_path / "x.npz"), "--layout", "CHWN")
    assert code == 2
    assert "--layout is 'CHWN'" in err


def test_a_sheet_that_cannot_be_written(people: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "import", "folder", str(people))
    code, _, err = run(capsys, "inspect", "people", "--sheet", "absent/sheet.png")
    assert code == 2
    assert "cannot write absent/sheet.png" in err


def test_a_full_disk_is_one_sentence_and_no_traceback(
    people: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("armillary.data.writing.ShardWriter.add", full)
    code, _, error = run(capsys, "import", "folder", str(people), "--name", "full")
    assert code == 1
    assert "No space left on device" in error
    assert "repeat the command" in error
    assert "Traceback" not in error
