"""Assignments of samples to prototypes that use all prototypes equally, over all workers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from armillary import collectives


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float = 0.05, iterations: int = 3, shared: Tensor | None = None) -> Tensor:
    """Sinkhorn-Knopp's equal partition (Caron et al., SwAV, 2020, section 3.1; Cuturi 2013).

    In float32 at least and in the log domain: at epsilon 0.05 and cosines, exponentials would span 35 decades. A
    sample's shares sum to 1 exactly, prototypes' masses are equal in the limit.

    Args:
        scores: ``(local, prototypes)``, this worker's samples; workers may bring different numbers, even none.
        epsilon: entropic temperature, > 0; the teacher's temperature in DINOv2.
        iterations: passes over prototypes and samples, at least 1.
        shared: ``(rows, prototypes)``, scores of further samples that every worker has alike, as from a queue; they
            take part once.

    Returns:
        ``(local, prototypes)`` float32 (float64 from float64), without gradient.
    """
    with torch.autocast(scores.device.type, enabled=False):
        values = scores if scores.dtype == torch.float64 else scores.float()
        if shared is not None:
            own = shared[collectives.rank() :: collectives.world_size()]
            values = torch.cat([values, own.to(values.dtype)])
        logs = values / epsilon
        for _ in range(iterations):
            logs = logs - _log_mass(logs)
            logs = logs - logs.logsumexp(dim=1, keepdim=True)
        return logs[: len(scores)].exp()


def _log_mass(logs: Tensor) -> Tensor:
    """Logarithm of each prototype's mass over all workers' samples, ``(prototypes,)``."""
    floor = logs.new_full((1, logs.shape[1]), -math.inf)
    largest = collectives.all_reduce_max(torch.cat([logs, floor]).amax(dim=0))
    # Where no sample has any mass, or there is no sample, nothing is to be divided.
    largest = largest.masked_fill(largest == -math.inf, 0)
    mass = collectives.all_reduce_sum((logs - largest).exp().sum(dim=0))
    return largest + mass.clamp_min(torch.finfo(logs.dtype).tiny).log()
