"""What every test shares: a state folder of its own, one torch thread."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Two workers of pytest-xdist share two cores; more threads than cores only make them wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def armillary_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A state folder that no other test sees; the working directory moves out of the checkout too."""
    folder = tmp_path / "home"
    monkeypatch.setenv("ARMILLARY_HOME", str(folder))
    monkeypatch.chdir(tmp_path)
    yield folder
