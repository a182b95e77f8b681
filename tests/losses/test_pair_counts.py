"""How many pairs there were, and how many cost something, as losses report them; counted here one by one."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from armillary import losses
from armillary.losses.class_centers import PairVerification
from armillary.losses.range_loss import RangeLoss

# On a line: two of class 0 in one place, one of class 1 near, one of class 2 far, a third of class 0 between.
POINTS, LABELS = torch.tensor([[0.0], [0.0], [0.4], [5.0], [1.0]]), torch.tensor([0, 0, 1, 2, 0])


def counts(found: dict[str, Tensor], *names: str) -> list[float]:
    return [float(found[name]) for name in names]


def test_deepid2_counts_each_pair_once() -> None:
    margin, active = 1.0, 0
    for one, other in combinations(range(len(LABELS)), 2):
        away = float((POINTS[one] - POINTS[other]).abs())
        active += away > 0 if LABELS[one] == LABELS[other] else away < margin
    found: dict[str, Tensor] = {}
    PairVerification("l2", margin, 0)(POINTS, LABELS, metrics=found)
    assert counts(found, "pairs", "active", "empty") == [10, active, 0]
    assert active == 5
    assert float(found["active_share"]) == pytest.approx(0.5)


def test_deepid2_without_an_active_pair_is_empty() -> None:
    found: dict[str, Tensor] = {}
    PairVerification("l2", 1.0, 0)(POINTS[[0, 1, 3]], LABELS[[0, 1, 3]], metrics=found)
    assert counts(found, "pairs", "active", "active_share", "empty") == [3, 0, 0, 1]


def test_range_loss_counts_the_ranges_that_count() -> None:
    """Class 0 has three pairs, of which k count; classes of one sample have none."""
    for k, pairs in ((1, 1), (2, 2), (5, 3)):
        found: dict[str, Tensor] = {}
        RangeLoss(k=k)(POINTS, LABELS, metrics=found)
        assert counts(found, "pairs", "empty") == [pairs, 0]
    found = {}
    RangeLoss(margin=0.3)(POINTS[[2, 3]], LABELS[[2, 3]], metrics=found)
    assert counts(found, "pairs", "inter", "empty") == [0, 0, 1]


def test_supcon_says_when_no_anchor_has_a_positive() -> None:
    rows = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    for labels, anchors, empty in (([0, 1, 2, 3], 0, 1), ([0, 1, 0, 3], 2, 0)):
        found: dict[str, Tensor] = {}
        losses.SupCon()(rows, torch.tensor(labels), metrics=found)
        assert counts(found, "anchors", "empty") == [anchors, empty]
