"""One decoded copy of a dataset, read by many processes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from armillary.data.pixels import ArrayImages
from armillary.data.splits import prepare
from armillary.spec.jobs import DataSpec
from armillary.training.api import Submission
from armillary.training.crew import CrewPool
from armillary.training.sharing import Shelf, remembering_prepare

ORL = DataSpec(name="orl", image_size=(56, 46))


class Reader:
    """What a worker does with its data."""

    def __init__(self, home: str, references: dict[str, Any]) -> None:
        import os

        os.environ["ARMILLARY_HOME"] = home
        self.load = remembering_prepare(lambda: references)

    def images(self, fold: int) -> ArrayImages:
        images = self.load(ORL.model_copy(update={"fold": fold}), seed=0).train.images
        assert isinstance(images, ArrayImages)
        return images

    def pixels(self, fold: int) -> Any:
        return self.images(fold)[:].numpy()

    def place(self, fold: int) -> tuple[str, bool]:
        """The mapped file that the array lies in, and whether it could be written to."""
        array = self.images(fold).array
        address = array.__array_interface__["data"][0]
        for line in Path("/proc/self/maps").read_text().splitlines():
            bounds, _, _, _, inode, *name = line.split(maxsplit=5)
            start, end = (int(bound, 16) for bound in bounds.split("-"))
            if start <= address < end:
                return f"{inode} {' '.join(name)}", array.flags.writeable
        raise AssertionError("the array is not mapped")


def test_without_an_offer_data_is_decoded_once_for_all_folds(orl: Path) -> None:
    load = remembering_prepare()
    first, second = (load(ORL.model_copy(update={"fold": fold}), seed=0) for fold in (0, 1))
    assert first is load(ORL, seed=5)
    assert isinstance(first.train.images, ArrayImages)
    assert isinstance(second.train.images, ArrayImages)
    assert first.train.images.array is second.train.images.array


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_processes_read_one_copy_that_outlives_each_of_them(
    orl: Path, armillary_home: Path, ray_cluster: Mapping[str, float]
) -> None:
    import ray

    shelf = Shelf()
    data = prepare(ORL, seed=0)
    shelf.offer(data)
    shelf.offer(prepare(ORL.model_copy(update={"fold": 2}), seed=0))
    assert len(shelf.references) == 1

    def start() -> Any:
        actor: Any = ray.remote(num_cpus=0)(Reader)
        return actor.remote(str(armillary_home), shelf.references)

    one, other = start(), start()
    places = ray.get([reader.place.remote(fold) for reader in (one, other) for fold in (0, 1)])
    assert len({place for place, _ in places}) == 1, "the same file is mapped, for every fold"
    assert "plasma" in places[0][0]
    assert not any(writable for _, writable in places)
    ray.kill(one)
    for reader in (other, start()):
        np.testing.assert_array_equal(ray.get(reader.pixels.remote(0)), data.train.images[:].numpy())


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_a_stream_trains_what_memory_trains(tiny_job: Any, orl: Path, crews: CrewPool) -> None:
    jobs = [tiny_job(), tiny_job(data__load="stream"), tiny_job(data__load="stream", data__buffer=64)]
    records = crews.run_all([Submission(job) for job in jobs])
    assert [record.status for record in records] == ["finished"] * 3
    memory, stream, windows = (record.metrics for record in records)
    # The default buffer holds all of ORL, so that the order is that of memory; a small one gives another.
    assert stream["verification/auc"] == memory["verification/auc"]
    assert stream["train/loss"] == memory["train/loss"]
    assert windows["train/loss"] != memory["train/loss"]
    assert windows["train/loss"] == pytest.approx(memory["train/loss"], rel=0.5)
