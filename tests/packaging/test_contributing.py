"""The worked example in CONTRIBUTING.md is a real objective: it passes the whole conformance suite."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
NAME = "orthogonal_projection"
SUITE = f"""
import {{module}}
from armillary.testing.objective_suite import ObjectiveSuite


class TestExample(ObjectiveSuite):
    objectives = ("{NAME}",)
"""


def example(language: str) -> tuple[Path, str]:
    """The path that a code block names in its first line, and the block."""
    block = re.search(rf"```{language}\n# (\S+)\n(.*?)```", CONTRIBUTING, re.DOTALL)
    assert block, f"CONTRIBUTING.md has no {language} example that names its file"
    return Path(block.group(1)), block.group(2)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the example's module, its search space and a conformance test."""
    module, code = example("python")
    assert module.parent == Path("platform/armillary/objectives")
    (tmp_path / module.name).write_text(code)
    space, ranges = example("yaml")
    assert space == Path(f"search_spaces/{NAME}.yaml")
    (tmp_path / space.parent).mkdir()
    (tmp_path / space).write_text(ranges)
    (tmp_path / "test_example.py").write_text(SUITE.format(module=module.stem))
    return tmp_path


@pytest.mark.slow
def test_the_example_conforms(checkout: Path) -> None:
    # In a process of its own, so that the example does not stay registered here.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "test_example.py"]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) >= 20


@pytest.mark.parametrize("check", ["check", "format --check"])
def test_the_example_keeps_the_rules_it_teaches(check: str) -> None:
    path, code = example("python")
    command = [sys.executable, "-m", "ruff", *check.split(), "--no-cache", "--stdin-filename", str(path), "-"]
    done = subprocess.run(command, cwd=ROOT, input=code, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_make_target_named_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    commands = re.findall(r"`make ([a-z -]+?)`", CONTRIBUTING)
    named = {word for command in commands for word in command.split()}
    assert named
    assert named <= targets
