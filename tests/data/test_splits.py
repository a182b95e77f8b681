"""Splits: nobody leaks, folds are fixed, the fingerprint covers what it should."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from armillary.data.splits import (
    ImageSet,
    PreparedData,
    _by_identity,
    _by_sample,
    fold_count,
    prepare,
)
from armillary.data.store import Dataset, Record, open_dataset, write_dataset
from armillary.spec.errors import UserError
from armillary.spec.jobs import DataSpec

Make = Callable[..., Dataset]


def people(data: PreparedData, name: str) -> tuple[set[int], set[int]]:
    """The dataset's own labels on both sides, looked up by index in the store, not taken from the split."""
    label = np.concatenate([rows.label for rows in open_dataset(name).rows()])
    return set(label[data.train.index.numpy()].tolist()), set(label[data.evaluation.index.numpy()].tolist())


def test_orl_folds_hold_out_twelve_people_each_and_never_share_one() -> None:
    tested: list[set[int]] = []
    for fold in range(3):
        data = prepare(DataSpec(name="orl", fold=fold, image_size=(16, 12)), seed=0)
        trained, held_out = people(data, "orl")
        assert len(trained) == data.num_classes == 28
        assert len(held_out) == 12
        assert not trained & held_out
        assert len(data.train) == 280
        assert len(data.evaluation) == 120
        assert not set(data.train.index.tolist()) & set(data.evaluation.index.tolist())
        assert sorted(data.train.label.unique().tolist()) == list(range(28))
        tested.append(held_out)
    assert len(set.union(*tested)) == 36
    with pytest.raises(UserError, match="fold 3 does not exist: orl has 3 folds by identity") as error:
        prepare(DataSpec(name="orl", fold=3), seed=0)
    assert "0..2" in str(error.value)


def test_orl_validation_never_touches_the_people_of_the_test() -> None:
    for fold in range(3):
        tested = people(prepare(DataSpec(name="orl", fold=fold, image_size=(8, 8)), seed=0), "orl")[1]
        tuning = prepare(DataSpec(name="orl", fold=fold, holdout="validation", image_size=(8, 8)), seed=0)
        trained, held_out = people(tuning, "orl")
        assert len(trained) == 20
        assert len(held_out) == 8
        assert not trained & held_out
        assert not (trained | held_out) & tested


def test_folds_are_fixed_for_all_time() -> None:
    # Results are compared over years: a change of these people needs a new rule name in the fingerprint.
    data = prepare(DataSpec(name="orl", image_size=(8, 8)), seed=0)
    assert people(data, "orl")[1] == {3, 10, 13, 14, 17, 18, 20, 29, 30, 33, 35, 39}


def test_seed_changes_nothing_but_the_noise(make: Make) -> None:
    make()
    one, other = (prepare(DataSpec(name="small", fold=1), seed=seed) for seed in (0, 1))
    assert torch.equal(one.train.index, other.train.index)
    assert torch.equal(one.train.images[:], other.train.images[:])
    assert torch.equal(one.train.label, other.train.label)
    noisy = [prepare(DataSpec(name="small", label_noise=0.5), seed=seed).train.label for seed in (0, 0, 1)]
    assert torch.equal(noisy[0], noisy[1])
    assert not torch.equal(noisy[0], noisy[2])


def test_images_keep_their_labels(make: Make) -> None:
    dataset = make()
    stored = {int(at): image for rows in dataset.rows() for at, image in zip(rows.index, rows.images, strict=True)}
    label = {int(at): int(value) for rows in dataset.rows() for at, value in zip(rows.index, rows.label, strict=True)}
    data = prepare(DataSpec(name="small"), seed=0)
    for side in (data.train, data.evaluation):
        for image, index in zip(side.images[:], side.index.tolist(), strict=True):
            np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), stored[index])
    for index, value in zip(data.evaluation.index.tolist(), data.evaluation.label.tolist(), strict=True):
        assert value == label[index]
    classes = sorted({label[index] for index in data.train.index.tolist()})
    for index, value in zip(data.train.index.tolist(), data.train.label.tolist(), strict=True):
        assert classes[value] == label[index]


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(1, 12), min_size=6, max_size=40), validation=st.booleans())
def test_identity_folds_of_any_dataset(counts: list[int], validation: bool) -> None:
    # Class numbers with gaps, as where a folder had only unreadable images.
    label = torch.repeat_interleave(torch.arange(len(counts)) * 3, torch.tensor(counts))
    held = max(2, int(0.3 * len(counts) + 0.5))
    tested: set[int] = set()
    for fold in range(len(counts) // held):
        test_rows = _by_identity(label, fold, False)[1]
        test = set(label[test_rows].tolist())
        train_rows, held_rows = _by_identity(label, fold, validation)
        train, held_out = set(label[train_rows].tolist()), set(label[held_rows].tolist())
        assert len(test) == held
        assert not tested & test
        tested |= test
        assert not train & held_out
        assert len(train) >= 2
        assert len(held_out) >= 2
        if validation:
            assert not (train | held_out) & test
            assert len(train | held_out) == len(counts) - held
        else:
            assert len(train_rows) + len(held_rows) == len(label)


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(1, 23), min_size=1, max_size=12))
def test_sample_folds_of_any_dataset(counts: list[int]) -> None:
    label = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    label = label[torch.randperm(len(label), generator=torch.Generator().manual_seed(len(counts)))]
    data = ImageSet(torch.zeros(len(label), 1, 1, 1, dtype=torch.uint8), label, torch.arange(len(label)))
    tests = [set(_by_sample(data, fold, False)[1].tolist()) for fold in range(5)]
    for fold in range(5):
        train_rows, test_rows = (set(rows.tolist()) for rows in _by_sample(data, fold, False))
        assert not train_rows & test_rows
        assert train_rows | test_rows == set(range(len(label)))
        fit_rows, tuned_rows = (set(rows.tolist()) for rows in _by_sample(data, fold, True))
        assert not (fit_rows | tuned_rows) & test_rows
        assert not fit_rows & tuned_rows
        # A class of two whose other row is tested keeps this one to train on.
        kept = tests[(fold + 1) % 5] - tuned_rows
        assert tuned_rows <= tests[(fold + 1) % 5]
        assert all(counts[int(label[row])] == 2 for row in kept)
        assert {int(label[row]) for row in tuned_rows} <= {int(label[row]) for row in fit_rows}
        for class_number, count in enumerate(counts):
            share = int((label[sorted(test_rows)] == class_number).sum()) if test_rows else 0
            assert share in ((count // 5, -(-count // 5)) if count > 1 else (0,))
    # Every sample of a class with two images or more is tested in exactly one fold.
    singles = sum(count == 1 for count in counts)
    assert sum(len(rows) for rows in tests) == len(label) - singles
    assert len(set.union(*tests)) == len(label) - singles


def test_digits_share_their_classes() -> None:
    data = prepare(DataSpec(name="digits", split="sample", fold=4), seed=0)
    assert data.num_classes == 10
    assert len(data.train) + len(data.evaluation) == 1797
    assert abs(len(data.evaluation) - 359) <= 5
    assert sorted(data.evaluation.label.unique().tolist()) == list(range(10))
    with pytest.raises(UserError, match="fold 5 does not exist"):
        prepare(DataSpec(name="digits", split="sample", fold=5), seed=0)


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_label_noise_replaces_its_share_by_other_classes(share: float) -> None:
    clean = prepare(DataSpec(name="digits", split="sample"), seed=3)
    noisy = prepare(DataSpec(name="digits", split="sample", label_noise=share), seed=3)
    changed = clean.train.label != noisy.train.label
    assert int(changed.sum()) == int(share * len(clean.train) + 0.5)
    assert torch.equal(clean.evaluation.label, noisy.evaluation.label)
    # All nine other classes come equally often: chi-square with 8 degrees of freedom, p = 1e-6.
    shift = (noisy.train.label - clean.train.label)[changed] % 10
    counts = torch.bincount(shift, minlength=10)[1:].double()
    expected = counts.sum() / 9
    assert float(((counts - expected) ** 2 / expected).sum()) < 42.7


def test_fingerprint_covers_protocol_but_not_fold_and_seed(make: Make) -> None:
    make("small")
    make("other", classes=11)
    base = DataSpec(name="small")

    def of(seed: int = 0, **changes: Any) -> str:
        return prepare(base.model_copy(update=changes), seed=seed).fingerprint

    assert of() == of(seed=9) == of(fold=2) == of(image_size=(16, 16))
    changes: list[dict[str, Any]] = [
        {"split": "sample"},
        {"holdout": "validation"},
        {"image_size": (8, 8)},
        {"label_noise": 0.1},
    ]
    prints = [of(), of(name="other"), *(of(**change) for change in changes)]
    assert len(set(prints)) == len(prints)


def test_resizing_is_antialiased_like_pillow() -> None:
    full = prepare(DataSpec(name="orl"), seed=0).evaluation.images[5:6][0, 0]
    small = prepare(DataSpec(name="orl", image_size=(28, 24)), seed=0).evaluation.images[5:6][0, 0]
    expected = np.asarray(Image.fromarray(full.numpy()).resize((24, 28), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(small.numpy().astype(int) - expected).max() <= 1


def test_sizes_and_colours_are_made_equal() -> None:
    def rows() -> Iterator[Record]:
        for at in range(24):
            value = 10 * (at % 12)
            yield Record(np.full((8 + at, 9, 3 if at % 3 == 0 else 1), value, np.uint8), at % 12)

    dataset = write_dataset("mixed", rows(), class_names=[str(at) for at in range(12)], shard_rows=5)
    with pytest.raises(UserError, match="differ in size"):
        prepare(DataSpec(name="mixed"), seed=0)
    data = prepare(DataSpec(name="mixed", image_size=(6, 5)), seed=0)
    assert fold_count(dataset, "identity") == 3
    assert data.evaluation.images.shape == (8, 3, 6, 5)
    for image, label in zip(data.evaluation.images[:], data.evaluation.label.tolist(), strict=True):
        assert image.unique().tolist() == [10 * label]


def test_extra_columns_travel_with_their_images() -> None:
    rows = [
        Record(np.full((8, 8, 1), at, np.uint8), at // 4, {"quality": at / 40, "caption": "text stays in the store"})
        for at in range(40)
    ]
    names = [str(at) for at in range(10)]
    write_dataset("rich", rows, class_names=names, columns={"quality": "float32", "caption": "string"}, shard_rows=7)
    data = prepare(DataSpec(name="rich"), seed=0)
    for side in (data.train, data.evaluation):
        assert set(side.fields) == {"quality"}
        torch.testing.assert_close(side.fields["quality"], side.index / 40)
        assert torch.equal(side.images[:][:, 0, 0, 0].long(), side.index)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"name": "tiny"}, "has 3 classes"),
        ({"name": "tiny", "split": "sample"}, "at most 2 images"),
        ({"name": "absent"}, "there is no dataset"),
        ({"name": "small", "image_size": (0, 8)}, "image_size"),
        ({"name": "small", "image_size": (8, 10**6)}, "image_size"),
    ],
)
def test_impossible_splits_are_refused(make: Make, changes: dict[str, object], complaint: str) -> None:
    make("tiny", classes=3, per_class=2)
    make("small")
    with pytest.raises(UserError, match=complaint):
        prepare(DataSpec().model_copy(update=changes), seed=0)
