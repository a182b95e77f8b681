"""Image sets as clusters of like images with a centre each. Symbols: x_i feature, c_m centre, all free in length."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from armillary import collectives
from armillary.losses.global_batch import global_rows
from armillary.losses.tensors import check_embeddings, float32_math, not_a_number_guard


def squared_distances(rows: Tensor, columns: Tensor) -> Tensor:
    """``(n, m)``, not below 0."""
    products = rows @ columns.T
    return (rows.square().sum(dim=1)[:, None] - 2 * products + columns.square().sum(dim=1)).clamp_min(0)


class SubclusterLoss(nn.Module):
    """Features to the centre of their cluster, away from other classes' centres. Uzun, Cevikalp, Saribas, TPAMI 2023.

    With M centres, s_i the centre of sample i, B the global batch and d the width::

        L = k_intra L_intra + k_inter L_inter + k_trip L_trip
        L_intra = 1 / (2 B d) sum_i |x_i - c_{s_i}|^2
        L_trip  = 1 / (2 M B) sum_i sum_{m: class(m) != y_i} [gamma + |x_i - c_{s_i}|^2 - |x_i - c_m|^2]_+
        L_inter = 1 / (2 M B) sum_u sum_{a in u} sum_{m: class(m) != u} [gamma + D_u - |c_a - c_m|^2]_+

    u runs over classes with two or more centres in the batch, a over those, and D_u is the largest squared distance
    between two of them. Centres get gradients from all three. The authors' code also counts centres of the own class
    that are absent from the batch as foreign, and fails where no class has two in it; this does neither.

    Args:
        margin: gamma >= 0, in squared units of the features.
        intra: k_intra >= 0.
        inter: k_inter >= 0.
        triplet: k_trip >= 0.
    """

    def __init__(self, margin: float = 24.0, intra: float = 1.0, inter: float = 1.0, triplet: float = 1.0) -> None:
        super().__init__()
        self.margin, self.intra, self.inter, self.triplet = margin, intra, inter, triplet

    @float32_math
    def forward(
        self,
        embeddings: Tensor,
        assigned: Tensor,
        centers: Tensor,
        classes: Tensor,
        *,
        metrics: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """This worker's share of the loss.

        Args:
            embeddings: ``(batch, dim)``.
            assigned: ``(batch,)`` each sample's centre.
            centers: ``(M, dim)``, equal on all workers.
            classes: ``(M,)`` the class of each centre; -1 for a place without one.
            metrics: receives ``intra``, ``inter``, ``triplet``.
        """
        check_embeddings(embeddings, assigned)
        centers = centers.to(embeddings.dtype)
        there = classes >= 0
        batch, count = len(embeddings) * collectives.world_size(), there.sum().clamp_min(1)
        distance = squared_distances(embeddings, centers)
        near = (embeddings - centers[assigned]).square().sum(dim=1)
        foreign = there & (classes[assigned][:, None] != classes)
        hinge = torch.where(foreign, (self.margin + near[:, None] - distance).clamp_min(0), 0)
        # The mean over this worker's part; that of all workers' means is over the batch.
        intra = near.mean() / (2 * embeddings.shape[1])
        triplet = hinge.sum(dim=1).mean() / (2 * count)
        inter = self._between(centers, classes, global_rows(assigned).unique()) / (2 * count * batch)
        if metrics is not None:
            metrics.update(intra=intra.detach(), inter=inter.detach(), triplet=triplet.detach())
        loss = self.intra * intra + self.inter * inter + self.triplet * triplet
        return loss + not_a_number_guard(embeddings)

    def _between(self, centers: Tensor, classes: Tensor, present: Tensor) -> Tensor:
        """The sum of L_inter, over all workers' centres."""
        kind = classes[present]
        distance = squared_distances(centers[present], centers)
        within = kind[:, None] == kind
        diameter = torch.where(within, distance[:, present], 0).amax(dim=1, keepdim=True)
        counted = (classes >= 0) & (kind[:, None] != classes) & (within.sum(dim=1, keepdim=True) > 1)
        return torch.where(counted, (self.margin + diameter - distance).clamp_min(0), 0).sum()


def set_means(embeddings: Tensor, labels: Tensor, sets: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of every image set in the global batch, ``(n, dim)`` with gradient, and its class ``(n,)``.

    Args:
        embeddings: ``(batch, dim)`` of this worker.
        labels: ``(batch,)``.
        sets: ``(batch,)`` numbers that tell the sets of a class apart.
    """
    rows = global_rows(embeddings)
    keys, place = torch.unique(torch.stack([global_rows(labels), global_rows(sets)]), dim=1, return_inverse=True)
    counts = torch.bincount(place, minlength=keys.shape[1]).to(rows.dtype)
    sums = rows.new_zeros(keys.shape[1], rows.shape[1]).index_add(0, place, rows)
    return sums / counts[:, None], keys[0].contiguous()


@torch.no_grad()
def nearest_accuracy(means: Tensor, labels: Tensor, centers: Tensor, classes: Tensor) -> Tensor:
    """The share of image sets whose mean's nearest centre is of the set's class, a scalar.

    Args:
        means: ``(n, dim)`` of the sets, as :func:`set_means` gives them.
        labels: ``(n,)``.
        centers: ``(M, dim)``.
        classes: ``(M,)`` the class of each centre; -1 for a place without one.
    """
    distance = squared_distances(means, centers.to(means.dtype)).masked_fill(classes < 0, torch.inf)
    return (classes[distance.argmin(dim=1)] == labels).to(means.dtype).mean()


@torch.no_grad()
def neighbor_accuracy(means: Tensor, labels: Tensor) -> Tensor:
    """The share of image sets whose nearest other set is of the same class, among those that have one; a scalar.

    Args:
        means: ``(n, dim)`` of the sets, as :func:`set_means` gives them.
        labels: ``(n,)``.
    """
    alone = torch.eye(len(means), dtype=torch.bool, device=means.device)
    nearest = squared_distances(means, means).masked_fill(alone, torch.inf).argmin(dim=1)
    counted = ((labels[:, None] == labels) & ~alone).any(dim=1)
    return ((labels[nearest] == labels) & counted).to(means.dtype).sum() / counted.sum().clamp_min(1)
