"""Samplers: every image, P x K, and the same batches for the same seed and epoch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from armillary.data.samplers import Population, global_batches, steps_per_epoch
from armillary.objectives.base import Needs
from armillary.spec.errors import UserError

LABELS = torch.arange(28).repeat_interleave(10)


def batches(labels: Tensor, size: int, k: int = 0, seed: int = 0, epoch: int = 0) -> Tensor:
    needs = Needs(sampler="class_balanced", samples_per_class=k) if k else Needs()
    return global_batches(needs, size, Population(labels), seed=seed, epoch=epoch)


def test_random_takes_every_image_once_and_drops_the_rest() -> None:
    plan = batches(LABELS, 64)
    assert plan.shape == (4, 64)
    assert len(plan.unique()) == 256
    assert plan.max() < 280
    assert sorted(batches(LABELS, 70).flatten().tolist()) == list(range(280))


@pytest.mark.parametrize("size", [281, 300, 1000])
def test_a_set_smaller_than_a_batch_fills_one_batch_evenly(size: int) -> None:
    plan = batches(LABELS, size)
    assert plan.shape == (1, size)
    counts = torch.bincount(plan[0], minlength=280)
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("k", [0, 4])
def test_batches_are_a_function_of_seed_and_epoch(k: int) -> None:
    base = batches(LABELS, 64, k, seed=3, epoch=5)
    assert torch.equal(base, batches(LABELS, 64, k, seed=3, epoch=5))
    torch.manual_seed(99)
    assert torch.equal(base, batches(LABELS, 64, k, seed=3, epoch=5))
    assert not torch.equal(base, batches(LABELS, 64, k, seed=4, epoch=5))
    assert not torch.equal(base, batches(LABELS, 64, k, seed=3, epoch=6))
    # (3, 5) and (5, 3) must differ as well: the two are not added up.
    assert not torch.equal(base, batches(LABELS, 64, k, seed=5, epoch=3))


@settings(max_examples=80, deadline=None)
@given(
    counts=st.lists(st.integers(1, 9), min_size=2, max_size=20),
    k=st.integers(1, 6),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**31 - 1),
)
def test_class_balanced_is_p_by_k(counts: list[int], k: int, share: float, seed: int) -> None:
    labels = torch.repeat_interleave(torch.arange(len(counts)) * 2, torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    p = 1 + int(share * (len(counts) - 1))
    plan = batches(labels, p * k, k, seed=seed)
    assert plan.shape == (steps_per_epoch(len(labels), p * k), p * k)
    for step in plan:
        groups = labels[step].view(p, k)
        assert (groups == groups[:, :1]).all(), "a class's images stand together"
        assert len(groups[:, 0].unique()) == p, "P different classes"
        for row, label in zip(step.view(p, k), groups[:, 0], strict=True):
            size = counts[int(label) // 2]
            times = torch.unique(row, return_counts=True)[1]
            assert len(row.unique()) == min(k, size)
            assert times.max() <= -(-k // size)


def test_class_balanced_uses_all_classes_and_images_equally() -> None:
    plan = batches(LABELS, 56, 2)
    uses = torch.bincount(LABELS[plan.flatten()], minlength=28)
    assert uses.tolist() == [10] * 28
    assert sorted(plan.flatten().tolist()) == list(range(280))


def test_long_tails_are_levelled() -> None:
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor([1000, 50, 5, 1]))
    plan = batches(labels, 8, 4)
    uses = torch.bincount(labels[plan.flatten()], minlength=4)
    assert (uses.max() - uses.min()) <= 4
    assert torch.bincount(plan.flatten(), minlength=1056)[1050:1055].min() > 0


@pytest.mark.parametrize(("size", "k", "complaint"), [(64, 3, "n x 3"), (232, 4, "58 classes"), (64, 0, "n x 0")])
def test_impossible_batches_show_the_arithmetic(size: int, k: int, complaint: str) -> None:
    with pytest.raises(UserError) as error:
        needs = Needs(sampler="class_balanced", samples_per_class=k)
        global_batches(needs, size, Population(LABELS), seed=0, epoch=0)
    assert complaint in str(error.value)
