"""Sub-cluster losses of image sets: worked numbers, a slow reference, what must not change them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from armillary.losses.subclusters import SubclusterLoss, set_means

CENTERS = torch.tensor([[0.0, 1.0], [1.0, 0.0], [3.0, 0.0], [2.0, 2.0]], dtype=torch.float64)
CLASSES = torch.tensor([0, 0, 1, 1])


def parts(features: list[list[float]], assigned: list[int], margin: float) -> dict[str, float]:
    metrics: dict[str, Tensor] = {}
    x = torch.tensor(features, dtype=torch.float64)
    SubclusterLoss(margin)(x, torch.tensor(assigned), CENTERS, CLASSES, metrics=metrics)
    return {name: float(value) for name, value in metrics.items()}


def test_worked_numbers() -> None:
    found = parts([[0, 0], [1, 1], [2, 0], [2, 1]], [0, 1, 2, 3], 10.0)
    assert found == pytest.approx({"intra": 0.25, "inter": 1.875, "triplet": 1.625})
    found = parts([[0, 0], [2, 0]], [0, 2], 1.0)
    assert found == pytest.approx({"intra": 0.25, "inter": 0.0, "triplet": 0.0625})


def slow(x: Tensor, assigned: Tensor, centers: Tensor, classes: Tensor, margin: float) -> float:
    """The printed sums, term by term."""
    n, d, kinds = len(x), x.shape[1], classes.tolist()
    real = [m for m, kind in enumerate(kinds) if kind >= 0]

    def apart(a: Tensor, b: Tensor) -> float:
        return float(((a - b) ** 2).sum())

    intra = sum(apart(x[i], centers[assigned[i]]) for i in range(n)) / (2 * n * d)
    triplet = inter = 0.0
    for i in range(n):
        near = apart(x[i], centers[assigned[i]])
        for m in real:
            if kinds[m] != kinds[int(assigned[i])]:
                triplet += max(0.0, margin + near - apart(x[i], centers[m])) / (2 * len(real) * n)
    for kind in set(kinds):
        present = sorted({int(a) for a in assigned if kinds[int(a)] == kind})
        if len(present) < 2:
            continue
        widest = max(apart(centers[a], centers[b]) for a in present for b in present)
        for a in present:
            for m in real:
                if kinds[m] != kind:
                    inter += max(0.0, margin + widest - apart(centers[a], centers[m])) / (2 * len(real) * n)
    return intra + 2 * inter + 3 * triplet


def case(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    centers = torch.randn(12, 4, generator=draw, dtype=torch.float64)
    classes = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, -1, 3, -1, -1])
    assigned = torch.tensor([0, 1, 1, 3, 3, 4, 6, 7, 9, 0])
    return torch.randn(10, 4, generator=draw, dtype=torch.float64), assigned, centers, classes


def test_is_its_equation() -> None:
    found = SubclusterLoss(6.0, inter=2.0, triplet=3.0)(*case())
    assert float(found) == pytest.approx(slow(*case(), 6.0), rel=1e-10)


def test_gradients() -> None:
    x, assigned, centers, classes = case()
    loss = SubclusterLoss(6.0)
    assert torch.autograd.gradcheck(
        lambda a, b: loss(a, assigned, b, classes), (x.requires_grad_(), centers.requires_grad_())
    )


def test_scaling() -> None:
    """Features and centres by k, gamma by k^2: the loss by k^2."""
    x, assigned, centers, classes = case()
    torch.testing.assert_close(
        SubclusterLoss(9 * 6.0)(3 * x, assigned, 3 * centers, classes),
        9 * SubclusterLoss(6.0)(x, assigned, centers, classes),
    )


def test_nothing_to_do() -> None:
    far = 10 * CENTERS * torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
    assigned = torch.tensor([0, 2])
    metrics: dict[str, Tensor] = {}
    SubclusterLoss(1.0)(far[assigned], assigned, far, CLASSES, metrics=metrics)
    assert (float(metrics["intra"]), float(metrics["triplet"])) == (0, 0)
    SubclusterLoss(1e6)(far[:2], torch.tensor([0, 1]), far[:2], CLASSES[:2], metrics=metrics)
    assert (float(metrics["inter"]), float(metrics["triplet"])) == (0, 0)


def test_set_means() -> None:
    x = torch.arange(12, dtype=torch.float64).view(6, 2)
    means, labels = set_means(x, torch.tensor([4, 0, 4, 0, 4, 0]), torch.tensor([1, 1, 2, 1, 1, 1]))
    assert labels.tolist() == [0, 4, 4]
    torch.testing.assert_close(means, torch.stack([x[[1, 3, 5]].mean(0), x[[0, 4]].mean(0), x[2]]))
