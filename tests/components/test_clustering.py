"""k-means and Sinkhorn: against slow code and published numbers, over two workers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from armillary import collectives
from armillary.components.clustering import Clusters, concentrations, hierarchy, kmeans
from armillary.components.sinkhorn import sinkhorn
from armillary.testing.gloo_pool import shared_pool

gloo = pytest.mark.xdist_group("gloo")
SCORES = torch.tensor([[0.9, 0.1, -0.2], [0.8, 0.3, 0.0], [0.7, -0.1, 0.4], [0.2, 0.6, 0.5]], dtype=torch.float64)
Q3 = [
    [0.99950646, 0.00049132, 2.21e-06],
    [0.83388552, 0.16536967, 0.00074481],
    [0.04836942, 2.378e-05, 0.9516068],
    [6.0e-08, 0.80262829, 0.19737165],
]


def blobs(groups: int = 4, each: int = 700) -> Tensor:
    torch.manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(groups, 8), dim=1)
    return torch.nn.functional.normalize(centres.repeat(each, 1) + 0.1 * torch.randn(groups * each, 8), dim=1)


def clustered(points: Tensor, k: int) -> Clusters:
    return kmeans(points, k, seed=3)


def test_blobs_are_found() -> None:
    clusters = clustered(blobs(), 4)
    truth = torch.arange(len(clusters.labels)) % 4
    table = torch.zeros(4, 4).index_put_((clusters.labels, truth), torch.ones(len(truth)), accumulate=True)
    assert table.amax(dim=1).sum() == len(truth)
    assert clusters.sizes.tolist() == [700] * 4


def test_what_kmeans_returns_is_a_fixed_point() -> None:
    points = blobs(each=60)
    clusters = kmeans(points, 9, seed=1, iterations=100)
    away = torch.cdist(points.double(), clusters.centroids.double()).float()
    assert torch.equal(away.argmin(dim=1), clusters.labels)
    torch.testing.assert_close(away.amin(dim=1), clusters.distances, rtol=1e-4, atol=1e-5)
    for number in range(9):
        mean = points[clusters.labels == number].mean(dim=0)
        torch.testing.assert_close(clusters.centroids[number], mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("k", [1, 7, 600])
def test_no_cluster_is_empty(k: int) -> None:
    # Many equal points: k-means++ alone would start several centres at one place.
    points = torch.cat([torch.zeros(400, 3), torch.randn(600, 3, generator=torch.Generator().manual_seed(1))])
    clusters = kmeans(points, k, seed=0)
    assert int(clusters.sizes.sum()) == 1000
    assert int((clusters.sizes > 0).sum()) >= min(k, 590)
    assert clusters.centroids.isfinite().all()


def test_the_seed_decides() -> None:
    points = blobs(each=50)
    first, again, other = (kmeans(points, 12, seed=seed, iterations=2) for seed in (0, 0, 1))
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.centroids, other.centroids)
    with pytest.raises(ValueError, match="200 points cannot form 201 clusters"):
        kmeans(points, 201, seed=0)


@gloo
@pytest.mark.parametrize("k", [4, 40])
def test_two_workers_cluster_as_one_does(k: int) -> None:
    points = blobs()
    single = clustered(points, k)
    for found in shared_pool().run(clustered, points, k):
        assert torch.equal(found.labels, single.labels)
        assert torch.equal(found.centroids, single.centroids)


def test_a_hierarchy_has_parents() -> None:
    levels = hierarchy(blobs(groups=6, each=40), (30, 6, 2), seed=0)
    assert [len(level.centroids) for level in levels] == [30, 6, 2]
    assert [len(level.labels) for level in levels] == [240, 30, 6]
    torch.testing.assert_close(levels[1].prototypes.norm(dim=1), torch.ones(6))
    with pytest.raises(ValueError, match="6 points cannot form 7"):
        hierarchy(blobs(each=40), (6, 7), seed=0)


def test_concentrations_by_hand() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    clusters = Clusters(torch.zeros(3, 2), labels, torch.tensor([0.1, 0.2, 0.3, 0.8, 1.0, 0.0]))
    raw = [0.6 / (3 * math.log(13)), 1.8 / (2 * math.log(12))]
    raw.append(max(raw))  # one point alone
    low, high = torch.quantile(torch.tensor(raw), torch.tensor([0.1, 0.9])).tolist()
    cut = [min(max(value, low), high) for value in raw]
    expected = [0.2 * value / (sum(cut) / 3) for value in cut]
    assert concentrations(clusters, 0.2).tolist() == pytest.approx(expected, rel=1e-5)


def test_sinkhorn_gives_the_published_numbers() -> None:
    shares = sinkhorn(SCORES, 0.05, 3)
    torch.testing.assert_close(shares, torch.tensor(Q3, dtype=torch.float64), rtol=0, atol=6e-9)
    mass = torch.tensor([1.88176147, 0.96851306, 1.14972547], dtype=torch.float64)
    torch.testing.assert_close(shares.sum(dim=0), mass, rtol=0, atol=1e-8)
    torch.testing.assert_close(
        sinkhorn(SCORES, 0.05, 100).sum(dim=0), torch.full((3,), 4 / 3, dtype=torch.float64), rtol=0, atol=1e-7
    )


def test_sinkhorn_against_exponentials() -> None:
    scores = torch.rand(9, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q = (scores / 0.1).exp().T
    q /= q.sum()
    for _ in range(4):
        q /= 5 * q.sum(dim=1, keepdim=True)
        q /= 9 * q.sum(dim=0, keepdim=True)
    torch.testing.assert_close(sinkhorn(scores, 0.1, 4), 9 * q.T)
    torch.testing.assert_close(sinkhorn(scores + 50, 0.1, 4), 9 * q.T)
    torch.testing.assert_close(sinkhorn(scores[3:], 0.1, 4, shared=scores[:3]), 9 * q.T[3:])


def test_sinkhorn_in_float32_at_its_worst() -> None:
    scores = torch.tensor([[1.0, -1.0], [1.0, -1.0], [0.99, -1.0]], requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        shares = sinkhorn(scores.bfloat16(), 0.01, 3)
    assert shares.dtype == torch.float32
    assert not shares.requires_grad
    assert shares.isfinite().all()
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(3))


@pytest.mark.parametrize("epsilon", [0.05, 0.03, 0.005])
def test_sinkhorn_by_exponentials_and_by_logarithms(epsilon: float) -> None:
    """float32 turns to logarithms where float64 still takes exponentials: beyond 43 of score range over epsilon."""
    scores = torch.rand(40, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1
    scores[:, 3] -= 30
    wide = sinkhorn(scores, epsilon, 5)
    torch.testing.assert_close(sinkhorn(scores.float(), epsilon, 5), wide.float(), rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(wide.sum(dim=1), torch.ones(40, dtype=torch.float64))
    infinite = scores.clone()
    infinite[2, 1] = -torch.inf
    shares = sinkhorn(infinite, epsilon, 5)
    assert shares.isfinite().all()
    assert float(shares[2, 1]) == 0


def spread_out(scores: Tensor, shared: Tensor) -> Tensor:
    """Two workers with 1 and 3 samples."""
    bounds = {1: [slice(0, 4)], 2: [slice(0, 1), slice(1, 4)]}[collectives.world_size()]
    return sinkhorn(scores[bounds[collectives.rank()]], 0.05, 3, shared=shared)


@gloo
def test_sinkhorn_of_two_workers_is_that_of_one() -> None:
    shared = torch.rand(5, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    single = spread_out(SCORES, shared)
    both = torch.cat(shared_pool().run(spread_out, SCORES, shared))
    torch.testing.assert_close(both, single, rtol=1e-9, atol=1e-12)
    empty = shared_pool().run(spread_out, SCORES[:1], shared[:0])
    torch.testing.assert_close(empty[0], spread_out(SCORES[:1], shared[:0]))
    assert empty[1].shape == (0, 3)
