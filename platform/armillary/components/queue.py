"""A queue of past keys: negatives from earlier batches, equal on all workers (catalog: feature_queue)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from armillary.collectives import gather_no_grad
from armillary.components.held import Held, HostBuffers
from armillary.losses.tensors import normalize


class Queue(HostBuffers):
    """The last ``capacity`` keys of the global batches, oldest overwritten first (He et al., MoCo, 2020, section 3.2).

    Buffers only: checkpoints carry them, engines do not shard them, every worker holds the same.

    ::

        self.queue = Queue(4096, (128,))                     # in build
        logits = query @ self.queue.rows.T                   # in forward: what earlier steps wrote
        self.queue.hold(self.step, keys)
        self.queue.write()                                   # in after_step

    Args:
        capacity: number of keys.
        shape: of one key, e.g. ``(128,)``.
        start: ``random``: unit vectors, easy negatives until they are overwritten; ``zeros``: see :meth:`filled`.
        columns: names of int64 numbers kept with each key (labels, indices); -1 where nothing was written.
        host: keeps the keys in main memory whatever device the rest is on; each use copies them there.
    """

    stored: Tensor
    pointer: Tensor
    count: Tensor

    def __init__(
        self,
        capacity: int,
        shape: Sequence[int],
        start: Literal["random", "zeros"] = "random",
        columns: Sequence[str] = (),
        host: bool = False,
    ) -> None:
        super().__init__(host)
        if capacity < 1:
            raise ValueError(f"a queue needs room for a key, found capacity {capacity}")
        rows = normalize(torch.randn(capacity, *shape)) if start == "random" else torch.zeros(capacity, *shape)
        self.register_buffer("stored", rows)
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.columns = tuple(columns)
        for name in self.columns:
            self.register_buffer(_column(name), torch.full((capacity,), -1))
        self._held = Held()

    def __len__(self) -> int:
        """How many keys were written, at most the capacity."""
        return int(self.count)

    @property
    def rows(self) -> Tensor:
        """The keys ``(capacity, *shape)``, on the device of the rest of the model."""
        return self._near(self.stored)

    def filled(self) -> Tensor:
        """``(capacity,)`` bool: rows that hold a key rather than their start."""
        return self._near(torch.arange(len(self.stored), device=self.stored.device) < self.count)

    def column(self, name: str) -> Tensor:
        """The numbers ``(capacity,)`` int64 kept with the keys."""
        return self._near(self.get_buffer(_column(name)))

    def hold(self, step: int, keys: Tensor, **columns: Tensor) -> None:
        """Sets this worker's keys ``(batch, *shape)`` and their numbers aside for :meth:`write`."""
        if set(columns) != set(self.columns):
            raise ValueError(f"the queue keeps {self.columns or 'no columns'}, found {tuple(columns)}")
        self._held.add(step, rows=keys, **columns)

    @torch.no_grad()
    def write(self) -> None:
        """Puts the keys held on all workers into the queue, in rank order; does nothing when none are held."""
        held = self._held.take()
        if not held:
            return
        capacity = len(self.stored)
        total = 0
        for name, local in held.items():
            values = gather_no_grad(local).to(self.stored.device)
            total = len(values)
            # Of more keys than there is room for, the last ones stay.
            kept = values[-capacity:]
            slots = (self.pointer + total - len(kept) + torch.arange(len(kept), device=kept.device)) % capacity
            target = self.stored if name == "rows" else self.get_buffer(_column(name))
            target[slots] = kept.to(target.dtype)
        self.pointer.copy_((self.pointer + total) % capacity)
        self.count.copy_((self.count + total).clamp_max(capacity))


def _column(name: str) -> str:
    return f"column_{name}"
