"""What queues and banks share: rows that a step sets aside for its end, and buffers that stay in main memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn


class Held:
    """Rows by name, from all micro-batches of one step.

    Queues and banks are written after the backward pass, which still needs what they held during the forward pass, and
    once a step however many micro-batches it has.
    """

    def __init__(self) -> None:
        self._step = -1
        self._columns: dict[str, list[Tensor]] = {}

    def add(self, step: int, **columns: Tensor) -> None:
        """Sets rows aside, detached; those of an earlier step are dropped.

        Args:
            step: the number of the optimizer step.
            columns: first dimension: rows.
        """
        if step != self._step:
            self._step, self._columns = step, {}
        for name, rows in columns.items():
            self._columns.setdefault(name, []).append(rows.detach())

    def take(self) -> dict[str, Tensor]:
        """The rows of the step, in the order in which they came; empty when there were none."""
        taken = {name: torch.cat(parts) for name, parts in self._columns.items()}
        self._columns = {}
        return taken


class HostBuffers(nn.Module):
    """A module whose buffers stay in main memory, where ``host`` is set, whatever device the rest of a model is on.

    Attributes:
        device: where the rest of the model is.
    """

    host: bool
    device: torch.device

    def __init__(self, host: bool) -> None:
        super().__init__()
        self.host, self.device = host, torch.get_default_device()

    def _near(self, kept: Tensor) -> Tensor:
        """A buffer, or what was made of one, where the rest of the model is."""
        return kept.to(self.device) if self.host else kept

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        self.device = fn(torch.empty(0, device=self.device)).device
        for name, buffer in before.items() if self.host else ():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.device.type != "cpu":
                self._buffers[name] = buffer.to(moved.dtype)
        return self
