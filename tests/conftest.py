"""What every test shares: a state folder of its own, one torch thread, one Ray cluster a session."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

# Two workers of pytest-xdist share two cores; more threads than cores only make them wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def armillary_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder that no other test sees; the working directory moves out of the checkout too."""
    folder = tmp_path / "home"
    monkeypatch.setenv("ARMILLARY_HOME", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture(scope="session")
def imported_orl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ORL faces in a store of their own, imported once a session."""
    from armillary.data.importers import import_dataset

    folder = tmp_path_factory.mktemp("orl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARMILLARY_HOME", str(folder))
        import_dataset("orl")
    return folder / "datasets" / "orl"


@pytest.fixture
def orl(imported_orl: Path, armillary_home: Path) -> Path:
    """The ORL faces in this test's own store."""
    target = armillary_home / "datasets" / "orl"
    shutil.copytree(imported_orl, target)
    return target


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Mapping[str, float]]:
    """One local Ray cluster for all tests of a session that train; mark them ``xdist_group("ray")``."""
    from armillary.training.session import ray_session

    with ray_session() as capacity:
        yield capacity
