"""Streams: the same images in the same order, whatever reads them, from wherever they start."""

from __future__ import annotations

import io
import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from armillary.data import streaming
from armillary.data.decode import Cells, decode_into
from armillary.data.images import UnreadableImage, decode_image
from armillary.data.loader import Batches
from armillary.data.pixels import ArrayImages, PixelSource, mean_image
from armillary.data.samplers import Population
from armillary.data.splits import MEMORY_LIMIT, ImageSet, PreparedData, prepare
from armillary.data.store import Dataset, Encoded, Record, write_dataset
from armillary.data.streaming import StoredImages
from armillary.data.views import make_views
from armillary.data.windows import lanes, windowed_batches
from armillary.objectives.base import Batch, Needs
from armillary.spec.errors import UserError
from armillary.spec.jobs import DataSpec

NEEDS = Needs(views=2, fields=("label", "quality"))
PAIRS = Needs(fields=("label",), sampler="class_balanced", samples_per_class=2)
CLASSES, PER_CLASS = 20, 30


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row groups of a few images, as a large dataset has many."""
    from armillary.data import writing

    monkeypatch.setattr(writing, "GROUP_ROWS", 16)


def records(encoded: bool = True) -> list[Record]:
    rng = np.random.default_rng(0)
    made = []
    for at in range(CLASSES * PER_CLASS):
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = np.asarray(Image.fromarray(coarse).resize((20, 16), Image.Resampling.BICUBIC))
        fields = {"quality": at / 1000, "caption": f"image {at}"}
        if encoded:
            file = io.BytesIO()
            Image.fromarray(image).save(file, "JPEG" if at % 3 else "PNG", quality=90)
            made.append(Record(Encoded(file.getvalue(), (16, 20, 3)), at // PER_CLASS, fields))
        else:
            made.append(Record(image, at // PER_CLASS, fields))
    return made


@pytest.fixture(params=["encoded", "pixels"])
def dataset(request: pytest.FixtureRequest, small_groups: None) -> Dataset:
    return write(encoded=request.param == "encoded")


def write(encoded: bool = True, name: str = "photos") -> Dataset:
    return write_dataset(
        name,
        records(encoded),
        class_names=[str(label) for label in range(CLASSES)],
        columns={"quality": "float32", "caption": "string"},
        form="encoded" if encoded else "pixels",
        shard_rows=200,
    )


def load(how: str, buffer: int = 64) -> PreparedData:
    return prepare(DataSpec.model_validate({"name": "photos", "load": how, "buffer": buffer}), seed=0)


def batches(data: PreparedData, needs: Needs = NEEDS, rank: int = 0, world: int = 1) -> Batches:
    return Batches(data.train, needs, make_views("faces", {}), 16, 7, rank, world)


def same(left: Batch, right: Batch) -> bool:
    pairs = [*zip(left.views, right.views, strict=True), (left.index, right.index)]
    pairs += [(left.fields[name], right.fields[name]) for name in left.fields]
    return all(torch.equal(one, other) for one, other in pairs)


def test_a_stream_holds_what_memory_holds(dataset: Dataset) -> None:
    memory, stream = load("memory"), load("stream")
    assert isinstance(memory.train.images, ArrayImages)
    assert isinstance(stream.train.images, StoredImages)
    assert memory.fingerprint == stream.fingerprint
    for one, other in ((memory.train, stream.train), (memory.evaluation, stream.evaluation)):
        assert one.images.shape == other.images.shape == (len(one), 3, 16, 20)
        assert torch.equal(one.images[:], other.images[:])
        assert torch.equal(one.label, other.label)
        assert torch.equal(one.images[5:9], other.images[[5, 6, 7, 8]])
    assert len(stream.train.images.groups().unique()) > 20
    torch.testing.assert_close(mean_image(stream.train.images), memory.train.images[:].float().mean(0) / 255)
    # Half the size: resized alike.
    spec = {"name": "photos", "image_size": [8, 10]}
    halves = [prepare(DataSpec.model_validate({**spec, "load": how}), seed=0) for how in ("memory", "stream")]
    assert torch.equal(halves[0].train.images[:], halves[1].train.images[:])


def test_a_buffer_that_holds_everything_gives_the_order_of_memory(dataset: Dataset) -> None:
    for needs in (NEEDS, PAIRS):
        stream, memory = batches(load("stream", 10_000), needs), batches(load("memory"), needs)
        for epoch in (0, 1):
            pairs = zip(stream.epoch(epoch), memory.epoch(epoch), strict=True)
            assert all(same(one, other) for one, other in pairs)


@pytest.mark.parametrize("needs", [NEEDS, PAIRS], ids=["random", "class_balanced"])
def test_workers_and_resumes_change_nothing(dataset: Dataset, needs: Needs) -> None:
    data = load("stream")
    alone = list(batches(data, needs).epoch(1))
    assert len(alone) == batches(data, needs).steps_per_epoch == len(data.train) // 16
    for world in (2, 4):
        # Stopped at step 5 on one worker, gone on with on others.
        parts = [list(batches(data, needs, rank, world).epoch(1, start_step=5)) for rank in range(world)]
        for whole, shares in zip(alone[5:], zip(*parts, strict=True), strict=True):
            assert torch.equal(torch.cat([share.index for share in shares]), whole.index)
            assert torch.equal(torch.cat([share.label for share in shares]), whole.label)
            for view in range(needs.views):
                joined = torch.cat([share.views[view] for share in shares])
                torch.testing.assert_close(joined, whole.views[view], rtol=0, atol=2e-6)


def test_every_image_comes_once_an_epoch_with_its_own_pixels(dataset: Dataset) -> None:
    data = load("stream")
    plain = Batches(data.train, NEEDS, make_views("none", {}), 14, 7)
    position = {int(index): row for row, index in enumerate(data.train.index)}
    pixels = load("memory").train.images[:]
    orders = []
    for epoch in (0, 1):
        seen = []
        for batch in plain.epoch(epoch):
            rows = [position[int(index)] for index in batch.index]
            torch.testing.assert_close(batch.views[0], pixels[rows] / 255)
            seen += rows
        assert len(data.train) == 420
        assert sorted(seen) == list(range(420))
        orders.append(seen)
    assert orders[0] != orders[1]


def test_a_pass_over_the_data_is_in_order(dataset: Dataset) -> None:
    data = load("stream")
    parts = [list(batches(data, rank=rank, world=4).samples()) for rank in range(4)]
    assert torch.equal(torch.cat([batch.index for part in parts for batch in part]), data.train.index)
    pixels = torch.cat([batch.views[0] for part in parts for batch in part])
    torch.testing.assert_close(pixels, data.train.images[:] / 255)


class Reads:
    """Counts the row groups that are read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.groups: list[tuple[int, int]] = []
        lock, original = threading.Lock(), PixelSource.cells

        def counted(source: PixelSource, shard: int, group: int) -> object:
            with lock:
                self.groups.append((shard, group))
            return original(source, shard, group)

        monkeypatch.setattr(PixelSource, "cells", counted)


def test_a_worker_reads_its_own_part_and_nothing_that_was_skipped(
    small_groups: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write()
    data = load("stream", buffer=32)
    reads = Reads(monkeypatch)

    def count(world: int, start: int = 0) -> int:
        reads.groups.clear()
        list(Batches(data.train, NEEDS, make_views("none", {}), 16, 7, 0, world).epoch(0, start))
        return len(reads.groups)

    groups = len(data.train.images.groups().unique()) if isinstance(data.train.images, StoredImages) else 0
    whole, half, quarter = (count(world) for world in (1, 2, 4))
    # A lane's end and its neighbour's start may lie in one row group, which is then read twice.
    assert groups <= whole <= groups + lanes(16)
    assert half <= whole / 2 + 3
    assert quarter <= whole / 4 + 3
    assert count(1, start=22) <= 3 * lanes(16)


def test_memory_is_bounded_by_the_buffer(small_groups: None, monkeypatch: pytest.MonkeyPatch) -> None:
    write()
    monkeypatch.setattr(streaming, "READ_AHEAD", 2)
    monkeypatch.setattr(streaming, "DECODE_AHEAD", 1)
    held: list[int] = []
    original = streaming._Pipeline._start

    def watched(pipeline: streaming._Pipeline, step: int) -> object:
        started = original(pipeline, step)
        held.append(len(pipeline._read))
        return started

    monkeypatch.setattr(streaming._Pipeline, "_start", watched)
    data = load("stream", buffer=32)
    for _ in Batches(data.train, NEEDS, make_views("none", {}), 4, 7).epoch(0):
        pass
    assert isinstance(data.train.images, StoredImages)
    # Four lanes of eight images: one or two groups each, and one that is read ahead.
    assert max(held) <= 12 < len(data.train.images.groups().unique())
    assert held[-1] == 0


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    batch=st.integers(1, 24),
    buffer=st.integers(24, 100),
    seed=st.integers(0, 100),
)
def test_any_groups_make_every_image_come_once(sizes: list[int], batch: int, buffer: int, seed: int) -> None:
    groups = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    population = Population(torch.zeros(len(groups), dtype=torch.int64))
    plan = windowed_batches(Needs(), batch, population, groups, buffer, seed=seed, epoch=3)
    assert plan.shape == (max(1, len(groups) // batch), batch)
    if len(groups) >= batch:
        assert len(plan.unique()) == plan.numel()
    if len(groups) > buffer:
        each = batch // lanes(batch)
        for lane in plan.view(len(plan), lanes(batch), each).unbind(1):
            # A window of a lane touches the groups it lies in, not all of them.
            window = max(1, buffer // lanes(batch))
            for part in lane.flatten().split(window):
                assert len(groups[part].unique()) <= 2 * window + 2
    again = windowed_batches(Needs(), batch, population, groups, buffer, seed=seed, epoch=3)
    assert torch.equal(plan, again)


def test_images_near_each_other_in_the_store_part_in_the_batches() -> None:
    groups = torch.arange(100).repeat_interleave(100)
    population = Population(torch.zeros(10_000, dtype=torch.int64))
    plan = windowed_batches(Needs(), 32, population, groups, 3200, seed=0, epoch=0)
    # 32 lanes: a batch is made of as many row groups, less those that meet by chance.
    spread = torch.stack([torch.tensor(len(groups[step].unique())) for step in plan]).float()
    assert spread.mean() > 20
    lane = plan[:, 0]
    steps = [abs(one - other) for one, other in pairwise(lane.tolist())]
    assert float(np.mean([step == 1 for step in steps])) < 0.1


def scattered() -> tuple[Population, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200).repeat_interleave(20)[torch.randperm(4000, generator=generator)]
    return Population(labels), torch.arange(40).repeat_interleave(100)


def test_classes_that_are_scattered_over_the_store_are_refused(small_groups: None) -> None:
    population, groups = scattered()
    images = StoredImages.__new__(StoredImages)
    images.buffer = 500
    images.groups = lambda: groups  # type: ignore[method-assign]
    train = ImageSet(images, population.labels, torch.arange(4000))
    needs = Needs(sampler="class_balanced", samples_per_class=4)
    with pytest.raises(UserError, match="in the same row group") as error:
        Batches(train, needs, make_views("none", {}), 32, 0)
    assert "data.buffer" in str(error.value)
    with pytest.raises(UserError, match="holds no batch of 512"):
        Batches(train, Needs(), make_views("none", {}), 512, 0)
    Batches(train, Needs(), make_views("none", {}), 32, 0)


def test_windows_of_classes_are_p_by_k_and_use_all_classes() -> None:
    labels = torch.arange(100).repeat_interleave(20)
    groups = torch.arange(40).repeat_interleave(50)
    needs = Needs(sampler="class_balanced", samples_per_class=4)
    plan = windowed_batches(needs, 32, Population(labels), groups, 300, seed=1, epoch=0)
    assert plan.shape == (62, 32)
    for step in plan:
        classes = labels[step].view(8, 4)
        assert (classes == classes[:, :1]).all()
        assert len(classes[:, 0].unique()) == 8
        assert len(groups[step].unique()) <= 12, "a window is a few row groups"
    uses = torch.bincount(labels[plan.flatten()], minlength=100)
    assert uses.min() >= 8
    assert len(plan.unique()) > 0.8 * 1984


def test_auto_decides_by_the_dataset_alone(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    from armillary.data import splits

    assert isinstance(load("auto").train.images, ArrayImages)
    assert MEMORY_LIMIT == 4 * 2**30
    monkeypatch.setattr(splits, "MEMORY_LIMIT", 600 * 3 * 16 * 20 - 1)
    assert isinstance(load("auto").train.images, StoredImages)


def test_too_much_for_memory_says_so(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    small = psutil.virtual_memory()._replace(total=2 * 600 * 3 * 16 * 20 - 2)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: small)
    with pytest.raises(UserError, match="more than half of this machine's") as error:
        load("memory")
    assert "data.load" in str(error.value)
    load("stream")


def test_a_damaged_shard_ends_the_stream_with_its_name(small_groups: None, armillary_home: Path) -> None:
    write()
    data = load("stream")
    (armillary_home / "datasets" / "photos" / "shard-00001.parquet").unlink()
    with pytest.raises(UserError, match=r"shard-00001\.parquet is missing"):
        list(batches(data).epoch(0))


def test_stopping_in_the_middle_leaves_no_threads(dataset: Dataset) -> None:
    before = threading.active_count()
    stream = batches(load("stream")).epoch(0)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_an_object_store_streams_the_same(small_groups: None, bucket: str) -> None:
    write()
    write(name=f"{bucket}/photos")
    local = load("stream")
    remote = prepare(DataSpec(name=f"{bucket}/photos", load="stream", buffer=64), seed=0)
    pairs = zip(batches(local).epoch(0, 20), batches(remote).epoch(0, 20), strict=True)
    assert all(same(one, other) for one, other in pairs)


def test_jpegs_are_decoded_as_pillow_does() -> None:
    rng = np.random.default_rng(1)
    images = [Image.fromarray(rng.integers(0, 256, (23, 31, 3), dtype=np.uint8)) for _ in range(6)]
    files, shapes = [], []
    for at, image in enumerate(images):
        file = io.BytesIO()
        if at == 4:
            image = image.convert("L")
        if at == 5:
            image = image.convert("CMYK")
        image.save(file, "JPEG", quality=40 + 10 * at, subsampling=at % 3, progressive=at == 3)
        files.append(memoryview(file.getvalue()))
        shapes.append((23, 31, 1 if at == 4 else 3))
    out = np.empty((6, 3, 23, 31), dtype=np.uint8)
    decode_into(Cells(files, np.array(shapes)), "encoded", out)
    for data, pixels in zip(files, out, strict=True):
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).transpose(2, 0, 1)
        np.testing.assert_array_equal(pixels, expected)


def test_stored_jpegs_take_the_fast_path(small_groups: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from armillary.data import decode

    dataset = write()
    table = dataset.read_arrow(0, 0)
    cells = Cells.of(table.slice(3, 10))
    assert [bytes(cell) for cell in cells.data] == table["image"].to_pylist()[3:13]
    slow: list[bytes] = []

    def noted(data: memoryview) -> object:
        slow.append(bytes(data))
        return decode_image(data)

    monkeypatch.setattr(decode, "decode_image", noted)
    decode_into(cells, "encoded", np.empty((10, 3, 16, 20), np.uint8))
    assert slow == [cell for cell in table["image"].to_pylist()[3:13] if cell.startswith(b"\x89PNG")]


@pytest.mark.parametrize("shape", [(0, 8, 3), (9000, 9000, 3), (8, 8, 3), (8, 9, 1)])
def test_images_that_are_not_what_they_claim_are_refused(shape: tuple[int, int, int]) -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 9)).save(file, "JPEG")
    for data in (file.getvalue(), file.getvalue()[:-40], b"\xff\xd8\xff", b""):
        with pytest.raises(UnreadableImage):
            decode_into(Cells([memoryview(data)], np.array([shape])), "encoded", np.empty((1, 3, 8, 8), np.uint8))
