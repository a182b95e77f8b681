"""Mixtures of a batch's images: who is mixed with whom, and in which share, whatever the number of workers."""

from __future__ import annotations

import torch
from torch import Tensor

from armillary import collectives
from armillary.components.counter import key, sample_keys, uniforms

_SHARE, _ORDER = 1, 2


def beta_share(alpha: float, *coordinates: int) -> float:
    """One draw of ``Beta(alpha, alpha)``, a function of its coordinates (seed, step, ...); 1 when alpha is 0."""
    if alpha == 0:
        return 1.0
    from scipy.special import betaincinv

    draw = float(uniforms(torch.tensor([key(_SHARE, *coordinates)]), 1)[0, 0])
    return float(betaincinv(alpha, alpha, draw + 2.0**-25))


def partners(index: Tensor, *coordinates: int) -> Tensor:
    """Whom each sample is mixed with: ``(batch,)`` int64, places in the global batch.

    The samples of all workers form a ring in an order drawn from the coordinates and their indices; each one's partner
    is the next. So every sample is a partner once, and neither order nor workers matter.

    Args:
        index: ``Batch.index`` of this worker's samples, ``(batch,)``.
        coordinates: integers, e.g. seed and step.
    """
    everyone = collectives.gather_no_grad(index)
    ring = sample_keys(key(_ORDER, *coordinates), everyone).argsort(stable=True)
    following = torch.empty_like(ring).scatter_(0, ring, ring.roll(-1))
    first = collectives.rank() * len(index)
    return following[first : first + len(index)]


def of_partners(rows: Tensor, partner: Tensor) -> Tensor:
    """The rows ``(batch, ...)`` of each sample's partner, with gradient for floating-point rows."""
    gathered = collectives.all_gather(rows) if rows.is_floating_point() else collectives.gather_no_grad(rows)
    return gathered[partner]


def mixed(rows: Tensor, partner: Tensor, share: float) -> Tensor:
    """``share * row + (1 - share) * the partner's row``."""
    return torch.lerp(of_partners(rows, partner), rows, share)
