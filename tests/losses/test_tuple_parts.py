"""Similarity, miner and reduction of losses over tuples combine freely: every combination against plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from armillary import losses
from armillary.losses.miners import MINERS
from armillary.objectives import Objective, registry
from armillary.testing.steps import Case

Vector = list[float]
KEYS = [0, 0, 0, 1, 1, 2, 2, 2, 3]
EPSILON = 0.15
REDUCTIONS = ("mean_active", "mean_all", "sum")


def product_of(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def unit(a: Vector) -> Vector:
    length = math.sqrt(product_of(a, a))
    return [x / length for x in a]


def distance_of(similarity: str, a: Vector, b: Vector) -> float:
    if similarity == "euclidean":
        return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))
    return 1 - product_of(unit(a), unit(b)) if similarity == "cosine" else 1 - product_of(a, b)


@dataclass
class Chosen:
    """The distances, and what a miner chose of each anchor: triplets, positives, negatives."""

    distance: list[Vector]
    triplets: list[list[tuple[int, int]]]
    positives: list[list[int]]
    negatives: list[list[int]]


Related = Callable[[int, int], bool]


def mine(mining: str, distance: list[Vector], same: Related, none: Related) -> Chosen:
    """``same``: is a positive; ``none``: neither positive nor negative."""
    found = Chosen(distance, [], [], [])
    for a, row in enumerate(distance):
        positives = [p for p in range(len(row)) if same(a, p) and not none(a, p)]
        negatives = [n for n in range(len(row)) if not same(a, n) and not none(a, n)]
        if mining == "multi_similarity":
            near = min((row[n] for n in negatives), default=math.inf)
            far = max((row[p] for p in positives), default=-math.inf)
            positives = [p for p in positives if row[p] > near - EPSILON]
            negatives = [n for n in negatives if row[n] < far + EPSILON] if far > -math.inf else []
        every = list(product(positives, negatives))
        if mining in ("hard_negative", "batch_hard"):
            hardest = [(p, min(negatives, key=row.__getitem__)) for p in positives if negatives]
            every = hardest if mining == "hard_negative" else sorted(hardest, key=lambda pair: row[pair[0]])[-1:]
        elif mining == "semi_hard":
            every = []
            for p in positives if negatives else []:
                farther = [n for n in negatives if row[n] > row[p]]
                every.append((p, min(farther, key=row.__getitem__) if farther else max(negatives, key=row.__getitem__)))
        if mining in ("semi_hard", "hard_negative", "batch_hard"):
            positives, negatives = [sorted({pair[side] for pair in every}) for side in (0, 1)]
        found.triplets.append(every)
        found.positives.append(positives)
        found.negatives.append(negatives)
    return found


def log_sum(values: Vector) -> float:
    return math.log(sum(math.exp(value) for value in values)) if values else -math.inf


def softplus(value: float) -> float:
    return math.log1p(math.exp(value)) if value > -math.inf else 0.0


def reduced(values: list[float], reduction: str, ends: int = 1, least: float = 0.0) -> float:
    active = sum(value > least for value in values)
    return sum(values) / {"sum": ends, "mean_all": max(1, len(values)), "mean_active": max(1, active)}[reduction]


def contrastive(found: Chosen, reduction: str) -> float:
    near = [max(0.0, found.distance[a][p]) ** 2 / 2 for a, some in enumerate(found.positives) for p in some]
    pushed = [(a, n) for a, some in enumerate(found.negatives) for n in some]
    far = [max(0.0, 1.1 - max(0.0, found.distance[a][n])) ** 2 / 2 for a, n in pushed]
    if reduction == "mean_active":
        return reduced(near, "mean_all") + reduced(far, reduction)
    return reduced(near + far, reduction, ends=2)


def triplet(found: Chosen, reduction: str) -> float:
    rows = zip(found.distance, found.triplets, strict=True)
    return reduced([max(0.0, row[p] - row[n] + 0.2) for row, some in rows for p, n in some], reduction)


def lifted(found: Chosen, reduction: str) -> float:
    own = [log_sum([0.8 - row[n] for n in some]) for row, some in zip(found.distance, found.negatives, strict=True)]
    values = []
    for i, some in enumerate(found.positives):
        for j in some:
            both = [value for value in (own[i], own[j]) if value > -math.inf]
            if both:
                values.append(max(0.0, log_sum(both) + found.distance[i][j]) ** 2 / 2)
    return reduced(values, reduction, ends=2)


def multi_similarity(found: Chosen, reduction: str) -> float:
    values = []
    for a, row in enumerate(found.distance):
        pull = log_sum([-2.0 * (1 - row[p] - 0.5) for p in found.positives[a]])
        push = log_sum([10.0 * (1 - row[n] - 0.5) for n in found.negatives[a]])
        # KEYS has one class of one sample: it has no positive, and is left out.
        values.append(softplus(pull) / 2 + softplus(push) / 10 if KEYS.count(KEYS[a]) > 1 else 0.0)
    return reduced(values, reduction)


def circle(found: Chosen, reduction: str) -> float:
    values = []
    for a, row in enumerate(found.distance):
        near, far = [1 - row[p] for p in found.positives[a]], [1 - row[n] for n in found.negatives[a]]
        pull = log_sum([-8 * max(0.0, 1.25 - s) * (s - 0.75) for s in near])
        push = log_sum([8 * max(0.0, s + 0.25) * (s - 0.25) for s in far])
        if near and far:
            values.append(softplus(pull + push))
    return reduced(values, reduction)


def range_loss(found: Chosen, reduction: str, centres: Callable[[list[int]], Vector], similarity: str) -> float:
    """k = 3, alpha = 0.5, beta = 2, plain distances, margin 1.5."""
    groups = [[i for i, key in enumerate(KEYS) if key == wanted] for wanted in sorted(set(KEYS))]
    means, values = [centres(group) for group in groups], []
    for group in groups:
        both = [(i, j) for i, j in combinations(group, 2) if j in found.positives[i] or i in found.positives[j]]
        pairs = [found.distance[i][j] for i, j in both]
        widest = sorted(pairs)[-3:]
        if widest:
            values.append(len(widest) / sum(1 / d for d in widest))
    inter = max(0.0, 1.5 - min(distance_of(similarity, a, b) for a, b in combinations(means, 2)))
    return 0.5 * reduced(values, reduction) + 2.0 * inter


def n_pair(rows: list[Vector], mining: str, similarity: str, reduction: str) -> float:
    """Classes with two samples: the first is the anchor."""
    groups = [[i for i, key in enumerate(KEYS) if key == wanted] for wanted in sorted(set(KEYS))]
    pairs = [group[:2] for group in groups if len(group) > 1]
    distance = [[distance_of(similarity, rows[a], rows[p]) for _, p in pairs] for a, _ in pairs]
    found = mine(mining, distance, lambda a, p: a == p, lambda _a, _p: False)
    values = [
        softplus(log_sum([distance[i][i] - distance[i][j] for j in found.negatives[i]]))
        for i in range(len(pairs))
        if found.positives[i]
    ]
    norms = [product_of(rows[a], rows[a]) + product_of(rows[p], rows[p]) for a, p in pairs]
    return reduced(values, reduction, least=1e-3) + 0.01 * sum(norms) / len(norms)


LOSSES: dict[str, tuple[Callable[..., nn.Module], tuple[str, ...], Callable[[Chosen, str], float] | None]] = {
    "contrastive": (lambda **parts: losses.Contrastive(1.1, **parts), ("euclidean", "cosine", "dot"), contrastive),
    "triplet": (lambda **parts: losses.Triplet(0.2, squared=False, **parts), ("euclidean", "cosine"), triplet),
    "lifted": (lambda **parts: losses.LiftedStructure(0.8, **parts), ("euclidean", "cosine", "dot"), lifted),
    "multi_similarity": (
        lambda **parts: losses.MultiSimilarity(2.0, 10.0, 0.5, **parts),
        ("euclidean", "cosine"),
        multi_similarity,
    ),
    "circle": (lambda **parts: losses.Circle(0.25, 8.0, **parts), ("euclidean", "cosine"), circle),
    "range": (
        lambda **parts: losses.RangeLoss(3, 1.5, 0.5, 2.0, squared=False, **parts),
        ("euclidean", "cosine"),
        None,
    ),
    "n_pair": (lambda **parts: losses.NPair(0.01, **parts), ("dot", "cosine", "euclidean"), None),
}
ON_SPHERE = {"triplet", "multi_similarity", "circle"}


def combined() -> Iterator[tuple[str, str, str, str]]:
    for name, (_, similarities, _) in LOSSES.items():
        for similarity, mining, reduction in product(similarities, MINERS, REDUCTIONS):
            yield name, similarity, mining, reduction


def embeddings() -> Tensor:
    draw = torch.Generator().manual_seed(4)
    return 0.8 * torch.randn(len(KEYS), 3, generator=draw, dtype=torch.float64)


def expected(name: str, rows: list[Vector], similarity: str, mining: str, reduction: str) -> float:
    if name == "n_pair":
        return n_pair(rows, mining, similarity, reduction)
    if name in ON_SPHERE or similarity == "cosine":
        rows = [unit(row) for row in rows]
    distance = [[distance_of(similarity, a, b) for b in rows] for a in rows]
    found = mine(mining, distance, lambda a, p: KEYS[a] == KEYS[p], lambda a, p: a == p)
    reference = LOSSES[name][2]
    if reference is not None:
        return reference(found, reduction)

    def centre(group: list[int]) -> Vector:
        return [sum(rows[i][d] for i in group) / len(group) for d in range(len(rows[0]))]

    return range_loss(found, reduction, centre, similarity)


@pytest.mark.parametrize(("name", "similarity", "mining", "reduction"), list(combined()))
def test_slow_reference(name: str, similarity: str, mining: str, reduction: str) -> None:
    make = LOSSES[name][0]
    given, metrics = embeddings().requires_grad_(), dict[str, Tensor]()
    loss = make(similarity=similarity, mining=mining, reduction=reduction, epsilon=EPSILON)
    value = loss(given, torch.tensor(KEYS), metrics=metrics)
    assert float(value.detach()) == pytest.approx(
        expected(name, given.tolist(), similarity, mining, reduction), rel=1e-9, abs=1e-9
    )
    value.backward()
    assert given.grad is not None
    assert torch.isfinite(given.grad).all()


@pytest.mark.parametrize("name", LOSSES)
def test_parts_differ(name: str) -> None:
    """No part is ignored: miners and similarities give numbers of their own."""
    make, similarities, _ = LOSSES[name]

    def value(**parts: Any) -> float:
        loss = make(**{"epsilon": EPSILON, "reduction": "sum", "mining": "all", **parts})
        return round(float(loss(embeddings(), torch.tensor(KEYS))), 9)

    assert len({value(similarity=similarity) for similarity in similarities}) == len(similarities)
    # Semi-hard and hard negatives keep all positives, of which ranges are chosen; of one positive the hardest is it.
    assert len({value(mining=mining) for mining in MINERS}) >= {"range": 2, "n_pair": 4}.get(name, len(MINERS))


# Circle holds its weights constant; see tests/losses/test_tuples_behaviour.py.
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "circle"])
def test_gradient_of_mined(name: str) -> None:
    """What a miner leaves out has no gradient, and what it keeps has the right one."""
    loss = LOSSES[name][0](mining="batch_hard", reduction="mean_all")
    assert torch.autograd.gradcheck(lambda given: loss(given, torch.tensor(KEYS)), (embeddings().requires_grad_(),))


OBJECTIVES = ("contrastive", "triplet", "lifted_structure", "n_pair", "multi_similarity", "circle", "range_loss")


def choices(cls: type[Objective], option: str) -> tuple[str, ...]:
    found: tuple[str, ...] = cls.Hyperparameters.model_fields[option].annotation.__args__  # type: ignore[union-attr]
    return found


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_train_with_every_combination(name: str) -> None:
    """One step each, from the options that a job can give."""
    cls = registry.get(name)
    assert set(choices(cls, "mining")) == set(MINERS)
    assert set(choices(cls, "reduction")) == set(REDUCTIONS)
    parts = ("similarity", "mining", "reduction")
    for values in product(*(choices(cls, part) for part in parts)):
        case = Case(cls, dict(zip(parts, values, strict=True)))
        objective = case.build()
        optimizer = torch.optim.SGD(objective.parameters(), lr=1e-3)
        before = [parameter.detach().clone() for parameter in objective.encoder.parameters()]
        output = objective(case.batch())
        output.loss.backward()
        optimizer.step()
        after = list(objective.encoder.parameters())
        assert torch.isfinite(output.loss), case
        assert all(torch.isfinite(parameter).all() for parameter in after), case
        assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True)), case
        assert 0 <= float(output.metrics["empty"]) <= 1
