"""A running mean of outputs over all workers: the centre that DINO subtracts from its teacher's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from armillary.collectives import all_reduce_sum
from armillary.components.held import Held


class Center(nn.Module):
    """Exponential moving average of the mean output of a global batch (Caron et al., DINO, 2021, equation 4).

    Use ``value`` in ``forward``, :meth:`hold` the outputs there, and call :meth:`update` in ``after_step``: the loss
    of a step sees the centre of the steps before it.

    Args:
        dim: width of the outputs.
        momentum: share of the old centre that an update keeps, in [0, 1].

    Attributes:
        value: ``(dim,)``, zero at first.
    """

    value: Tensor

    def __init__(self, dim: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(dim))
        self._held = Held()

    def hold(self, step: int, outputs: Tensor) -> None:
        """Counts outputs ``(..., dim)`` towards the mean; workers may have different numbers of them, even none."""
        rows = outputs.detach().reshape(-1, outputs.shape[-1]).to(self.value.dtype)
        self._held.add(step, total=rows.sum(dim=0)[None], count=rows.new_full((1,), len(rows)))

    @torch.no_grad()
    def update(self) -> None:
        """Moves the centre towards the mean of what all workers hold; stays when they hold nothing."""
        held = self._held.take()
        if not held:
            return
        sums = all_reduce_sum(torch.cat([held["total"].sum(dim=0), held["count"].sum(dim=0, keepdim=True)]))
        if sums[-1] > 0:
            self.value.lerp_(sums[:-1] / sums[-1], 1 - self.momentum)
