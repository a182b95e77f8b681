from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from armillary.cluster import doctor
from armillary.cluster.doctor import Check, examine, healthy


def found(checks: list[Check], group: str, name: str) -> Check:
    return next(check for check in checks if (check.group, check.name) == (group, name))


def test_this_machine_has_all_that_is_needed(monkeypatch: pytest.MonkeyPatch, armillary_home: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    checks = examine()
    assert healthy(checks), [check for check in checks if check.state == "missing"]
    assert {check.group for check in checks} == {"python", "packages", "devices", "machine", "home", "data"}
    for name in ("torch", "ray", "deepspeed", "mlflow", "optuna"):
        assert found(checks, "packages", name).found[0].isdigit()
    assert not armillary_home.exists(), "looking must not write"


def test_a_missing_and_an_outdated_package_are_named_with_the_command_that_gets_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "requires", lambda _: ["no-such-package>=3", "torch>=999", 'x; extra == "test"'])
    checks = examine()
    assert not healthy(checks)
    assert found(checks, "packages", "no-such-package").advice == 'pip install "no-such-package>=3"'
    assert "wanted >=999" in found(checks, "packages", "torch").found
    assert all(check.name != "x" for check in checks)


def test_a_home_that_cannot_be_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ARMILLARY_HOME", str(tmp_path / "file" / "home"))
    check = found(examine(), "home", "folder")
    assert check.state == "missing"
    assert "ARMILLARY_HOME" in check.advice


def test_a_temporary_folder_too_deep_for_rays_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + "deep/" * 10)
    assert found(examine(), "machine", "ray temporary folder").state == "missing"


def test_little_memory_and_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "MEMORY_GIB", 1e6)
    monkeypatch.setattr(doctor, "DISK_GIB", 1e6)
    checks = examine()
    assert found(checks, "machine", "memory").state == "missing"
    assert found(checks, "home", "disk").state == "missing"


def test_a_stored_dataset_is_listed() -> None:
    from armillary.data.importers import import_dataset

    import_dataset("digits")
    assert "digits (1797 images)" in found(examine(), "data", "datasets").found


def test_the_command_exits_with_1_when_the_named_cluster_is_not_there() -> None:
    command = [sys.executable, "-m", "armillary", "doctor", "--json", "--address", "http://127.0.0.1:1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] is False
    assert [check["group"] for check in report["checks"] if check["state"] == "missing"] == ["cluster"]
