"""Losses through a network that is judged by, not trained: a recogniser of generated faces, a discriminator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from armillary.losses.slopes import with_slope


def through_frozen(loss: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """A loss of ``inputs`` whose gradient reaches the inputs and nothing else that the function uses.

    The derivative by the inputs is computed at once, by a backward pass that leaves every parameter's ``grad`` alone;
    the result carries it. So one backward pass trains two networks against each other, as alternating optimizers would
    from the same state. In evaluation without gradients it is the plain loss.

    Args:
        loss: maps inputs to a scalar.
        inputs: ``(batch, ...)``.
    """
    if not torch.is_grad_enabled():
        return loss(inputs)
    leaf = inputs.detach().requires_grad_()
    value = loss(leaf)
    (slope,) = torch.autograd.grad(value, leaf)
    return with_slope(inputs.flatten()[None], value.detach()[None], slope.flatten()[None]).squeeze(0)
