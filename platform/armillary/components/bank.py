"""A memory bank: one row for every sample of the training set, found by its index."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from armillary.collectives import all_reduce_sum, gather_no_grad
from armillary.components.held import Held, HostBuffers
from armillary.losses.tensors import normalize


class MemoryBank(HostBuffers):
    """Rows by ``Batch.index``, the same on every worker (Wu et al., instance discrimination, 2018, section 3.2).

    ::

        self.bank = MemoryBank(context.dataset_size, (128,))      # in build
        old = self.bank.lookup(batch.index)                       # in forward
        self.bank.hold(self.step, batch.index, new)
        self.bank.write(momentum=0.5)                             # in after_step

    Args:
        size: number of rows, ``BuildContext.dataset_size``.
        shape: of one row.
        start: ``random`` unit vectors, or ``zeros``.
        host: keeps the rows in main memory whatever device the rest is on; what is used of them is copied there.

    Attributes:
        stored: ``(size, *shape)``, where the rows are kept.
    """

    stored: Tensor
    marks: Tensor

    def __init__(
        self, size: int, shape: Sequence[int], start: Literal["random", "zeros"] = "random", host: bool = False
    ) -> None:
        super().__init__(host)
        rows = normalize(torch.randn(size, *shape)) if start == "random" else torch.zeros(size, *shape)
        self.register_buffer("stored", rows)
        self.register_buffer("marks", torch.zeros(size, dtype=torch.bool))
        self._held = Held()

    @property
    def rows(self) -> Tensor:
        """All rows ``(size, *shape)``, on the device of the rest of the model."""
        return self._near(self.stored)

    @property
    def written(self) -> Tensor:
        """``(size,)`` bool: the rows that were written, on that device."""
        return self._near(self.marks)

    def lookup(self, index: Tensor) -> Tensor:
        """The rows ``(len(index), *shape)`` of samples, on the index's device; a copy."""
        return self.stored[index.to(self.stored.device)].to(index.device)

    def known(self, index: Tensor) -> Tensor:
        """Whether the rows of samples were written, ``(len(index),)`` bool, on the index's device."""
        return self.marks[index.to(self.marks.device)].to(index.device)

    def hold(self, step: int, index: Tensor, rows: Tensor) -> None:
        """Sets this worker's rows ``(batch, *shape)`` of samples ``index (batch,)`` aside for :meth:`write`."""
        self._held.add(step, index=index, rows=rows)

    @torch.no_grad()
    def write(self, momentum: float = 0.0, unit_length: bool = True) -> None:
        """Writes what all workers hold; of a sample held twice the last in rank order counts.

        Args:
            momentum: share of the old row that is kept, in [0, 1].
            unit_length: scales what is written to length 1.
        """
        held = self._held.take()
        if held:
            self.mix(gather_no_grad(held["index"]), gather_no_grad(held["rows"]), momentum, unit_length)

    @torch.no_grad()
    def mix(self, index: Tensor, rows: Tensor, momentum: float = 0.0, unit_length: bool = True) -> None:
        """What :meth:`write` does, with rows ``(n, *shape)`` that are equal on all workers."""
        index, last = _last_of_each(index.to(self.stored.device))
        mixed = torch.lerp(rows.to(self.stored.device, self.stored.dtype)[last], self.stored[index], momentum)
        self.stored[index] = normalize(mixed) if unit_length else mixed
        self.marks[index] = True

    @torch.no_grad()
    def refresh(self, rows: Tensor, seen: Tensor) -> None:
        """Replaces the rows of the samples that a pass over the data has seen; see :func:`encode_all`."""
        seen = seen.to(self.stored.device)
        self.stored[seen] = rows.to(self.stored.device, self.stored.dtype)[seen]
        self.marks |= seen


def _last_of_each(index: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct values of ``index``, and where each stands last."""
    distinct, inverse = index.unique(return_inverse=True)
    position = torch.arange(len(index), device=index.device)
    last = torch.zeros_like(distinct).scatter_reduce_(0, inverse, position, "amax", include_self=False)
    return distinct, last


def gather_by_index(index: Tensor, rows: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Puts the rows of all workers in order of their index.

    Workers may bring different numbers of rows. A sample that several bring counts as the mean of what they bring.

    Args:
        index: ``(local,)`` int64 below ``size``.
        rows: ``(local, *shape)`` floating point.
        size: number of rows wanted.

    Returns:
        ``(size, *shape)``, zeros where no worker has a row, and ``(size,)`` bool, where one has; equal on all workers.
    """
    total = rows.new_zeros(size, *rows.shape[1:]).index_add_(0, index, rows)
    count = torch.zeros(size, dtype=torch.int64, device=rows.device).index_add_(0, index, torch.ones_like(index))
    total, count = all_reduce_sum(total), all_reduce_sum(count)
    divisor = count.clamp_min(1).to(rows.dtype).view(-1, *[1] * (rows.ndim - 1))
    return total / divisor, count > 0


@torch.no_grad()
def encode_all(
    batches: Iterable[Any], encode: Callable[[Any], Tensor], size: int, *modules: nn.Module
) -> tuple[Tensor, Tensor]:
    """Encodes the whole training set once, each worker its part; for ``Objective.before_epoch``.

    Args:
        batches: this worker's part, ``samples()``.
        encode: from a batch to rows ``(batch, *shape)``.
        size: ``BuildContext.dataset_size``.
        modules: what ``encode`` uses: in evaluation mode meanwhile, so that no statistics change and workers may have
            different numbers of batches.

    Returns:
        Rows ``(size, *shape)`` by index and where there is one, as :func:`gather_by_index`.

    Raises:
        ValueError: this worker's part is empty.
    """
    modes = [(module, module.training) for root in modules for module in root.modules()]
    for root in modules:
        root.eval()
    try:
        parts = [(batch.index, encode(batch).float()) for batch in batches]
    finally:
        for module, mode in modes:
            module.training = mode
    if not parts:
        raise ValueError("a worker's part of the training set is empty: there are more workers than images")
    return gather_by_index(torch.cat([index for index, _ in parts]), torch.cat([rows for _, rows in parts]), size)
