"""Losses between versions of the same image, and between poses of the same identity."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from armillary import collectives
from armillary.losses.blocks import Block
from armillary.losses.global_batch import global_rows
from armillary.losses.tensors import check_embeddings, float32_math, normalize, not_a_number_guard
from armillary.losses.tuples import Terms, TupleLoss, mined_triplets


class CrossVersionTriplet(TupleLoss):
    """Batch-hard triplets over versions of images, e.g. resolutions. Lai and Lam, APSIPA ASC 2021, as released.

    Over all versions u of all images, with d = 1 - cos::

        L = mean_u [margin + max_{v: other version of u's image} d_uv - min_{v: version of another image} d_uv]_+

    Args:
        margin: a cosine distance, 0 to 2. Distances reach 2, so that a margin of 1 stays active for long.
        reduction: as of :class:`~armillary.losses.tuples.TupleLoss`; ``mean_all`` is the authors'.
        gather: see the other workers' samples.

    Raises:
        ValueError: an unknown option, a negative margin; in ``forward`` a wrong shape.
    """

    unit: ClassVar[str] = "triplets"

    def __init__(self, margin: float = 1.0, reduction: str = "mean_all", gather: bool = True) -> None:
        super().__init__(True, reduction, gather, similarity="cosine", mining="batch_hard")
        if not margin >= 0:
            raise ValueError(f"margin must be at least 0, found {margin}")
        self.margin = margin

    def terms(self, block: Block) -> Terms:
        """One triplet a version: call the loss with the images' numbers as labels (and classes as ``apart``)."""
        return mined_triplets(self.distance, self.mining, block, self.margin, soft=False)


@float32_math
def feature_consistence(features: Tensor, others: Tensor) -> Tensor:
    """``mean_i (1 - cos(f_i, g_i))`` of features ``(batch, dim)`` of images and of their other versions."""
    return 1 - (normalize(features) * normalize(others)).sum(1).mean() + not_a_number_guard(features * others)


@float32_math
def identity_consistence(features: Tensor, labels: Tensor, chosen: Tensor, gather: bool = True) -> Tensor:
    """How far chosen samples lie from the mean direction of their identity's chosen samples, squared.

    ::

        1/|S| sum_{i in S} |u_i - mean_{j in S, y_j = y_i} u_j|^2,    u = f / |f|

    S holds the chosen samples whose identity has two of them or more: one alone is its own mean.

    Args:
        features: ``(batch, dim)``.
        labels: ``(batch,)``.
        chosen: ``(batch,)`` bool.
        gather: see the other workers' samples.

    Returns:
        The same scalar on every worker; 0 where S is empty.
    """
    check_embeddings(features, labels)
    units, keys = global_rows(normalize(features), gather), global_rows(labels, gather)
    kept = global_rows(chosen.to(torch.long), gather).to(units.dtype)
    _, number = keys.unique(return_inverse=True)
    sums = torch.zeros_like(units).index_add(0, number, units * kept[:, None])
    count = torch.zeros_like(kept).index_add(0, number, kept)[number]
    counted = kept * (count > 1)
    apart = (units - sums[number] / count.clamp_min(1)[:, None]).square().sum(1)
    return (apart * counted).sum() / counted.sum().clamp_min(1) + not_a_number_guard(features)


def chosen_share(chosen: Tensor) -> Tensor:
    """Which share of all workers' samples is chosen, detached; ``chosen (batch,)`` bool."""
    counts = collectives.all_reduce_sum(torch.stack([chosen.sum(), chosen.new_tensor(len(chosen), dtype=torch.long)]))
    return counts[0] / counts[1]
