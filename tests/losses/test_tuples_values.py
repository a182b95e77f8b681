"""Losses over pairs and tuples: the catalog's reference values, and slow references over Python floats."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from math import exp, log, sqrt
from typing import Any

import pytest
import torch
from references import Vector, cosine, dot, unit
from torch import Tensor, nn

from armillary import losses
from armillary.losses.cross_view import feature_consistence, identity_consistence
from armillary.testing.references import assert_value

RAW = [[1.0, 0.2, -0.3], [0.8, 0.5, 0.1], [-0.4, 1.0, 0.6], [-0.2, 0.9, -0.5], [0.3, -0.7, 1.0], [0.1, -0.9, 0.4]]
KEYS = [0, 0, 1, 1, 2, 2]
HIGH = [[0.9, 0.1, -0.2], [-0.3, 0.8, 0.4], [0.2, -0.6, 0.7], [-0.7, -0.2, -0.5]]
LOW = [[0.5, 0.6, -0.3], [0.2, 0.7, -0.4], [-0.3, -0.5, 0.6], [-0.6, 0.3, -0.2]]
PLANE = [[1.0, 0.2], [0.8, 0.5], [1.2, -0.1], [-0.4, 1.0], [-0.2, 0.7], [0.3, -0.7], [0.1, -0.9], [0.6, -0.8]]
PLANE_KEYS = [0, 0, 0, 1, 1, 2, 2, 2]


def double(rows: list[Vector]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64, requires_grad=True)


CATALOG: list[tuple[nn.Module, float]] = [
    (losses.Contrastive(1.5, reduction="sum"), 1.04106723),
    (losses.Contrastive(1.5), 0.06940448),
    (losses.Contrastive(1.25, normalize=True, reduction="sum"), 0.75972854),
    (losses.Contrastive(1.25, normalize=True), 0.05064857),
    (losses.Triplet(0.9, "all", reduction="sum"), 0.67070451),
    (losses.Triplet(0.9, "all", reduction="mean_all"), 0.02794602),
    (losses.Triplet(0.9, "all", reduction="mean_active"), 0.22356817),
    (losses.Triplet(0.5, "batch_hard", squared=False, reduction="mean_all"), 0.07580725),
    (losses.Triplet(0.5, "batch_hard", squared=False, soft=True, reduction="mean_all"), 0.42737586),
    (losses.Triplet(0.9, "semi_hard", reduction="mean_all"), 0.09821159),
    (losses.LiftedStructure(), 2.40335819),
    (losses.LiftedStructure(normalize=True), 2.48952118),
    (losses.LiftedStructure(formulation="survey"), 1.29988777),
    (losses.NPair(l2_reg=0.0), 0.53630397),
    (losses.NPair(l2_reg=0.02), 0.58437064),
    (losses.MultiSimilarity(mining="all"), 0.24406438),
    (losses.MultiSimilarity(epsilon=0.6), 0.1112662),
    (losses.MultiSimilarity(epsilon=0.1), 0.0),
    (losses.Circle(0.25, 4.0, "whole_batch"), 3.7104709),
    (losses.Circle(0.4, 8.0), 0.89438592),
]


@pytest.mark.parametrize(("loss", "expected"), CATALOG, ids=lambda item: repr(item))
def test_catalog_value(loss: nn.Module, expected: float) -> None:
    assert_value(loss(double(RAW), torch.tensor(KEYS)), expected)


@pytest.mark.parametrize(
    ("loss", "row", "expected"),
    [
        (losses.Contrastive(1.5, reduction="sum"), 2, [-0.10767531, 0.06153138, 1.06153138]),
        (losses.LiftedStructure(), 0, [-0.22910446, -0.41217922, -0.27690916]),
        (losses.Circle(0.25, 4.0, "whole_batch"), 0, [-0.02232194, -0.0738895, -0.12366614]),
    ],
)
def test_catalog_gradient(loss: nn.Module, row: int, expected: Vector) -> None:
    embeddings = double(RAW)
    loss(embeddings, torch.tensor(KEYS)).backward()
    assert embeddings.grad is not None
    assert_value(embeddings.grad[row], expected)


def test_values_of_single_anchors_and_pairs() -> None:
    embeddings, labels = double(RAW), torch.tensor(KEYS)
    circle = losses.Circle(0.4, 8.0, reduction="none")(embeddings, labels)
    assert_value(circle, [0.40177636, 0.47023296, 1.56783092, 1.72675385, 0.49008928, 0.70963215])
    hard = losses.Triplet(0.5, "batch_hard", squared=False, reduction="none")(embeddings, labels)
    assert_value(hard, [0, 0, 0.21297419, 0.24186931, 0, 0])
    metrics: dict[str, Tensor] = {}
    losses.Contrastive(1.5)(embeddings, labels, metrics=metrics)
    assert {name: float(metrics[name]) for name in ("pairs", "active", "active_negatives", "empty")} == {
        "pairs": 15,
        "active": 6,
        "active_negatives": 3,
        "empty": 0,
    }


@pytest.mark.parametrize(
    ("squared", "loss", "intra", "inter"),
    [(True, 1.019, 0.48244444, 1.55555556), (False, 1.51490384, 1.2316581, 1.79814957)],
)
def test_range_loss_of_the_catalog(squared: bool, loss: float, intra: float, inter: float) -> None:
    embeddings, metrics = double(PLANE), dict[str, Tensor]()
    value = losses.RangeLoss(2, 3.0, 0.5, 0.5, squared)(embeddings, torch.tensor(PLANE_KEYS), metrics=metrics)
    assert_value(value, loss)
    assert_value(metrics["intra"], intra)
    assert_value(metrics["inter"], inter)
    value.backward()
    assert embeddings.grad is not None
    if squared:
        assert_value(embeddings.grad[0], [-0.47822222, 0.05066667])


def test_range_loss_of_the_survey() -> None:
    rows = list(zip(PLANE, PLANE_KEYS, strict=True))
    apart = [
        (sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True))), j == k) for (a, j), (b, k) in combinations(rows, 2)
    ]
    expected = max(d for d, same in apart if same) - min(d for d, same in apart if not same) + 3.0
    value = losses.RangeLoss(margin=3.0, formulation="survey")(double(PLANE), torch.tensor(PLANE_KEYS))
    assert float(value.detach()) == pytest.approx(expected)


def test_cross_version_triplets() -> None:
    both, images = torch.cat([double(HIGH), double(LOW)]), torch.arange(4).repeat(2)
    assert_value(losses.CrossVersionTriplet(1.0)(both, images), 0.72582012)
    rows = losses.CrossVersionTriplet(1.0, reduction="none")(both, images)
    expected = [0.69374738, 1.08098637, 0.14095924, 0.26946553, 1.18624369, 1.48701739, 0.17735304, 0.77078835]
    assert_value(rows, expected)


def test_consistence_terms() -> None:
    labels, everyone = torch.tensor([0, 0, 1, 1]), torch.ones(4, dtype=torch.bool)
    assert_value(feature_consistence(double(HIGH), double(LOW)), 0.31280969)
    assert_value(identity_consistence(double(HIGH), labels, everyone), 0.68817374)
    # An identity's only profile is its own mean: it counts for nothing.
    one_missing = torch.tensor([True, True, True, False])
    alone = identity_consistence(double(HIGH), labels, one_missing)
    torch.testing.assert_close(alone, identity_consistence(double(HIGH[:2]), labels[:2], everyone[:2]))


@pytest.mark.parametrize("similar_is", [0, 1])
def test_pairs_in_both_label_conventions(similar_is: int) -> None:
    distances, same = [0.4, 0.9, 1.3], torch.tensor([1, 0, 0])
    left = double([[d, 0.0] for d in distances])
    labels = same if similar_is == 1 else 1 - same
    loss = losses.ContrastivePairs(1.0, similar_is)(left, torch.zeros(3, 2, dtype=torch.float64), labels)
    assert_value(loss, 0.02833333)
    with pytest.raises(ValueError, match="0 or 1, found 2"):
        losses.ContrastivePairs(1.0)(left, left, labels + 1)


# Slow references.


def distance(a: Vector, b: Vector) -> float:
    return sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))


def contrastive(rows: list[Vector], labels: list[int], margin: float) -> float:
    total = 0.0
    for i, j in combinations(range(len(rows)), 2):
        d = distance(rows[i], rows[j])
        total += d * d / 2 if labels[i] == labels[j] else max(0.0, margin - d) ** 2 / 2
    return total / (len(rows) * (len(rows) - 1) / 2)


def lifted(rows: list[Vector], labels: list[int], alpha: float) -> float:
    def negatives(i: int) -> float:
        return sum(
            exp(alpha - distance(rows[i], row)) for row, key in zip(rows, labels, strict=True) if key != labels[i]
        )

    pairs = [(i, j) for i, j in combinations(range(len(rows)), 2) if labels[i] == labels[j]]
    terms = [log(negatives(i) + negatives(j)) + distance(rows[i], rows[j]) for i, j in pairs]
    return sum(max(0.0, term) ** 2 for term in terms) / (2 * len(pairs))


def multi_similarity(rows: list[Vector], labels: list[int], epsilon: float) -> float:
    total = 0.0
    for i, anchor in enumerate(rows):
        near = [cosine(anchor, row) for j, row in enumerate(rows) if labels[j] == labels[i] and j != i]
        far = [cosine(anchor, row) for j, row in enumerate(rows) if labels[j] != labels[i]]
        if not near or not far:
            continue
        kept_near = [s for s in near if s < max(far) + epsilon]
        kept_far = [s for s in far if s > min(near) - epsilon]
        total += log(1 + sum(exp(-2 * (s - 0.5)) for s in kept_near)) / 2
        total += log(1 + sum(exp(10 * (s - 0.5)) for s in kept_far)) / 10
    return total / len(rows)


def circle(rows: list[Vector], labels: list[int], m: float, gamma: float) -> float:
    values = []
    for i, anchor in enumerate(rows):
        near = [cosine(anchor, row) for j, row in enumerate(rows) if labels[j] == labels[i] and j != i]
        far = [cosine(anchor, row) for j, row in enumerate(rows) if labels[j] != labels[i]]
        if near and far:
            pull = sum(exp(-gamma * max(0.0, 1 + m - s) * (s - 1 + m)) for s in near)
            push = sum(exp(gamma * max(0.0, s + m) * (s - m)) for s in far)
            values.append(log(1 + pull * push))
    return sum(values) / len(values)


def n_pair(rows: list[Vector], labels: list[int], l2_reg: float) -> float:
    pairs = [[i for i, key in enumerate(labels) if key == label][:2] for label in sorted(set(labels))]
    chosen = [(rows[pair[0]], rows[pair[1]]) for pair in pairs if len(pair) == 2]
    total = 0.0
    for i, (anchor, positive) in enumerate(chosen):
        own = dot(anchor, positive)
        total += log(1 + sum(exp(dot(anchor, other) - own) for j, (_, other) in enumerate(chosen) if j != i))
        total += l2_reg * (dot(anchor, anchor) + dot(positive, positive))
    return total / len(chosen)


REFERENCES: list[tuple[nn.Module, Callable[..., float], tuple[Any, ...]]] = [
    (losses.Contrastive(2.0), contrastive, (2.0,)),
    (losses.LiftedStructure(0.7), lifted, (0.7,)),
    (losses.MultiSimilarity(2.0, 10.0, 0.5, 0.2), multi_similarity, (0.2,)),
    (losses.Circle(0.3, 6.0), circle, (0.3, 6.0)),
    (losses.NPair(0.01), n_pair, (0.01,)),
]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("loss", "reference", "options"), REFERENCES, ids=lambda item: getattr(item, "__name__", ""))
def test_slow_reference(loss: nn.Module, reference: Callable[..., float], options: tuple[Any, ...], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(11, 4, generator=draw, dtype=torch.float64)
    labels = [0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 4]  # two classes of one
    expected = reference(embeddings.tolist(), labels, *options)
    assert float(loss(embeddings, torch.tensor(labels))) == pytest.approx(expected, rel=1e-9)


def test_slow_reference_of_squared_cosine_triplets() -> None:
    value = losses.Triplet(0.9, "all", reduction="sum", similarity="cosine")(double(RAW), torch.tensor(KEYS))
    units, total = [unit(row) for row in RAW], 0.0
    for a in range(6):
        for p in (j for j in range(6) if KEYS[j] == KEYS[a] and j != a):
            for n in (j for j in range(6) if KEYS[j] != KEYS[a]):
                near, far = 1 - dot(units[a], units[p]), 1 - dot(units[a], units[n])
                total += max(0.0, near**2 - far**2 + 0.9)
    assert float(value.detach()) == pytest.approx(total)
