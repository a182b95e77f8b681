"""A share of the labels: of each class, nested, the same for every seed, and no other image is trained on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from armillary.data.splits import PreparedData, prepare
from armillary.spec.errors import UserError
from armillary.spec.jobs import DataSpec
from armillary.spec.loading import apply_overrides, load_job


def few(share: float, seed: int = 0, **more: object) -> PreparedData:
    return prepare(
        DataSpec.model_validate({"name": "orl", "image_size": (8, 8), "labeled_share": share, **more}), seed=seed
    )


def test_a_share_of_each_class(orl: Path) -> None:
    whole, tenth, third, tiny = few(1.0), few(0.1), few(0.3), few(0.001)
    assert torch.bincount(whole.train.label).tolist() == [10] * 28
    assert torch.bincount(third.train.label).tolist() == [3] * 28
    assert torch.bincount(tenth.train.label).tolist() == torch.bincount(tiny.train.label).tolist() == [1] * 28
    smaller, larger, everything = (set(data.train.index.tolist()) for data in (tenth, third, whole))
    assert smaller < larger < everything
    labels = dict(zip(whole.train.index.tolist(), whole.train.label.tolist(), strict=True))
    assert [labels[index] for index in third.train.index.tolist()] == third.train.label.tolist()
    assert third.evaluation.index.tolist() == whole.evaluation.index.tolist()


def test_the_dataset_decides_not_the_seed(orl: Path) -> None:
    assert few(0.2, seed=1).train.index.tolist() == few(0.2, seed=2).train.index.tolist()


def test_results_from_few_labels_are_not_compared_with_those_from_all(orl: Path) -> None:
    assert len({few(share).fingerprint for share in (1.0, 0.5, 0.1)}) == 3


def test_noise_is_put_on_the_known_labels(orl: Path) -> None:
    clean, noisy = few(0.3), few(0.3, label_noise=0.5)
    assert noisy.train.index.tolist() == clean.train.index.tolist()
    assert int((noisy.train.label != clean.train.label).sum()) == 42


def test_no_labels_at_all_is_refused(armillary_home: Path) -> None:
    job = load_job("quickstart")
    with pytest.raises(UserError, match=r"data.labeled_share"):
        apply_overrides(job, {"data.labeled_share": 0})
