"""Losses between high- and low-resolution versions of faces. ``high`` and ``low`` are ``(batch, dim)``, row by row."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from armillary import collectives
from armillary.losses.global_batch import global_mean, global_rows, same_label
from armillary.losses.similarities import euclidean
from armillary.losses.tensors import (
    check_choice,
    check_embeddings,
    check_labels,
    float32_math,
    normalize,
    not_a_number_guard,
)


def pair_distance(high: Tensor, low: Tensor) -> Tensor:
    """``mean_i |f_H(x_i) - f_L(x_i)|^2`` over this worker's rows."""
    return (high - low).square().sum(dim=1).mean()


def moment_distances(high: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
    """``|mu_H - mu_L|^2`` and ``|Sigma_H - Sigma_L|_F^2`` of the global batch's features, the same on every worker.

    Means and covariances are divided by N.
    """
    count = len(high) * collectives.world_size()
    means = [collectives.all_reduce_sum(rows.sum(dim=0)) / count for rows in (high, low)]
    centered = [rows - mean for rows, mean in zip((high, low), means, strict=True)]
    covariances = [collectives.all_reduce_sum(rows.T @ rows) / count for rows in centered]
    return (means[0] - means[1]).square().sum(), (covariances[0] - covariances[1]).square().sum()


class ManifoldAlignment(nn.Module):
    """Equal features in pairs, equal means and covariances over the batch.

    ::

        L = l1 mean_i |f_H(x_i) - f_L(x_i)|^2 + l2 (|mu_H - mu_L|^2 + |Sigma_H - Sigma_L|_F^2),   f of unit length

    Args:
        pair_weight: l1 >= 0.
        moment_weight: l2 >= 0.
    """

    def __init__(self, pair_weight: float = 1.0, moment_weight: float = 0.1) -> None:
        super().__init__()
        self.pair_weight, self.moment_weight = pair_weight, moment_weight

    @float32_math
    def forward(self, high: Tensor, low: Tensor, *, metrics: dict[str, Tensor] | None = None) -> Tensor:
        """The loss of the global batch; ``metrics`` receives ``pair_distance``, ``mean_distance``, ``cov_distance``."""
        check_embeddings(high)
        check_embeddings(low)
        high, low = normalize(high), normalize(low)
        pair, (mean, covariance) = pair_distance(high, low), moment_distances(high, low)
        if metrics is not None:
            found = {"pair_distance": pair, "mean_distance": mean, "cov_distance": covariance}
            metrics.update({name: value.detach() for name, value in found.items()})
        return self.pair_weight * pair + self.moment_weight * (mean + covariance)


class TransferableTriplet(nn.Module):
    """Low-resolution anchors against high-resolution references of all workers, which are fixed.

    ::

        L = mean_(a, p) [ |f_L(a) - sg f_H(p)|^2 - |f_L(a) - sg f_H(n)|^2 + alpha ]_+,   y_a = y_p != y_n

    Every p of the anchor's class counts, its own high-resolution version among them. n is the nearest negative
    (``hard``), or the nearest one farther than p (``semi_hard``; the farthest where there is none).

    Args:
        margin: alpha, a difference of squared distances of unit vectors, 0 to 4.
        mining: ``hard`` or ``semi_hard``.
    """

    def __init__(self, margin: float = 0.3, mining: str = "hard") -> None:
        super().__init__()
        check_choice("mining", mining, ("hard", "semi_hard"))
        self.margin, self.mining = margin, mining

    @float32_math
    def forward(self, low: Tensor, high: Tensor, labels: Tensor, *, metrics: dict[str, Tensor] | None = None) -> Tensor:
        """This worker's share of the mean; ``metrics`` receives ``active_share``, of triplets with a loss above 0."""
        check_embeddings(low, labels)
        check_embeddings(high, labels)
        references = global_rows(normalize(high).detach())
        distance = euclidean(normalize(low), references, squared=True)
        positive = same_label(labels)
        near = self._negative(distance.detach(), positive)
        valid = positive & near.isfinite()
        at = near.nan_to_num(0, posinf=0).long()
        losses = (distance - distance.gather(1, at) + self.margin).clamp_min(0) * valid
        if metrics is not None:
            metrics["active_share"] = global_mean((losses > 0).sum().to(losses.dtype), valid.sum()).detach()
        return global_mean(losses.sum(), valid.sum()) + not_a_number_guard(low) + not_a_number_guard(high.detach())

    def _negative(self, distance: Tensor, positive: Tensor) -> Tensor:
        """For every (anchor, column) as (a, p) the column of n, as a number; infinity where there is no negative."""
        apart = distance.masked_fill(positive, torch.inf)
        order = apart.sort(dim=1)
        count = (~positive).sum(dim=1, keepdim=True)
        place = torch.zeros_like(distance, dtype=torch.long)
        if self.mining == "semi_hard":
            farther = torch.searchsorted(order.values, distance.contiguous(), right=True)
            place = torch.minimum(farther, (count - 1).clamp_min(0))
        column = order.indices.gather(1, place).to(distance.dtype)
        return column.masked_fill(count == 0, torch.inf)


class ThresholdPairs(nn.Module):
    """Across resolutions, the same person nearer than a threshold and others beyond it by a margin.

    ::

        L = mean_same [d_ij^2 - delta]_+ + mean_different [delta + m - d_ij^2]_+,   d_ij = |f(x_i) - f(x_j low)|

    Pairs of this worker's low-resolution rows with the high-resolution rows of all workers.

    Args:
        threshold: delta, a squared distance of unit vectors, 0 to 4.
        margin: m, 0 to 4.
    """

    def __init__(self, threshold: float = 0.5, margin: float = 0.3) -> None:
        super().__init__()
        self.threshold, self.margin = threshold, margin

    @float32_math
    def forward(self, low: Tensor, high: Tensor, labels: Tensor, *, metrics: dict[str, Tensor] | None = None) -> Tensor:
        """This worker's share of the means; ``metrics`` receives ``violated_share``, of pairs with a loss above 0."""
        check_embeddings(low, labels)
        check_embeddings(high, labels)
        distance = euclidean(normalize(low), global_rows(normalize(high)), squared=True)
        same = same_label(labels)
        far = (distance - self.threshold).clamp_min(0) * same
        close = (self.threshold + self.margin - distance).clamp_min(0) * ~same
        if metrics is not None:
            metrics["violated_share"] = ((far + close) > 0).to(distance.dtype).mean()
        return global_mean(far.sum(), same.sum()) + global_mean(close.sum(), (~same).sum()) + not_a_number_guard(low)


class CenterCalibrator(nn.Module):
    """Features near their class's center, centers of different classes apart.

    ::

        L = mean_i (1 - cos(x_i, c_{y_i})) + beta mean_{u != v} [cos(c_u, c_v) - rho]_+,   u, v classes of the batch
        c_u = direction of  momentum * old c_u + (1 - momentum) * mean direction of the batch's u

    Batch means are those of all workers and carry gradient. The centers move in :meth:`update`.

    Args:
        num_classes: C.
        embedding_dim: width of x.
        separation: beta >= 0.
        overlap: rho, the cosine that centers may have, in [-1, 1].
        momentum: share of the old center, in [0, 1).

    Attributes:
        centers: ``(num_classes, embedding_dim)``, unit rows, or zero for classes that were not seen.
    """

    centers: Tensor

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        separation: float = 1.0,
        overlap: float = 0.0,
        momentum: float = 0.9,
    ) -> None:
        super().__init__()
        self.separation, self.overlap, self.momentum = separation, overlap, momentum
        self.register_buffer("centers", torch.zeros(num_classes, embedding_dim))
        self._moved: tuple[Tensor, Tensor] | None = None

    @float32_math
    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Over the global batch, the same on every worker; remembers the new centers for :meth:`update`."""
        check_embeddings(embeddings, labels)
        check_labels(labels, len(self.centers))
        units, keys = global_rows(normalize(embeddings)), global_rows(labels)
        classes, place = keys.unique(return_inverse=True)
        sums = units.new_zeros(len(classes), units.shape[1]).index_add(0, place, units)
        means = sums / torch.bincount(place, minlength=len(classes))[:, None]
        old = self.centers[classes].to(units.dtype)
        # A class that is new starts at its first mean.
        keep = self.momentum * (old.square().sum(dim=1, keepdim=True) > 0).to(units.dtype)
        centers = normalize(keep * old + (1 - keep) * means)
        if self.training:
            self._moved = (classes, centers.detach())
        compact = (1 - (units * centers[place]).sum(dim=1)).mean()
        others = ~torch.eye(len(classes), dtype=torch.bool, device=units.device)
        overlap = ((centers @ centers.T - self.overlap).clamp_min(0) * others).sum() / others.sum().clamp_min(1)
        return compact + self.separation * overlap

    @torch.no_grad()
    def update(self) -> None:
        """Moves the centers of the last batch's classes; call it on every worker, once a step."""
        if self._moved is not None:
            classes, centers = self._moved
            self.centers[classes] = centers.to(self.centers.dtype)
            self._moved = None
