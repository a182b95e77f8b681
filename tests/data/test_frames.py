"""Views that are frames, and the fields that columns become."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from armillary.data.frames import clips
from armillary.data.layout import ColumnType
from armillary.data.loader import Batches
from armillary.data.splits import PreparedData, prepare
from armillary.data.store import Record, write_dataset
from armillary.data.views import make_views
from armillary.objectives.base import Needs
from armillary.spec.errors import UserError
from armillary.spec.jobs import DataSpec

CLASSES, SEQUENCES, FRAMES = 8, 3, 6
COLUMNS: dict[str, ColumnType] = {
    "yaw": "float32",
    "pitch": "float32",
    "masked": "bool",
    "quality": "float32",
    "resolution": "int64",
    "image_set": "int64",
    "sequence": "int64",
    "frame": "int64",
    "clean_label": "int64",
    "caption": "string",
}


def rows() -> Iterator[Record]:
    """Every image's grey level is its index, so that a view tells which image it was made of."""
    order = np.random.default_rng(0).permutation(CLASSES * SEQUENCES * FRAMES)
    for at, place in enumerate(order.tolist()):
        sequence, frame = divmod(place, FRAMES)
        label = sequence // SEQUENCES
        fields = {
            "yaw": float(at),
            "pitch": -at / 2,
            "masked": at % 3 == 0,
            "quality": at / 200,
            "resolution": 8 + at,
            "image_set": sequence,
            "sequence": sequence if label else -1,
            "frame": frame,
            "clean_label": label,
            "caption": f"person {label}, frame {frame}",
        }
        yield Record(np.full((8, 8, 1), at, np.uint8), label, fields)


@pytest.fixture(params=["memory", "stream"])
def data(request: pytest.FixtureRequest) -> PreparedData:
    write_dataset("video", rows(), class_names=[str(label) for label in range(CLASSES)], columns=COLUMNS)
    return prepare(DataSpec.model_validate({"name": "video", "load": request.param, "buffer": 40}), seed=0)


def test_views_are_the_frames_that_follow(data: PreparedData) -> None:
    needs = Needs(views=3, fields=("sequence", "frame", "quality"), recipe="frames")
    still = {"flip": 0, "rotation": 0, "zoom": 0, "shift": 0, "brightness": 0, "contrast": 0, "noise": 0}
    batches = Batches(data.train, needs, make_views("frames", still), 4, 3)
    label = {int(index): int(name) for index, name in zip(data.train.index, data.train.label, strict=True)}
    sequence = dict(zip(data.train.index.tolist(), data.train.fields["sequence"].tolist(), strict=True))
    frame = dict(zip(data.train.index.tolist(), data.train.fields["frame"].tolist(), strict=True))
    starts = {index for index in sequence if sequence[index] >= 0 and frame[index] <= FRAMES - 3}
    assert batches.steps_per_epoch == len(starts) // 4
    seen = []
    for batch in batches.epoch(0):
        assert len(batch.views) == 3
        seen += batch.index.tolist()
        shown = [(view[:, 0, 4, 4] * 255).round().long().tolist() for view in batch.views]
        for at, first in enumerate(batch.index.tolist()):
            assert shown[0][at] == first
            for view in range(3):
                image = shown[view][at]
                assert sequence[image] == sequence[first]
                assert frame[image] == frame[first] + view
                assert label[image] == label[first]
            assert int(batch.fields["frame"][at]) == frame[first]
    assert len(set(seen)) == len(seen)
    assert set(seen) <= starts


def test_workers_share_clips(data: PreparedData) -> None:
    needs = Needs(views=2, recipe="frames")
    alone = list(Batches(data.train, needs, make_views("frames", {}), 8, 3).epoch(2))
    parts = [list(Batches(data.train, needs, make_views("frames", {}), 8, 3, rank, 2).epoch(2, 1)) for rank in (0, 1)]
    for whole, one, other in zip(alone[1:], *parts, strict=True):
        assert torch.equal(torch.cat([one.index, other.index]), whole.index)
        joined = torch.cat([one.views[1], other.views[1]])
        torch.testing.assert_close(joined, whole.views[1], rtol=0, atol=2e-6)


def test_columns_become_fields(data: PreparedData) -> None:
    wanted = ("label", "pose", "mask", "quality", "resolution", "image_set", "sequence", "frame")
    batch = next(Batches(data.train, Needs(fields=wanted), make_views("none", {}), 8, 3).epoch(0))
    index = batch.index.float()
    assert batch.fields["pose"].dtype == torch.float32
    torch.testing.assert_close(batch.fields["pose"], torch.stack([index, -index / 2], dim=1))
    assert torch.equal(batch.fields["mask"], batch.index % 3 == 0)
    torch.testing.assert_close(batch.fields["quality"], index / 200)
    assert torch.equal(batch.fields["resolution"], batch.index + 8)
    assert {"clean_label", "pose", "mask"} <= set(data.evaluation.fields)
    assert not {"yaw", "pitch", "masked", "caption"} & set(data.evaluation.fields)
    texts = data.evaluation.texts["caption"]
    for text, label, frame in zip(
        texts.tolist(), data.evaluation.label.tolist(), data.evaluation.fields["frame"].tolist(), strict=True
    ):
        assert text == f"person {label}, frame {frame}"


def test_sets_come_from_the_store(data: PreparedData) -> None:
    needs = Needs(
        fields=("label", "image_set"), recipe="none", sampler="image_sets", sets_per_class=2, samples_per_set=3
    )
    for batch in Batches(data.train, needs, make_views("none", {}), 12, 3).epoch(0):
        sets = batch.fields["image_set"].view(2, 2, 3)
        assert (sets == sets[:, :, :1]).all()
        assert (sets[:, 0, 0] != sets[:, 1, 0]).all()
        assert (sets // SEQUENCES == sets[:, :1, :1] // SEQUENCES).all()


def test_a_gap_ends_a_clip() -> None:
    sequence = torch.tensor([5, 5, 5, 5, 7, 7, -1, -1])
    frame = torch.tensor([3, 0, 1, 4, 0, 1, 0, 1])
    assert clips(sequence, frame, 2).tolist() == [[0, 3], [1, 2], [4, 5]]
    with pytest.raises(UserError, match="sequences of 3 frames"):
        clips(sequence, frame, 3)


def test_missing_columns_are_named(data: PreparedData) -> None:
    images = data.train
    for name in ("sequence", "image_set"):
        del images.fields[name]
    with pytest.raises(UserError, match="no 'sequence'"):
        Batches(images, Needs(views=2), make_views("frames", {}), 8, 0)
    needs = Needs(sampler="image_sets", sets_per_class=1, samples_per_set=2)
    with pytest.raises(UserError, match="no 'image_set'"):
        Batches(images, needs, make_views("none", {}), 8, 0)
