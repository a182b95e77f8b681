"""Losses over two processes, on batches whose anchors do not all count, unevenly spread over the workers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from armillary import losses
from armillary.testing.gloo_pool import shared_pool

SIZE, DIM, CLASSES = 12, 4, 9
# The first worker holds most of the singletons: shares of local means would be wrong.
LABELS = [3, 4, 5, 6, 0, 0, 0, 1, 1, 2, 2, 0]

CASES: list[tuple[str, dict[str, Any]]] = [
    *(("SupCon", {"temperature": 0.3, "mode": mode}) for mode in ("out", "in")),
    ("NTXent", {"temperature": 0.3}),
    *(
        ("Triplet", {"margin": 0.5, "mining": mining, "soft": soft, "reduction": reduction})
        for mining in ("all", "semi_hard", "batch_hard", "hard_negative")
        for soft in (False, True)
        for reduction in ("mean_active", "mean_all", "sum")
    ),
    ("Triplet", {"squared": False}),
    *(
        (name, {"similarity": "cosine", "mining": mining, "reduction": "mean_active"})
        for name in ("Contrastive", "LiftedStructure", "NPair", "MultiSimilarity", "Circle", "RangeLoss")
        for mining in ("batch_hard", "multi_similarity")
    ),
    ("ArcFace", {"scale": 8.0}),
    ("NormFace", {}),
    ("Softmax", {}),
]


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    first, second = (torch.randn(SIZE, DIM, generator=draw, dtype=torch.float64) for _ in range(2))
    return first.requires_grad_(), second, torch.tensor(LABELS)


def call(name: str, options: dict[str, Any], rows: slice, metrics: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The loss on some rows of the batch, and the gradient of the batch's embeddings."""
    first, second, labels = inputs()
    kind = getattr(losses, name)
    if issubclass(kind, losses.ClassHeadLoss):
        torch.manual_seed(0)
        loss = kind(CLASSES, DIM, **options).double()(first[rows], labels[rows], metrics=metrics)
    elif name == "NTXent":
        loss = kind(**options)(first[rows], second[rows], metrics=metrics)
    else:
        loss = kind(**options)(first[rows], labels[rows], metrics=metrics)
    loss.backward(torch.ones_like(loss))
    assert first.grad is not None
    return loss.detach(), first.grad


def on_a_worker(name: str, options: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    half, metrics = SIZE // dist.get_world_size(), dict[str, Tensor]()
    loss, gradient = call(name, options, slice(dist.get_rank() * half, (dist.get_rank() + 1) * half), metrics)
    return loss, gradient, metrics


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_mean_over_workers_is_the_whole(name: str, options: dict[str, Any]) -> None:
    metrics: dict[str, Tensor] = {}
    whole, gradient = call(name, options, slice(None), metrics)
    parts = shared_pool().run(on_a_worker, name, options)
    torch.testing.assert_close(sum(part[0] for part in parts) / 2, whole)
    torch.testing.assert_close((parts[0][1] + parts[1][1]) / 2, gradient)
    for key, value in metrics.items():
        torch.testing.assert_close(sum(part[2][key] for part in parts) / 2, value, msg=key)


@pytest.mark.parametrize("name", ["SupCon", "NTXent", "Triplet"])
def test_without_gather_each_worker_is_alone(name: str) -> None:
    parts = shared_pool().run(on_a_worker, name, {"gather": False})
    for rank, (loss, gradient, metrics) in enumerate(parts):
        alone: dict[str, Tensor] = {}
        expected, expected_gradient = call(name, {}, slice(rank * SIZE // 2, (rank + 1) * SIZE // 2), alone)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradient, expected_gradient)
        assert metrics == alone


@pytest.mark.parametrize(
    ("name", "options"), [("SupCon", {}), ("SupCon", {"mode": "in"}), ("Triplet", {"mining": "all"})], ids=str
)
def test_per_sample_values(name: str, options: dict[str, Any]) -> None:
    whole, _ = call(name, {**options, "reduction": "none"}, slice(None), {})
    parts = shared_pool().run(on_a_worker, name, {**options, "reduction": "none"})
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), whole)
