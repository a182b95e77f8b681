"""Assignments of samples to prototypes that use all prototypes equally, over all workers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from armillary import collectives


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float = 0.05, iterations: int = 3, shared: Tensor | None = None) -> Tensor:
    """Sinkhorn-Knopp's equal partition (Caron et al., SwAV, 2020, section 3.1; Cuturi 2013).

    In float32 at least. A sample's shares sum to 1 exactly, prototypes' masses are equal in the limit.

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
        largest, span = _bounds(logs)
        # The same answer on every worker, as the bounds are those of all.
        plain = span < -0.5 * math.log(torch.finfo(logs.dtype).tiny)
        shares = _scaled(logs, largest, iterations) if plain else _in_logs(logs, largest, iterations)
        return shares[: len(scores)]


def _bounds(logs: Tensor) -> tuple[Tensor, float]:
    """Each prototype's largest number, ``(prototypes,)``, and how far one of its numbers lies below; of all workers."""
    bounds = logs.new_full((2, logs.shape[1]), -math.inf)
    if len(logs):
        low, high = torch.aminmax(logs, dim=0)
        bounds = torch.stack([high, -low])
    largest, smallest = collectives.all_reduce_max(bounds)
    return largest, float((largest + smallest).max())


def _scaled(logs: Tensor, largest: Tensor, iterations: int) -> Tensor:
    """The shares where exponentials of the differences neither vanish nor do their reciprocals overflow.

    ``diag(v) P diag(u)`` with each prototype's largest exponential 1. P is written once; a pass only reads it. Cosines
    at epsilon 0.05 span 17 decades.
    """
    kernel = logs.sub_(largest).exp_()
    samples, prototypes = kernel.new_ones(len(kernel)), kernel[:0].sum(dim=0)
    for _ in range(iterations):
        prototypes = 1 / collectives.all_reduce_sum(samples @ kernel)
        samples = 1 / (kernel @ prototypes)
    return kernel.mul_(prototypes).mul_(samples[:, None])


def _in_logs(logs: Tensor, largest: Tensor, iterations: int) -> Tensor:
    """The shares of any numbers, infinite ones too."""
    for number in range(iterations):
        logs = logs - _log_mass(logs, _bounds(logs)[0] if number else largest)
        logs = logs - logs.logsumexp(dim=1, keepdim=True)
    return logs.exp()


def _log_mass(logs: Tensor, largest: Tensor) -> Tensor:
    """Logarithm of each prototype's mass over all workers' samples, ``(prototypes,)``."""
    # Where no sample has any mass, or there is no sample, nothing is to be divided.
    largest = largest.masked_fill(largest == -math.inf, 0)
    mass = collectives.all_reduce_sum((logs - largest).exp().sum(dim=0))
    return largest + mass.clamp_min(torch.finfo(logs.dtype).tiny).log()
