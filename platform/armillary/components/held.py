"""Tensors that a step's forward passes set aside for its end."""

from __future__ import annotations

import torch
from torch import Tensor


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
