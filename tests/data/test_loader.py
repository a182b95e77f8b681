"""Batches: the same global batch on any number of workers, and what the objective asked for."""

from __future__ import annotations

import pytest
import torch

from armillary.data.loader import Batches
from armillary.data.splits import ImageSet
from armillary.data.views import make_views
from armillary.objectives.base import Batch, Needs
from armillary.spec.errors import UserError


@pytest.fixture
def train() -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (50, 1, 12, 10), generator=generator).to(torch.uint8)
    index = torch.randperm(90, generator=generator)[:50]
    return ImageSet(images, torch.arange(50) // 5, index, {"quality": index / 90})


NEEDS = Needs(views=2, fields=("label", "quality"))


def run(
    train: ImageSet, needs: Needs = NEEDS, rank: int = 0, world: int = 1, start: int = 0, epoch: int = 3
) -> list[Batch]:
    return list(Batches(train, needs, make_views("faces", {}), 16, 7, rank, world).epoch(epoch, start))


@pytest.mark.parametrize(
    "needs", [NEEDS, Needs(fields=("label", "quality"), sampler="class_balanced", samples_per_class=2)]
)
@pytest.mark.parametrize("world", [2, 4])
def test_workers_in_rank_order_make_the_batch_of_one(train: ImageSet, needs: Needs, world: int) -> None:
    alone = run(train, needs)
    parts = [run(train, needs, rank, world) for rank in range(world)]
    assert len(alone) == 3
    for step, whole in enumerate(alone):
        shares = [part[step] for part in parts]
        assert torch.equal(torch.cat([share.index for share in shares]), whole.index)
        for name in ("label", "quality"):
            assert torch.equal(torch.cat([share.fields[name] for share in shares]), whole.fields[name])
        for view in range(needs.views):
            joined = torch.cat([share.views[view] for share in shares])
            torch.testing.assert_close(joined, whole.views[view], rtol=0, atol=2e-6)


def test_a_batch_holds_what_belongs_together(train: ImageSet) -> None:
    plain = Batches(train, NEEDS, make_views("none", {}), 16, 7)
    assert plain.steps_per_epoch == 3
    position = {int(index): row for row, index in enumerate(train.index)}
    for batch in plain.epoch(0):
        rows = torch.tensor([position[int(index)] for index in batch.index])
        assert len(batch.views) == 2
        torch.testing.assert_close(batch.views[0], train.images[rows] / 255)
        assert torch.equal(batch.label, train.label[rows])
        assert torch.equal(batch.fields["quality"], train.fields["quality"][rows])


def test_views_of_an_image_differ_and_epochs_differ(train: ImageSet) -> None:
    first, second = run(train, epoch=0)[0], run(train, epoch=1)[0]
    assert not torch.equal(first.views[0], first.views[1])
    assert not torch.equal(first.index, second.index)


def test_going_on_in_the_middle_gives_the_rest_of_the_epoch(train: ImageSet) -> None:
    whole, rest = run(train), run(train, start=2)
    assert len(rest) == 1
    assert torch.equal(rest[0].index, whole[2].index)
    assert torch.equal(rest[0].views[1], whole[2].views[1])


def test_an_objective_without_labels_gets_none(train: ImageSet) -> None:
    assert run(train, Needs(views=1))[0].fields == {}


def test_what_cannot_be_given_is_named_at_once(train: ImageSet) -> None:
    views = make_views("none", {})
    with pytest.raises(UserError, match="no 'pose'") as error:
        Batches(train, Needs(fields=("label", "pose")), views, 16, 0)
    assert "this one has index, label, quality" in str(error.value)
    with pytest.raises(UserError, match="shared by 3 workers"):
        Batches(train, NEEDS, views, 16, 0, 0, 3)
    with pytest.raises(UserError, match="needs 16 classes; there are 10"):
        Batches(train, Needs(sampler="class_balanced", samples_per_class=2), views, 32, 0)
