"""The logistic loss over pairs: the worked number, a slow reference, its limits."""

from __future__ import annotations

import math

import pytest
import torch

from armillary.losses.logistic_pairs import LogisticPairs


def logistic(value: float) -> float:
    return math.log(1 + math.exp(-value))


def test_worked_number() -> None:
    assert logistic(0.7) + logistic(0.1) == pytest.approx(1.04758271)
    # Three unit vectors: cos(0, 1) = 0.7, cos to the third -0.1 and -0.1.
    gram = torch.tensor([[1, 0.7, -0.1], [0.7, 1, -0.1], [-0.1, -0.1, 1]], dtype=torch.float64)
    vectors = torch.linalg.cholesky(gram)
    assert float(LogisticPairs()(vectors, torch.tensor([0, 0, 1]))) == pytest.approx(1.04758271, abs=1e-8)


def test_against_loops() -> None:
    draw = torch.Generator().manual_seed(0)
    vectors = torch.randn(9, 5, generator=draw, dtype=torch.float64)
    labels = torch.arange(9) % 3
    positive: list[float] = []
    negative: list[float] = []
    for i in range(9):
        for j in range(9):
            cosine = float(vectors[i] @ vectors[j] / vectors[i].norm() / vectors[j].norm()) / 0.3
            if i != j:
                (positive if labels[i] == labels[j] else negative).append(cosine)
    expected = sum(map(logistic, positive)) / len(positive)
    expected += sum(logistic(-cosine) for cosine in negative) / len(negative)
    assert float(LogisticPairs(0.3)(3 * vectors, labels)) == pytest.approx(expected, rel=1e-12)


def test_no_temperature() -> None:
    with pytest.raises(ValueError, match="temperature must be above 0, found 0"):
        LogisticPairs(0)
