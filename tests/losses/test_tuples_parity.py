"""Losses over pairs and tuples beside pytorch-metric-learning and lightly, their deviations asserted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from armillary import losses

pytest.importorskip("pytorch_metric_learning")
from pytorch_metric_learning import (
    distances,
    miners,
    reducers,
    regularizers,
)
from pytorch_metric_learning import losses as theirs

pytestmark = pytest.mark.parity
SIZE, DIM = 20, 6


@pytest.fixture
def embeddings() -> Tensor:
    return torch.randn(SIZE, DIM, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.fixture
def labels() -> Tensor:
    return torch.arange(SIZE) % 5


def step(loss: Any, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    leaf = embeddings.clone().requires_grad_()
    value = loss(leaf, labels)
    value.backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def agree(ours: Any, other: Any, embeddings: Tensor, labels: Tensor) -> None:
    """Equal values and gradients, to 1e-6."""
    mine = step(ours, embeddings, labels)
    assert mine[1].abs().max() > 1e-4
    torch.testing.assert_close(mine, step(other, embeddings, labels), rtol=1e-6, atol=1e-8)


def test_contrastive_has_another_hinge(embeddings: Tensor, labels: Tensor) -> None:
    """Theirs is of the first power, of unit vectors, averaged over the active pairs of each kind."""
    other = theirs.ContrastiveLoss(pos_margin=0, neg_margin=1.25)
    value = float(other(embeddings, labels))
    units = torch.nn.functional.normalize(embeddings)
    distance = torch.cdist(units, units)
    same, others = labels[:, None] == labels[None, :], ~torch.eye(SIZE, dtype=torch.bool)
    near, far = distance[same & others], (1.25 - distance[~same]).clamp_min(0)
    assert value == pytest.approx(float(near.mean() + far[far > 0].mean()))
    ours = losses.Contrastive(1.25, normalize=True, reduction="mean_active")(embeddings, labels)
    assert float(ours) == pytest.approx(float(near.square().mean() + far[far > 0].square().mean()) / 2)


@pytest.mark.parametrize("normalize", [False, True])
def test_lifted_structure(embeddings: Tensor, labels: Tensor, normalize: bool) -> None:
    """Theirs normalises unless told otherwise, and averages over the pairs with a loss."""
    distance = distances.LpDistance(normalize_embeddings=normalize)
    other = theirs.LiftedStructureLoss(neg_margin=1, pos_margin=0, distance=distance)
    agree(losses.LiftedStructure(normalize=normalize, reduction="mean_active"), other, embeddings, labels)


def test_n_pair(embeddings: Tensor) -> None:
    """Theirs normalises unless told otherwise; a pair's norms are averaged, ours are added."""
    pairs = torch.arange(SIZE) // 2
    distance = distances.DotProductSimilarity(normalize_embeddings=False)
    agree(losses.NPair(l2_reg=0.0), theirs.NPairsLoss(distance=distance), embeddings, pairs)
    regularizer = regularizers.LpRegularizer(power=2)
    other = theirs.NPairsLoss(distance=distance, embedding_regularizer=regularizer, embedding_reg_weight=0.02)
    agree(losses.NPair(l2_reg=0.01), other, embeddings, pairs)


def test_multi_similarity(embeddings: Tensor, labels: Tensor) -> None:
    """With their default reducer the anchors without a loss do not dilute the mean."""
    other, miner = theirs.MultiSimilarityLoss(), miners.MultiSimilarityMiner(0.1)
    agree(losses.MultiSimilarity(mining="all"), other, embeddings, labels)
    mean = theirs.MultiSimilarityLoss(reducer=reducers.MeanReducer())
    agree(losses.MultiSimilarity(), lambda given, keys: mean(given, keys, miner(given, keys)), embeddings, labels)


def test_multi_similarity_counts_an_anchor_without_negatives_in_theirs(embeddings: Tensor) -> None:
    """Unmined, theirs charges the positives of a batch of one class; ours has nothing to tell them from."""
    one = torch.zeros(SIZE, dtype=torch.long)
    assert float(theirs.MultiSimilarityLoss()(embeddings, one)) > 0
    assert float(losses.MultiSimilarity(mining="all")(embeddings, one)) == 0


def test_circle(embeddings: Tensor, labels: Tensor) -> None:
    agree(losses.Circle(0.4, 80.0), theirs.CircleLoss(0.4, 80), embeddings, labels)
    labels[-1] = 99  # an anchor without a positive is left out on both sides
    agree(losses.Circle(0.25, 16.0), theirs.CircleLoss(0.25, 16), embeddings, labels)


def test_semi_hard_is_not_their_miner(embeddings: Tensor, labels: Tensor) -> None:
    """Theirs keeps every negative inside the margin; ours one for each pair, the nearest of those farther."""
    miner = miners.TripletMarginMiner(0.4, "semihard", distance=distances.LpDistance(power=2))
    metrics: dict[str, Tensor] = {}
    losses.Triplet(0.4)(embeddings, labels, metrics=metrics)
    assert float(metrics["triplets"]) == SIZE * 3
    assert len(miner(embeddings, labels)[0]) != SIZE * 3


def test_nt_xent_of_lightly(embeddings: Tensor) -> None:
    loss = pytest.importorskip("lightly.loss").NTXentLoss(temperature=0.5)
    agree(
        lambda given, _: losses.NTXent(0.5)(*given.chunk(2)),
        lambda given, _: loss(*given.chunk(2)),
        embeddings,
        torch.zeros(SIZE),
    )
