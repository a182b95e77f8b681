"""The only place that gathers or reduces across workers, with gradient, in rank order.

The convention every objective relies on: each worker returns a loss whose *mean over workers* is the loss of one
process on the whole batch, and the engine averages gradients. Each forward collective below therefore has a backward
that sums the incoming gradients over workers. Without an initialised process group every function is the identity.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["all_gather", "all_reduce_max", "all_reduce_sum", "broadcast_object", "gather_no_grad", "rank", "world_size"]


def world_size() -> int:
    """Number of workers; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This worker's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        ctx.rows = local.shape[0]
        return gather_no_grad(local)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        start = rank() * ctx.rows
        return grad[start : start + ctx.rows]


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        total = local.detach().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total


def all_gather(local: Tensor) -> Tensor:
    """Concatenates the workers' rows in rank order; gradients flow back to each row's owner, summed over workers.

    Args:
        local: ``(rows, ...)``; every worker must bring the same shape.

    Returns:
        ``(world_size * rows, ...)``.
    """
    return _AllGather.apply(local) if world_size() > 1 else local


def gather_no_grad(local: Tensor) -> Tensor:
    """Like :func:`all_gather`, for labels, indices and detached values."""
    if world_size() == 1:
        return local
    local = local.detach().contiguous()
    parts = [torch.empty_like(local) for _ in range(world_size())]
    dist.all_gather(parts, local)
    return torch.cat(parts)


def all_reduce_sum(local: Tensor) -> Tensor:
    """Sum over workers, with gradient: what each worker does with the sum flows back to every contribution."""
    return _AllReduceSum.apply(local) if world_size() > 1 else local


def all_reduce_max(local: Tensor) -> Tensor:
    """Maximum over workers, without gradient."""
    if world_size() == 1:
        return local.detach()
    largest = local.detach().clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def broadcast_object(value: Any) -> Any:
    """Rank 0's picklable object on every worker."""
    if world_size() == 1:
        return value
    box = [value if rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]
