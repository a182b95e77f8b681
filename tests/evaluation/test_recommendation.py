"""The protocol ``recommendation``: by hand, by loops, and with nothing to tell items apart."""

from __future__ import annotations

import math

import numpy as np
import pytest

from armillary.evaluation import protocols
from armillary.evaluation.result import Interactions
from armillary.spec.errors import UserError


def judged(given: Interactions) -> dict[str, float]:
    return protocols.evaluate("recommendation", np.eye(2), np.arange(2), interactions=given).metrics


def test_training_items_are_left_out() -> None:
    scores = np.linspace(1, 0, 30)
    users, items = np.ones((1, 1)), scores[:, None]
    train = np.stack([np.zeros(9, int), np.arange(9)])
    held_out = np.array([[0, 0], [9, 25]])
    found = judged(Interactions(users, items, train, held_out))
    assert found["recommendation/recall_at_10"] == 0.5
    assert found["recommendation/recall_at_20"] == 1.0
    best = 1 + 1 / math.log2(3)
    assert found["recommendation/ndcg_at_10"] == pytest.approx(1 / best)
    assert found["recommendation/ndcg_at_20"] == pytest.approx((1 + 1 / math.log2(18)) / best)


def test_against_loops() -> None:
    draw = np.random.default_rng(0)
    users, items = draw.standard_normal((12, 4)), draw.standard_normal((40, 4))
    pairs = np.array([[user, item] for user in range(12) for item in draw.permutation(40)[:9]]).T
    held = np.arange(pairs.shape[1]) % 9 < 3
    recalls, gains = [], []
    for user in range(11, -1, -1):
        mine = {int(item) for owner, item in pairs[:, held].T if owner == user}
        known = {int(item) for owner, item in pairs[:, ~held].T if owner == user}
        ranked = sorted(set(range(40)) - known, key=lambda item: -float(users[user] @ items[item]))[:10]
        recalls.append(len(mine & set(ranked)) / len(mine))
        gain = sum(1 / math.log2(place + 2) for place, item in enumerate(ranked) if item in mine)
        gains.append(gain / sum(1 / math.log2(place + 2) for place in range(len(mine))))
    found = judged(Interactions(users, items, pairs[:, ~held], pairs[:, held]))
    assert found["recommendation/recall_at_10"] == pytest.approx(np.mean(recalls))
    assert found["recommendation/ndcg_at_10"] == pytest.approx(np.mean(gains))


def test_equal_scores_find_nothing() -> None:
    none = np.zeros((2, 0), int)
    found = judged(Interactions(np.ones((2, 3)), np.ones((50, 3)), none, np.array([[0, 1], [0, 1]])))
    assert set(found.values()) == {0.0}


def test_what_was_trained_on_is_not_looked_for() -> None:
    pairs = np.array([[0], [1]])
    with pytest.raises(UserError, match="no user has a held-out item"):
        judged(Interactions(np.ones((1, 2)), np.ones((3, 2)), pairs, pairs))
    with pytest.raises(UserError, match="ranks items for users"):
        protocols.evaluate("recommendation", np.eye(3), np.arange(3))
