"""Cross-entropy with soft targets, row by row, in blocks that stay in a processor's cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Numbers of a block: 1 MiB in float32. Whole matrices of logits would pass through main memory once an operation.
_BLOCK = 1 << 18


def soft_cross_entropy(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """``-sum_k q_k log softmax(x / tau)_k`` over the last dimension.

    The gradient is computed from the logits again, not from stored probabilities, and cannot be differentiated twice.

    Args:
        logits: x ``(..., K)``; give float32 or more.
        targets: q, of that shape or one that expands to it, non-negative with sum 1; constants.
        temperature: tau > 0.

    Returns:
        ``(...)``.
    """
    wanted = targets.detach().expand_as(logits).flatten(0, -2)
    rows = _SoftCrossEntropy.apply(logits.flatten(0, -2), wanted, temperature)
    losses: Tensor = rows.view(logits.shape[:-1])
    return losses


def soft_targets(logits: Tensor, center: Tensor, temperature: float) -> Tensor:
    """``softmax((x - c) / tau)`` over the last dimension of ``(..., K)``; constants."""
    rows = logits.detach().flatten(0, -2)
    found = torch.empty_like(rows, dtype=torch.result_type(rows, center))
    for part in _blocks(rows):
        torch.softmax((rows[part] - center).div_(temperature), dim=1, out=found[part])
    return found.view(logits.shape)


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """Rows ``(n, K)`` to their losses ``(n,)``."""
        losses, log_mass = logits.new_empty(len(logits)), logits.new_empty(len(logits))
        for part in _blocks(logits):
            scaled = logits[part] / temperature
            agreement = (scaled * targets[part]).sum(dim=1)
            largest = scaled.amax(dim=1, keepdim=True)
            log_mass[part] = scaled.sub_(largest).exp_().sum(dim=1).log_().add_(largest[:, 0])
            losses[part] = log_mass[part] - agreement
        ctx.save_for_backward(logits, targets, log_mass)
        ctx.temperature = temperature
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """``g (softmax(x / tau) - q) / tau``."""
        logits, targets, log_mass = ctx.saved_tensors
        found = torch.empty_like(logits)
        for part in _blocks(logits):
            rows = torch.div(logits[part], ctx.temperature, out=found[part])
            rows.sub_(log_mass[part, None]).exp_().sub_(targets[part]).mul_(gradient[part, None] / ctx.temperature)
        return found, None, None


def _blocks(rows: Tensor) -> list[slice]:
    size = max(1, _BLOCK // max(rows.shape[1], 1))
    return [slice(first, first + size) for first in range(0, len(rows), size)]
