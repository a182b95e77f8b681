"""Row-wise values of a matrix with gradients that are written down instead of recorded: few passes, little memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _WithSlope(torch.autograd.Function):
    """See :func:`with_slope`."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, values: Tensor, slope: Tensor, scale: Tensor | None) -> Tensor:
        ctx.slope, ctx.scale = slope, scale
        return values.view_as(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_rows = (grad if ctx.scale is None else grad * ctx.scale)[:, None]
        slope, ctx.slope = ctx.slope, None
        return slope.mul_(of_rows), None, None, None


def with_slope(matrix: Tensor, values: Tensor, slope: Tensor, scale: Tensor | None = None) -> Tensor:
    """Values of a matrix's rows whose derivative by the matrix is known.

    Args:
        matrix: ``(rows, columns)``; only its place in the graph counts, so it may have been overwritten.
        values: ``(rows,)``, computed without gradient.
        slope: ``(rows, columns)``: row i holds the derivatives of ``values[i]``, up to ``scale``. The one backward pass
            that there can be overwrites it.
        scale: ``(rows,)``, a further factor.
    """
    result: Tensor = _WithSlope.apply(matrix, values, slope, scale)
    return result


def empty_logit(dtype: torch.dtype) -> float:
    """What stands for "not there" under a log-sum-exp: its exponential is 0, and unlike infinity it gives no NaN."""
    return torch.finfo(dtype).min / 4


def exponentials_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of rows without gradient; the logits are overwritten with exponentials.

    Returns:
        ``log sum_j exp(l_ij)`` and the factor that turns the exponentials into a softmax, ``(rows,)`` each.
    """
    largest = logits.amax(dim=1, keepdim=True)
    total = logits.sub_(largest).exp_().sum(dim=1)
    return total.log() + largest.squeeze(1), total.reciprocal()


def log_sum_exp_(logits: Tensor) -> Tensor:
    """Log-sum-exp of rows ``(rows,)``, with gradient; the logits are overwritten and must not be used again."""
    with torch.no_grad():
        detached = logits.detach()
        values, scale = exponentials_(detached)
    return with_slope(logits, values, detached, scale)


def exponentials_with_(logits: Tensor, further: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp of rows and of some further logits each, without gradient; the logits are overwritten.

    Args:
        logits: ``(rows, columns)``, of any number of columns; becomes ``exp(l_ij - m_i)``.
        further: ``(rows, parts)``, detached.

    Returns:
        ``m_i``, the largest logit of a row, the sum of a row's exponentials, further ones included, ``(rows,)`` each,
        and ``exp(further - m)``, ``(rows, parts)``.
    """
    largest = further.amax(dim=1)
    if logits.shape[1]:
        largest = torch.maximum(largest, logits.amax(dim=1))
    beside = (further - largest[:, None]).exp()
    total = logits.sub_(largest[:, None]).exp_().sum(dim=1) + beside.sum(dim=1)
    return largest, total, beside
