"""Every loss and option against its slow reference on random inputs, in float64."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import references
import torch
from torch import Tensor

from armillary import losses

SIZE, DIM, CLASSES = 10, 5, 4


def _inputs(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(SIZE, DIM, generator=draw, dtype=torch.float64)
    weight = torch.randn(CLASSES, DIM, generator=draw, dtype=torch.float64)
    labels = torch.randint(CLASSES, (SIZE,), generator=draw)
    # One sample opposite to its class, one on it: the branches that random vectors rarely reach.
    embeddings[0] = -2 * weight[labels[0]] + 0.05 * embeddings[0]
    embeddings[1] = 3 * weight[labels[1]] + 0.05 * embeddings[1]
    return embeddings, weight, labels


HEADS: list[tuple[str, dict[str, Any]]] = [
    ("Softmax", {}),
    ("Softmax", {"bias": False}),
    ("NormFace", {"scale": 7.0, "learn_scale": False}),
    ("NormFace", {"scale": 7.0, "learn_scale": True}),
    ("CosFace", {"margin": 0.35, "scale": 9.0}),
    *(
        ("ArcFace", {"margin": margin, "scale": 9.0, "easy_margin": easy, "extension": extension})
        for margin, easy, extension in product((0.0, 0.3, 1.2), (False, True), (False, True))
    ),
]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("name", "options"), HEADS, ids=str)
def test_class_heads(name: str, options: dict[str, Any], seed: int) -> None:
    embeddings, weight, labels = _inputs(seed)
    loss = getattr(losses, name)(CLASSES, DIM, **options, reduction="none").double()
    with torch.no_grad():
        loss.weight.copy_(weight)
        if name == "Softmax" and loss.bias is not None:
            loss.bias.copy_(weight[:, 0])
    known = {key: value for key, value in options.items() if key not in ("learn_scale", "bias")}
    if name == "Softmax" and options.get("bias", True):
        known["bias"] = weight[:, 0].tolist()
    reference = getattr(references, name.lower())
    expected = [
        reference(x.tolist(), weight.tolist(), y, **known) for x, y in zip(embeddings, labels.tolist(), strict=True)
    ]
    torch.testing.assert_close(loss(embeddings, labels), torch.tensor(expected, dtype=torch.float64))
    loss.reduction = "mean"
    assert float(loss(embeddings, labels).detach()) == pytest.approx(sum(expected) / SIZE)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("mode", ["out", "in"])
def test_supcon(mode: str, temperature: float) -> None:
    embeddings, _, labels = _inputs(2)
    labels[-1] = 77  # a class of one
    expected = references.supcon(embeddings.tolist(), labels.tolist(), temperature, mode)
    values = losses.SupCon(temperature, mode, reduction="none")(embeddings, labels)
    torch.testing.assert_close(values, torch.tensor([value or 0.0 for value in expected], dtype=torch.float64))
    valid = [value for value in expected if value is not None]
    assert float(losses.SupCon(temperature, mode)(embeddings, labels)) == pytest.approx(sum(valid) / len(valid))


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_nt_xent(temperature: float) -> None:
    (view1, *_), (view2, *_) = _inputs(3), _inputs(4)
    expected = references.nt_xent(view1.tolist(), view2.tolist(), temperature)
    values = losses.NTXent(temperature, reduction="none")(view1, view2)
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64))
    assert float(losses.NTXent(temperature)(view1, view2)) == pytest.approx(sum(expected) / len(expected))


@pytest.mark.parametrize("reduction", ["sum", "mean_all", "mean_active", "none"])
@pytest.mark.parametrize("soft", [False, True], ids=["hinge", "soft"])
@pytest.mark.parametrize("squared", [False, True], ids=["plain", "squared"])
@pytest.mark.parametrize("mining", ["all", "semi_hard", "batch_hard", "hard_negative"])
def test_triplet(mining: str, squared: bool, soft: bool, reduction: str) -> None:
    embeddings, _, labels = _inputs(5)
    for margin in (0.0, 0.2, 1.5):
        loss = losses.Triplet(margin, mining, squared, soft, reduction)
        expected = references.triplet(embeddings.tolist(), labels.tolist(), margin, mining, squared, soft, reduction)
        torch.testing.assert_close(loss(embeddings, labels), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("squared", [False, True], ids=["plain", "squared"])
@pytest.mark.parametrize("soft", [False, True], ids=["hinge", "soft"])
def test_gradient_of_all_triplets(soft: bool, squared: bool) -> None:
    """Sorting and cumulative sums give the gradient of the enumerated triplets."""
    embeddings, _, labels = _inputs(6)
    fast, slow = embeddings.clone().requires_grad_(), embeddings.clone().requires_grad_()
    losses.Triplet(0.4, "all", squared, soft, "sum")(fast, labels).backward()
    units = slow / slow.norm(dim=1, keepdim=True)
    total = torch.zeros((), dtype=torch.float64)
    for a, p, n in references.triplets(labels.tolist(), torch.zeros(SIZE, SIZE).tolist(), "all"):
        near, far = ((units[a] - units[other]).square().sum() for other in (p, n))
        difference = near - far if squared else near.sqrt() - far.sqrt()
        total = total + (torch.log1p(difference.exp()) if soft else torch.relu(difference + 0.4))
    total.backward()
    torch.testing.assert_close(fast.grad, slow.grad)
