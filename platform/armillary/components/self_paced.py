"""Clusters that can be trusted: DBSCAN on the Jaccard distance of neighbourhoods, under three radii.

Zhong et al., "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017; Y. Ge et al., SpCL, 2020.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from armillary import collectives

# Products of this many pairs at a time.
_CHUNK = 2**24


@torch.no_grad()
def jaccard_distance(rows: Tensor, k1: int = 30, k2: int = 6) -> Tensor:
    """How little two rows share of their neighbourhoods: ``(n, n)`` float32 in [0, 1], symmetric, 0 on the diagonal.

    A row's neighbourhood are its k-reciprocal neighbours (each among the k1 nearest of the other), widened by those of
    its neighbours with k1 / 2 where two thirds of them agree, weighed by ``exp(-distance)`` and averaged over the k2
    nearest. The distance is ``1 - sum min(V_i, V_j) / sum max(V_i, V_j)``.

    Args:
        rows: ``(n, dim)``, compared by direction.
        k1: size of neighbourhoods.
        k2: rows that are averaged; 1 switches that off.
    """
    unit = torch.nn.functional.normalize(rows.float(), dim=1)
    squared = (2 - 2 * unit @ unit.T).clamp_min(0)
    number = len(rows)
    squared.fill_diagonal_(-1)  # each row is its own nearest
    rank = squared.argsort(dim=1, stable=True)
    squared.fill_diagonal_(0)
    wide, narrow = (_reciprocal(rank, k) for k in (k1, max(1, round(k1 / 2))))
    # A neighbour's narrow set joins where more than two thirds of it lie in the row's own.
    shared = wide.float() @ narrow.float().T
    joins = wide & (shared > 2 / 3 * narrow.sum(dim=1)[None, :])
    hood = wide | ((joins.float() @ narrow.float()) > 0)
    weights = torch.where(hood, (-squared).exp(), 0)
    weights /= weights.sum(dim=1, keepdim=True)
    if k2 > 1:
        weights = weights[rank[:, : min(k2, number)]].mean(dim=1)
    common = _common(weights)
    distance = (1 - common / (2 - common)).clamp_min(0)
    return distance.fill_diagonal_(0)


def _reciprocal(rank: Tensor, k: int) -> Tensor:
    """``(n, n)`` bool: j is among i's k nearest beside itself, and i among j's."""
    near = torch.zeros(rank.shape, dtype=torch.bool, device=rank.device)
    near.scatter_(1, rank[:, : k + 1], True)
    return near & near.T


def _common(weights: Tensor) -> Tensor:
    """``sum_k min(V_ik, V_jk)`` of all pairs. V is sparse: each column adds the pairs of its few rows."""
    number = len(weights)
    most = int((weights > 0).sum(dim=0).max())
    values, places = weights.T.topk(most, dim=1)
    total = torch.zeros(number * number, dtype=torch.float64, device=weights.device)
    step = max(1, _CHUNK // most**2)
    for start in range(0, number, step):
        value, place = values[start : start + step], places[start : start + step]
        least = torch.minimum(value[:, :, None], value[:, None, :]).double()
        pair = place[:, :, None] * number + place[:, None, :]
        total.index_add_(0, pair.flatten(), least.flatten())
    return total.view(number, number).float()


@dataclass(frozen=True)
class Criterion:
    """DBSCAN's radius and how much the tight and the loose one differ from it; ``min_samples`` makes a core."""

    eps: float = 0.6
    gap: float = 0.02
    min_samples: int = 4


def clusters_at(distance: Tensor, criterion: Criterion) -> tuple[Tensor, Tensor, Tensor]:
    """Cluster numbers ``(n,)`` int64 under the tight, the plain and the loose radius; outsiders have one of their own.

    Rank 0 clusters, and tells the others.
    """
    found: list[Tensor] | None = None
    if collectives.rank() == 0:
        from sklearn.cluster import DBSCAN

        matrix = distance.double().cpu().numpy()
        radii = (criterion.eps - criterion.gap, criterion.eps, criterion.eps + criterion.gap)
        found = []
        for eps in radii:
            scan = DBSCAN(eps=eps, min_samples=criterion.min_samples, metric="precomputed").fit(matrix)
            found.append(with_singles(torch.as_tensor(scan.labels_, dtype=torch.int64)))
    tight, plain, loose = collectives.broadcast_object(found)
    return tight.to(distance.device), plain.to(distance.device), loose.to(distance.device)


def with_singles(labels: Tensor) -> Tensor:
    """Cluster numbers in which every outsider (-1) has a number of its own, behind those of the clusters."""
    outside = labels < 0
    beyond = int(labels.max()) + 1 if len(labels) else 0
    return torch.where(outside, beyond + outside.cumsum(0) - 1, labels)


def agreement(cluster: Tensor, other: Tensor) -> Tensor:
    """``|I n I'| / |I u I'|`` of the clusters that each sample lies in under two criteria, ``(n,)`` in (0, 1]."""
    pair = cluster * (int(other.max()) + 1) + other
    both = _size(pair)
    share: Tensor = both / (_size(cluster) + _size(other) - both)
    return share


def _size(labels: Tensor) -> Tensor:
    _, place, count = labels.unique(return_inverse=True, return_counts=True)
    sizes: Tensor = count[place].double()
    return sizes


def trusted(
    tight: Tensor, plain: Tensor, loose: Tensor, independence: float | None, quantile: float = 0.9
) -> tuple[Tensor, float]:
    """The clusters that the other radii agree with; everyone else stands alone.

    A cluster is kept when its independence, the least of its members' agreement with the loose clusters, reaches a
    threshold; of a kept cluster the members stay whose agreement with the tight clusters is the best in it.

    Args:
        tight: numbers as :func:`clusters_at` gives them, ``(n,)``.
        plain: those that are judged.
        loose: with the larger radius.
        independence: the threshold; ``None`` sets it so that ``quantile`` of the clusters pass, as in the first epoch.
        quantile: see ``independence``.

    Returns:
        ``(n,)`` int64 from 0, samples alone with numbers of their own, and the threshold.
    """
    apart, compact = agreement(plain, loose), agreement(plain, tight)
    numbers, place = plain.unique(return_inverse=True)
    least = torch.full((len(numbers),), torch.inf, dtype=torch.float64, device=plain.device)
    least.scatter_reduce_(0, place, apart, "amin")
    best = torch.zeros_like(least).scatter_reduce_(0, place, compact, "amax")
    several = torch.bincount(place) > 1
    if independence is None:
        scores = least[several].sort().values
        independence = float(scores[min(len(scores) - 1, int(len(scores) * (1 - quantile)))]) if len(scores) else 0.0
    stays = several[place] & (least[place] >= independence) & (compact >= best[place])
    return with_singles(torch.where(stays, place, -1)), independence
