"""Parity with pytorch-metric-learning, its known deviations asserted."""

from __future__ import annotations

from math import degrees
from typing import Any

import pytest
import torch
from torch import Tensor

from armillary import losses

pml = pytest.importorskip("pytorch_metric_learning")
from pytorch_metric_learning import distances, miners, reducers  # noqa: E402
from pytorch_metric_learning import losses as theirs  # noqa: E402

pytestmark = pytest.mark.parity
SIZE, DIM, CLASSES = 16, 6, 4


@pytest.fixture
def embeddings() -> Tensor:
    return torch.randn(SIZE, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def labels() -> Tensor:
    return torch.arange(SIZE) % CLASSES


def agree(ours: Any, other: Any, embeddings: Tensor, labels: Tensor) -> None:
    """Equal values and gradients of the embeddings, and of class rows."""
    mine, yours = embeddings.clone().requires_grad_(), embeddings.clone().requires_grad_()
    ours(mine, labels).backward()
    other(yours, labels).backward()
    assert mine.grad is not None
    assert mine.grad.abs().max() > 1e-6
    torch.testing.assert_close(ours(mine, labels), other(yours, labels))
    torch.testing.assert_close(mine.grad, yours.grad, rtol=1e-6, atol=1e-8)
    if isinstance(ours, losses.ClassHeadLoss):
        torch.testing.assert_close(ours.weight.grad, other.W.grad.T, rtol=1e-6, atol=1e-8)


def same_head(ours: losses.ClassHeadLoss, other: Any) -> None:
    """Their weight is (dim, classes)."""
    with torch.no_grad():
        other.W.copy_(ours.weight.T)


def test_arcface_margin_in_degrees(embeddings: Tensor, labels: Tensor) -> None:
    ours = losses.ArcFace(CLASSES, DIM, margin=0.5, scale=16.0).double()
    other = theirs.ArcFaceLoss(CLASSES, DIM, margin=degrees(0.5), scale=16).double()
    same_head(ours, other)
    agree(ours, other, embeddings, labels)
    # Their default is 28.6 degrees: not 0.5.
    assert theirs.ArcFaceLoss(CLASSES, DIM).margin == pytest.approx(0.49916417)


def test_arcface_extension(embeddings: Tensor, labels: Tensor) -> None:
    ours = losses.ArcFace(CLASSES, DIM, margin=1.2, scale=16.0).double()
    other = theirs.ArcFaceLoss(CLASSES, DIM, margin=degrees(1.2), scale=16).double()
    same_head(ours, other)
    opposite = embeddings - 4 * ours.weight.detach()[labels]
    assert (ours.similarity(opposite).gather(1, labels[:, None]) < -torch.tensor(1.2).cos()).any()
    agree(ours, other, opposite, labels)


def test_cosface(embeddings: Tensor, labels: Tensor) -> None:
    ours, other = losses.CosFace(CLASSES, DIM).double(), theirs.CosFaceLoss(CLASSES, DIM).double()
    assert (other.margin, other.scale) == (ours.margin, ours.scale) == (0.35, 64)
    same_head(ours, other)
    agree(ours, other, embeddings, labels)


def test_normalized_softmax(embeddings: Tensor, labels: Tensor) -> None:
    """Their temperature of 0.05 is a fixed scale of 20."""
    ours = losses.NormFace(CLASSES, DIM, scale=20.0, learn_scale=False).double()
    other = theirs.NormalizedSoftmaxLoss(CLASSES, DIM).double()
    same_head(ours, other)
    agree(ours, other, embeddings, labels)


def test_supcon(embeddings: Tensor, labels: Tensor) -> None:
    labels[-1] = 99  # an anchor without a positive is left out on both sides
    agree(losses.SupCon(0.1), theirs.SupConLoss(temperature=0.1), embeddings, labels)
    diluted = theirs.SupConLoss(temperature=0.1, reducer=reducers.MeanReducer())(embeddings, labels)
    ours = losses.SupCon(0.1)(embeddings, labels)
    torch.testing.assert_close(diluted, ours * (SIZE - 1) / SIZE)


def test_nt_xent(embeddings: Tensor) -> None:
    pairs = torch.arange(SIZE // 2).repeat(2)

    def ours(stacked: Tensor, _: Tensor) -> Tensor:
        return losses.NTXent(0.5)(*stacked.chunk(2))  # type: ignore[no-any-return]

    agree(ours, theirs.NTXentLoss(temperature=0.5), embeddings, pairs)


def test_nt_xent_with_several_positives_is_not_supcon(embeddings: Tensor, labels: Tensor) -> None:
    """Their denominator then holds one positive at a time."""
    other = theirs.NTXentLoss(temperature=0.5)(embeddings, labels)
    assert abs(float(other) - float(losses.SupCon(0.5)(embeddings, labels))) > 1e-3


@pytest.mark.parametrize(
    ("reduction", "reducer"),
    [("mean_active", reducers.AvgNonZeroReducer), ("mean_all", reducers.MeanReducer)],
)
@pytest.mark.parametrize("power", [1, 2])
def test_triplet(embeddings: Tensor, labels: Tensor, reduction: str, reducer: Any, power: int) -> None:
    other = theirs.TripletMarginLoss(0.2, distance=distances.LpDistance(power=power), reducer=reducer())
    agree(losses.Triplet(0.2, "all", power == 2, reduction=reduction), other, embeddings, labels)


def test_batch_hard(embeddings: Tensor, labels: Tensor) -> None:
    miner, other = miners.BatchHardMiner(), theirs.TripletMarginLoss(0.5, reducer=reducers.MeanReducer())
    ours = losses.Triplet(0.5, "batch_hard", squared=False, reduction="mean_all")
    agree(ours, lambda given, keys: other(given, keys, miner(given, keys)), embeddings, labels)


def test_smooth_triplet_has_the_margin_inside(embeddings: Tensor, labels: Tensor) -> None:
    other = theirs.TripletMarginLoss(0.0, smooth_loss=True, reducer=reducers.MeanReducer())
    ours = losses.Triplet(0.2, "all", squared=False, soft=True, reduction="mean_all")
    agree(ours, other, embeddings, labels)
    with_margin = theirs.TripletMarginLoss(0.2, smooth_loss=True, reducer=reducers.MeanReducer())(embeddings, labels)
    assert float(with_margin) > float(ours(embeddings, labels)) + 0.05
