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
    needs = Needs(sampler="class_balanced", samples_per_class=k)
    with pytest.raises(UserError) as error:
        global_batches(needs, size, Population(LABELS), seed=0, epoch=0)
    assert complaint in str(error.value)


def set_population(lengths: list[list[int]]) -> Population:
    """Classes with sets of those lengths; set numbers are shared by classes, and the rows are mixed up."""
    labels = torch.cat([torch.full((sum(sets),), label) for label, sets in enumerate(lengths)])
    numbers = torch.cat([torch.arange(len(sets)).repeat_interleave(torch.tensor(sets)) for sets in lengths])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return Population(labels[order], numbers[order])


def set_batches(population: Population, p: int, s: int, k: int, seed: int = 0) -> Tensor:
    needs = Needs(sampler="image_sets", sets_per_class=s, samples_per_set=k)
    return global_batches(needs, p * s * k, population, seed=seed, epoch=0)


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=6), min_size=2, max_size=8),
    s=st.integers(1, 3),
    k=st.integers(1, 5),
    share=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_batches_of_sets_are_p_by_s_by_k(lengths: list[list[int]], s: int, k: int, share: float, seed: int) -> None:
    population = set_population(lengths)
    assert population.sets is not None
    p = 1 + int(share * (len(lengths) - 1))
    plan = set_batches(population, p, s, k, seed)
    assert plan.shape == (steps_per_epoch(len(population), p * s * k), p * s * k)
    assert torch.equal(plan, set_batches(population, p, s, k, seed))
    for step in plan.view(-1, p, s, k):
        labels, numbers = population.labels[step], population.sets[step]
        assert (labels == labels[:, :1, :1]).all()
        assert len(labels[:, 0, 0].unique()) == p
        assert (numbers == numbers[:, :, :1]).all(), "a set's images stand together"
        for label, sets, rows in zip(labels[:, 0, 0].tolist(), numbers[:, :, 0], step, strict=True):
            assert len(sets.unique()) == min(s, len(lengths[label])), "different sets, if there are that many"
            for number, images in zip(sets.tolist(), rows, strict=True):
                size = lengths[label][number]
                times = torch.unique(images, return_counts=True)[1]
                assert len(times) == min(k, size)
                assert times.max() <= -(-k // size)


def test_long_sets_come_more_often_and_all_their_images_come() -> None:
    # One class with a set of 40 images and four of 4, K = 4: a round is 10 + 4 turns.
    population = set_population([[40, 4, 4, 4, 4], [56]])
    assert population.sets is not None
    plan = set_batches(population, 2, 1, 4)
    assert plan.shape == (14, 8)
    first = plan[population.labels[plan] == 0]
    assert sorted(first.tolist()) == sorted((population.labels == 0).nonzero().flatten().tolist())


def test_short_sets_meet_short_ones() -> None:
    population = set_population([[2] * 8 + [16] * 8, [144]])
    assert population.sets is not None
    plan = set_batches(population, 1, 2, 4)
    together = population.sets[plan].view(-1, 2, 4)[:, :, 0][population.labels[plan[:, 0]] == 0]
    short = (together < 8).sum(dim=1)
    assert set(short.tolist()) <= {0, 2}
    assert 2 in short.tolist()


def test_impossible_batches_of_sets_show_the_arithmetic() -> None:
    population = set_population([[4, 4], [4, 4]])
    with pytest.raises(UserError, match=r"needs 3 classes; there are 2"):
        set_batches(population, 3, 2, 2)
    needs = Needs(sampler="image_sets", sets_per_class=2, samples_per_set=3)
    with pytest.raises(UserError, match=r"not a multiple of 6 images a class \(2 sets of 3\)"):
        global_batches(needs, 16, population, seed=0, epoch=0)
    with pytest.raises(UserError, match="column image_set"):
        global_batches(needs, 12, Population(population.labels), seed=0, epoch=0)
