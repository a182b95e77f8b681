"""Worked numbers of the catalog that belong to sums of losses, to single anchors and to procedures."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from armillary import losses
from armillary.components.sinkhorn import sinkhorn
from armillary.evaluation.clustering import agreement
from armillary.testing.references import assert_value

A = [[0.5, -1.2, 0.3], [1.0, 0.4, -0.7], [-0.8, 0.9, 0.1], [0.2, -0.5, 1.1]]
B = [[0.6, -1.0, 0.1], [0.8, 0.6, -0.9], [-0.7, 1.1, -0.2], [0.0, -0.4, 1.3]]


def double(rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def around_one_anchor(positive: list[float], negative: list[float]) -> tuple[Tensor, Tensor]:
    """Unit vectors whose cosines to the first are the given ones, each with an axis of its own; and labels."""
    cosines = double([*positive, *negative])
    rest = torch.diag((1 - cosines**2).sqrt())
    anchor = torch.nn.functional.one_hot(torch.tensor([0]), 1 + len(cosines)).double()
    embeddings = torch.cat([anchor, torch.cat([cosines[:, None], rest], dim=1)])
    return embeddings, torch.tensor([0] * (1 + len(positive)) + [1] * len(negative))


@pytest.mark.parametrize(
    ("positive", "negative", "expected"),
    [([0.8, 0.6], [0.3, 0.1, -0.2], 8.04646103), ([0.5, 0.6], [0.45, 0.1, -0.4], 20.96327906)],
)
def test_circle_of_one_anchor(positive: list[float], negative: list[float], expected: float) -> None:
    embeddings, labels = around_one_anchor(positive, negative)
    assert_value(losses.Circle(0.25, 64.0, reduction="none")(embeddings, labels)[0], expected)


def test_information_of_two_views() -> None:
    """InfoMin's bound, log K - L with K candidates."""
    loss = losses.InfoNCE(temperature=0.1)(double(A), double(B))
    assert_value(loss, 0.00400922)
    assert_value(math.log(4) - loss, 1.38228514)


def test_agreement_of_pairs() -> None:
    found = agreement(np.array([0, 0, 0, 1, 1, 1]), np.array([0, 0, 1, 1, 1, 1]))
    values = [found[f"pairwise_{name}"] for name in ("precision", "recall", "f1")]
    assert values == pytest.approx([0.57142857, 0.66666667, 0.61538462], abs=5e-9)


def test_sinkhorn_in_the_end() -> None:
    scores = double([[0.9, 0.1, -0.2], [0.8, 0.3, 0.0], [0.7, -0.1, 0.4], [0.2, 0.6, 0.5]])
    expected = [
        [0.99511789, 0.00483847, 4.363e-05],
        [0.33565554, 0.65840691, 0.00593755],
        [0.0025599, 1.245e-05, 0.99742765],
        [1.0e-08, 0.6700755, 0.32992449],
    ]
    torch.testing.assert_close(sinkhorn(scores, 0.05, 100), double(expected), rtol=0, atol=6e-9)
