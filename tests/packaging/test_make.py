"""The make targets' own decisions: which Python, which environment."""

from __future__ import annotations

import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def make(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *arguments], cwd=checkout, capture_output=True, text=True, check=False)


def fake_python(checkout: Path, script: str) -> str:
    path = checkout / "old-python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_help_is_the_default_and_lists_every_target(checkout: Path) -> None:
    listed = {line.split()[1] for line in make(checkout).stdout.splitlines()}
    assert {"install", "install-test", "demo", "test", "test-fast", "lint", "types", "constraints", "clean"} <= listed


def test_an_old_python_is_named_and_refused(checkout: Path) -> None:
    python = fake_python(checkout, 'case "$1" in --version) echo Python 3.9.18;; *) exit 1;; esac')
    done = make(checkout, "venv", f"PYTHON={python}")
    assert done.returncode != 0
    assert "needs Python 3.11, 3.12 or 3.13" in done.stderr
    assert "Python 3.9.18" in done.stderr
    assert not (checkout / ".venv").exists()


def test_a_python_without_venv_says_what_to_install(checkout: Path) -> None:
    python = fake_python(checkout, f'case "$2" in *venv*) exit 1;; *) exec {sys.executable} "$@";; esac')
    done = make(checkout, "venv", f"PYTHON={python}")
    assert done.returncode != 0
    assert "python3-venv" in done.stderr


def test_a_python_that_is_not_there_is_refused(checkout: Path) -> None:
    done = make(checkout, "venv", "PYTHON=no-such-python")
    assert done.returncode != 0
    assert "no-such-python" in done.stderr


def test_an_environment_made_elsewhere_is_used_and_given_pip(checkout: Path) -> None:
    """As uv makes them: no pip inside."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "elsewhere"], cwd=checkout, check=True)
    done = make(checkout, "--dry-run", "install", "VENV=elsewhere")
    assert "-m venv" not in done.stdout
    assert "elsewhere/bin/python -m ensurepip" in done.stdout
    assert 'elsewhere/bin/python -m pip install --quiet -c constraints.txt -e ".[faces]"' in done.stdout


def test_the_local_hooks_are_the_makefiles_checks() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repository["repo"] for repository in config["repos"]] == ["local"], "hooks must not be downloaded"
    assert {hook["language"] for hook in config["repos"][0]["hooks"]} == {"system"}
    assert {hook["id"] for hook in config["repos"][0]["hooks"]} == {"ruff", "ruff-format", "mypy", "lint-imports"}


def test_ci_is_executable_and_strict() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & stat.S_IXUSR
    assert "set -euo pipefail" in script.read_text()
    subprocess.run(["bash", "-n", str(script)], check=True)
