"""k-means inside training: the same clusters on any number of workers, from the seed alone.

There is one algorithm, whatever else is installed: a run's result must not depend on that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from armillary import collectives
from armillary.components.counter import key, sample_keys, uniforms
from armillary.losses.tensors import normalize

# Rows whose distances are computed in one product. Blocks are dealt out whole, so that a product has the same shape,
# and rounds alike, whichever worker computes it.
_BLOCK = 1024
# k-means++ looks at all points once a centre; beyond this many a random subset of the points does.
_CAREFUL = 512
_START, _SUBSET = 1, 2


@dataclass(frozen=True)
class Clusters:
    """What k-means found.

    ``centroids (k, dim)``; ``labels (n,)`` int64; ``distances (n,)``, Euclidean, of each point to its centroid.
    """

    centroids: Tensor
    labels: Tensor
    distances: Tensor

    @property
    def prototypes(self) -> Tensor:
        """The centroids scaled to unit length."""
        return normalize(self.centroids)

    @property
    def sizes(self) -> Tensor:
        """``(k,)`` int64: points of each cluster."""
        return torch.bincount(self.labels, minlength=len(self.centroids))


@torch.no_grad()
def kmeans(points: Tensor, k: int, *, seed: int, iterations: int = 25) -> Clusters:
    """Lloyd's algorithm from k-means++ (Arthur and Vassilvitskii 2007), distances shared out over the workers.

    A cluster that loses all its points takes over the point farthest from its centroid; it ends early when no point
    changes its cluster.

    Args:
        points: ``(n, dim)``, equal on all workers, e.g. from :func:`armillary.components.bank.encode_all`.
        k: clusters, 1 to n.
        seed: of the start; pass one made of run seed and epoch.
        iterations: at most.

    Returns:
        The same on every worker.

    Raises:
        ValueError: more clusters than points.
    """
    if not 1 <= k <= len(points):
        raise ValueError(f"{len(points)} points cannot form {k} clusters")
    points = points.float()
    centroids = points[_start(points, k, seed)]
    labels, distances = _nearest(points, centroids)
    for _ in range(iterations):
        centroids = _means(points, labels, distances, k)
        before = labels
        labels, distances = _nearest(points, centroids)
        if torch.equal(labels, before):
            break
    return Clusters(centroids, labels, distances)


def hierarchy(points: Tensor, sizes: Sequence[int], *, seed: int, iterations: int = 25) -> list[Clusters]:
    """k-means of the points, then of its centroids, and so on (Guo et al., HCSC, 2022, algorithm 1).

    Args:
        points: ``(n, dim)``, equal on all workers.
        sizes: clusters of each level, finest first, each at most the one before.
        seed: of all starts.
        iterations: of each level.

    Returns:
        One a level; ``labels`` of a level above the first are the parents of the clusters below it.

    Raises:
        ValueError: a level has more clusters than the one below.
    """
    levels: list[Clusters] = []
    for number, size in enumerate(sizes):
        below = levels[-1].centroids if levels else points
        levels.append(kmeans(below, size, seed=key(seed, number), iterations=iterations))
    return levels


def concentrations(clusters: Clusters, temperature: float, smoothing: float = 10.0) -> Tensor:
    """How wide each cluster is, as a temperature (Li et al., PCL, 2021, equation 12 and published code).

    The mean distance over ``log(size + smoothing)``; clusters of one point take the largest; values beyond the 10th and
    90th percentile are cut, and all are scaled to a mean of ``temperature``.

    Returns:
        ``(k,)`` float32, at least 1e-3.
    """
    sizes = clusters.sizes
    total = torch.zeros(len(sizes), dtype=torch.float64, device=sizes.device)
    total.index_add_(0, clusters.labels, clusters.distances.double())
    width = total / (sizes.clamp_min(1) * (sizes + smoothing).log())
    width = torch.where(sizes > 1, width, width.max())
    low, high = torch.quantile(width, torch.tensor([0.1, 0.9], dtype=width.dtype, device=width.device))
    width = width.clamp(low, high)
    return (temperature * width / width.mean().clamp_min(1e-12)).clamp_min(1e-3).float()


class ClusterLevel(nn.Module):
    """One clustering of the training set, rebuilt every epoch: what PCL and HCSC compare with; buffers only.

    ``prototypes (k, dim)`` of unit length, rows of zeros where there is no cluster; ``widths (k,)``; ``assigned`` gives
    the cluster of a sample by its index (level 1), or of a cluster of the level below.
    """

    prototypes: Tensor
    widths: Tensor
    assigned: Tensor

    def __init__(self, clusters: int, dim: int, members: int) -> None:
        super().__init__()
        self.register_buffer("prototypes", torch.zeros(clusters, dim))
        self.register_buffer("widths", torch.ones(clusters))
        self.register_buffer("assigned", torch.zeros(members, dtype=torch.int64))

    def take(self, found: Clusters, temperature: float, smoothing: float, places: Tensor | None = None) -> None:
        """Takes over a clustering; ``places`` are the members that were clustered, all by default."""
        count = len(found.centroids)
        self.prototypes.zero_()
        self.prototypes[:count] = found.prototypes.to(self.prototypes.dtype)
        self.widths[:count] = concentrations(found, temperature, smoothing).to(self.widths.dtype)
        self.assigned[slice(len(found.labels)) if places is None else places] = found.labels


def _start(points: Tensor, k: int, seed: int) -> Tensor:
    """Indices of ``k`` points to begin with."""
    if k > _CAREFUL:
        order = sample_keys(key(_SUBSET, seed), torch.arange(len(points), device=points.device)).argsort(stable=True)
        return order[:k]
    tries = 2 + int(math.log(k))
    draws = uniforms(torch.tensor([key(_START, seed)], device=points.device), k * tries)[0].double().view(k, tries)
    chosen = [(draws[0, 0] * len(points)).long()]
    nearest = _squared_distances(points, chosen[0][None])[0]
    for draw in draws[1:]:
        # Candidates with a probability that grows with the squared distance from the centres there are; the one that
        # leaves least to the others is taken (the paper's greedy variant).
        weight = nearest.cumsum(dim=0)
        candidates = torch.searchsorted(weight, draw * weight[-1], right=True).clamp_max(len(points) - 1)
        left = torch.minimum(nearest, _squared_distances(points, candidates))
        best = left.sum(dim=1).argmin()
        chosen.append(candidates[best])
        nearest = left[best]
    return torch.stack(chosen)


def _squared_distances(points: Tensor, rows: Tensor) -> Tensor:
    """``(len(rows), n)`` float64: of all points from some of them."""
    return (points - points[rows][:, None]).square().sum(dim=2).double()


def _nearest(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Each point's nearest centroid (the first of equals) and its distance; every worker computes some blocks."""
    blocks = -(-len(points) // _BLOCK)
    workers, rank = collectives.world_size(), collectives.rank()
    each = -(-blocks // workers)
    squared = centroids.square().sum(dim=1)
    labels = torch.zeros(each * _BLOCK, dtype=torch.int64, device=points.device)
    for number, block in enumerate(range(rank * each, min((rank + 1) * each, blocks))):
        rows = points[block * _BLOCK : (block + 1) * _BLOCK]
        closest = (squared - 2 * rows @ centroids.T).argmin(dim=1)
        labels[number * _BLOCK : number * _BLOCK + len(rows)] = closest
    everyone = collectives.gather_no_grad(labels)[: len(points)]
    return everyone, (points - centroids[everyone]).norm(dim=1)


def _means(points: Tensor, labels: Tensor, distances: Tensor, k: int) -> Tensor:
    sizes = torch.bincount(labels, minlength=k)
    sums = torch.zeros(k, points.shape[1], dtype=torch.float64, device=points.device)
    sums.index_add_(0, labels, points.double())
    means = (sums / sizes.clamp_min(1)[:, None]).float()
    empty = (sizes == 0).nonzero()[:, 0]
    if len(empty):
        farthest = distances.argsort(descending=True, stable=True)[: len(empty)]
        means[empty] = points[farthest]
    return means
