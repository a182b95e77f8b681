"""What every test shares: a state folder of its own, one torch thread, one Ray cluster a session."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from armillary.training.crew import CrewPool

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
    """One local Ray cluster for all tests of a session that train; mark them ``xdist_group("ray")``.

    It counts more CPUs than there are, so that a run of its own fits beside the crews.
    """
    from armillary.training.session import ray_session

    with ray_session(cpus=6) as capacity:
        yield capacity


@pytest.fixture(scope="session")
def crews(ray_cluster: Mapping[str, float], imported_orl: Path) -> Iterator[CrewPool]:
    """Two crews of one worker, started once a session; they find the ORL faces in a store of their own."""
    from armillary.spec.jobs import TrainJob
    from armillary.training.crew import crew_pool

    job = TrainJob.model_validate({"objective": {"name": "arcface"}, "train": {"threads": 1}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARMILLARY_HOME", str(imported_orl.parents[1]))
        pool = crew_pool(job, 2)
        opened = pool.__enter__()
    yield opened
    pool.__exit__(None, None, None)
