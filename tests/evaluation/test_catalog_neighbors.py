"""The weighted vote of neighbours on worked numbers."""

from __future__ import annotations

import numpy as np
import pytest

from armillary.evaluation import neighbors
from armillary.evaluation.result import EvaluationSet

QUERIES = [[0.5, -1.2, 0.3], [1.0, 0.4, -0.7], [-0.8, 0.9, 0.1], [0.2, -0.5, 1.1]]
BANK = [[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [1.0, 0.0, 1.0], [-1.0, 1.0, 0.0], [0.0, -1.0, 1.0]]
BANK_LABELS = [0, 1, 0, 1, 1]
VOTES = [[0.00496691, 0.99503309], [0.99999844, 1.56e-06], [1.55e-06, 0.99999845], [0.07765667, 0.92234333]]


def test_three_neighbours_vote(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[np.ndarray] = []
    votes = neighbors._votes

    def recorded(*arguments: object) -> object:
        seen.append(votes(*arguments))  # type: ignore[arg-type]
        return seen[-1]

    monkeypatch.setattr(neighbors, "NEIGHBORS", {"": 3})
    monkeypatch.setattr(neighbors, "_votes", recorded)
    truth = np.array([1, 0, 1, 1])
    data = EvaluationSet(
        embeddings=np.array(QUERIES),
        labels=truth,
        train_embeddings=np.array(BANK),
        train_labels=np.array(BANK_LABELS),
    )
    assert neighbors.knn(data).metrics["knn/top1"] == 1.0
    weighted = seen[0] / seen[0].sum(axis=1, keepdims=True)
    np.testing.assert_allclose(weighted, VOTES, atol=1e-8)
