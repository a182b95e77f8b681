"""Local anchors against global columns: how a batch-coupled loss sees every worker's samples.

Each worker keeps its own rows as anchors and takes the rows of all workers, in rank order, as columns. What it returns
is ``world_size * local sum / global count``: the mean of that over workers is the global mean, even when some anchors
do not count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from armillary import collectives


def global_rows(local: Tensor, gather: bool = True) -> Tensor:
    """All workers' rows ``(world_size * rows, ...)`` in rank order, with gradient; the local ones without gather."""
    if not gather:
        return local
    return collectives.all_gather(local) if local.is_floating_point() else collectives.gather_no_grad(local)


def first_column(rows: int, gather: bool = True) -> int:
    """The column in which this worker's first of ``rows`` rows stands."""
    return collectives.rank() * rows if gather else 0


def self_mask(matrix: Tensor, gather: bool = True) -> Tensor:
    """Where a ``(rows, columns)`` matrix compares an anchor with itself, as bool."""
    rows, columns = matrix.shape
    own = torch.arange(rows, device=matrix.device) + first_column(rows, gather)
    return own[:, None] == torch.arange(columns, device=matrix.device)


def same_label(labels: Tensor, gather: bool = True) -> Tensor:
    """``(rows, columns)`` bool: anchor and column carry the same label; the anchor itself included."""
    return labels[:, None] == global_rows(labels, gather)[None, :]


def global_sum(local: Tensor, gather: bool = True) -> Tensor:
    """A detached sum over workers."""
    return collectives.all_reduce_sum(local.detach()) if gather else local.detach()


def global_mean(total: Tensor, count: Tensor, gather: bool = True) -> Tensor:
    """This worker's share of a global mean; 0 where nothing counts.

    Args:
        total: the local sum, a scalar.
        count: how many local terms it has, a scalar without gradient.
        gather: whether the other workers' terms count too.

    Returns:
        ``world_size * total / (count summed over workers)``; its mean over workers is the mean of all terms.
    """
    terms = global_sum(count, gather).clamp_min(1).to(total.dtype)
    return total * (collectives.world_size() if gather else 1) / terms
