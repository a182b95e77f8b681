"""Images that stay in the store and are read, decoded and resized ahead of the training step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from armillary.data.decode import Cells
from armillary.data.pixels import PixelSource, Positions

# Batches that are decoded ahead, and batches whose row groups are read ahead of those.
DECODE_AHEAD, READ_AHEAD = 4, 24
# Reads wait for disks and networks, not for cores.
READERS = 4


class StoredImages:
    """Some images of a dataset in the store.

    Memory holds the stored bytes of the row groups that are in use (see :meth:`ahead`) and a few decoded batches.

    Args:
        source: the dataset's pixels.
        rows: ``(N,)`` int64, which images, by ``index``.
        buffer: images of a shuffling window, see :mod:`armillary.data.windows`.
        threads: that decode; ``None`` takes as many as torch computes with.
    """

    dtype = torch.uint8
    ndim = 4

    def __init__(self, source: PixelSource, rows: Tensor, buffer: int, threads: int | None = None) -> None:
        self.source, self.rows, self.buffer, self.threads = source, rows, buffer, threads
        self._parts = source.groups()
        self._starts = torch.tensor([0, *(part[2] for part in self._parts)]).cumsum(0)

    @property
    def shape(self) -> torch.Size:
        """``(N, C, H, W)``."""
        return torch.Size((len(self.rows), *self.source.shape[1:]))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Positions) -> Tensor:
        """Images by position, ``(n, C, H, W)``; every call reads their row groups anew: :meth:`ahead` is for many."""
        return next(self.ahead([torch.arange(len(self.rows))[rows]]))

    def select(self, rows: Tensor) -> StoredImages:
        """The images at those positions."""
        return StoredImages(self.source, self.rows[rows], self.buffer, self.threads)

    def groups(self) -> Tensor:
        """The row group of every image, ``(N,)`` int64, counted over all shards."""
        return torch.searchsorted(self._starts, self.rows, right=True) - 1

    def ahead(self, plan: Sequence[Tensor]) -> Iterator[Tensor]:
        """The images of one batch after another, read and decoded in threads while the caller works.

        Nothing before the first batch is read. A row group is kept as long as the plan needs it again within a buffer's
        worth of batches, so that memory is bounded by the buffer however long the plan is.

        Args:
            plan: positions of each batch, ``(n,)`` int64.

        Yields:
            uint8 ``(n, C, H, W)``.

        Raises:
            UserError: a shard is missing or damaged.
        """
        if not len(plan):
            return
        threads = self.threads or torch.get_num_threads()
        patience = max(1, -(-self.buffer // max(1, len(plan[0]))))
        groups = self.groups()
        schedule = _Schedule.of([groups[rows] for rows in plan], patience)
        with (
            ThreadPoolExecutor(READERS, thread_name_prefix="read") as readers,
            ThreadPoolExecutor(threads, thread_name_prefix="decode") as decoders,
        ):
            pipeline = _Pipeline(self, plan, schedule, readers, decoders, threads)
            try:
                yield from pipeline.batches()
            finally:
                # The caller may stop in the middle, or a shard may be damaged: what is queued is not worth doing.
                readers.shutdown(wait=False, cancel_futures=True)
                decoders.shutdown(wait=False, cancel_futures=True)

    def cells(self, group: int) -> Cells:
        """The stored images of a row group, counted over all shards."""
        shard, number, _ = self._parts[group]
        return self.source.cells(shard, number)

    def place(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Row group, and row within it, of positions."""
        stored = self.rows[rows]
        group = torch.searchsorted(self._starts, stored, right=True) - 1
        return group, stored - self._starts[group]


@dataclass(frozen=True)
class _Schedule:
    """The row groups that each batch needs, and those that are not needed soon after it."""

    needed: list[list[int]]
    dropped: list[list[int]]

    @classmethod
    def of(cls, groups: Sequence[Tensor], patience: int) -> _Schedule:
        """From the row groups of every batch's images; ``patience`` is how many batches an idle group is kept."""
        needed = [torch.unique(part) for part in groups]
        steps = torch.arange(len(needed)).repeat_interleave(torch.tensor([len(part) for part in needed]))
        flat = torch.cat(needed)
        # Sorted by group, the next row tells when the group is needed next.
        order = torch.argsort(flat, stable=True)
        following = torch.full_like(steps, torch.iinfo(torch.int64).max)
        same = flat[order[1:]] == flat[order[:-1]]
        following[order[:-1][same]] = steps[order[1:]][same]
        idle = following - steps > patience
        ends = torch.bincount(steps[idle], minlength=len(needed)).tolist()
        dropped = [part.tolist() for part in flat[idle].split(ends)]
        return cls([part.tolist() for part in needed], dropped)


class _Pipeline:
    """Reads row groups some batches ahead, decodes a few batches ahead, hands batches out in order."""

    def __init__(
        self,
        images: StoredImages,
        plan: Sequence[Tensor],
        schedule: _Schedule,
        readers: ThreadPoolExecutor,
        decoders: ThreadPoolExecutor,
        threads: int,
    ) -> None:
        self.images, self.plan, self.schedule = images, plan, schedule
        self.readers, self.decoders, self.threads = readers, decoders, threads
        self._read: dict[int, Future[Cells]] = {}
        self._asked = 0

    def batches(self) -> Iterator[Tensor]:
        """See :meth:`StoredImages.ahead`."""
        ready: deque[tuple[NDArray[np.uint8], list[Future[None]]]] = deque()
        for step in range(len(self.plan)):
            while len(ready) < DECODE_AHEAD and step + len(ready) < len(self.plan):
                ready.append(self._start(step + len(ready)))
            out, parts = ready.popleft()
            wait(parts)
            for part in parts:
                part.result()
            yield torch.from_numpy(out)

    def _start(self, step: int) -> tuple[NDArray[np.uint8], list[Future[None]]]:
        while self._asked < min(step + READ_AHEAD, len(self.plan)):
            for group in self.schedule.needed[self._asked]:
                if group not in self._read:
                    self._read[group] = self.readers.submit(self.images.cells, group)
            self._asked += 1
        rows = self.plan[step]
        out = np.empty((len(rows), *self.images.source.shape[1:]), dtype=np.uint8)
        groups, places = (part.tolist() for part in self.images.place(rows))
        read = {group: self._read[group] for group in self.schedule.needed[step]}
        bounds = np.linspace(0, len(rows), self.threads + 1).astype(int).tolist()
        parts = [
            self.decoders.submit(self._decode, read, groups[start:end], places[start:end], out[start:end])
            for start, end in pairwise(bounds)
            if end > start
        ]
        self._forget(step)
        return out, parts

    def _decode(
        self, read: dict[int, Future[Cells]], groups: list[int], places: list[int], out: NDArray[np.uint8]
    ) -> None:
        cells = [read[group].result() for group in groups]
        data = [cell.data[place] for cell, place in zip(cells, places, strict=True)]
        shapes = np.stack([cell.shapes[place] for cell, place in zip(cells, places, strict=True)])
        self.images.source.decode(Cells(data, shapes), out)

    def _forget(self, step: int) -> None:
        if not self.schedule.dropped[step]:
            return
        # What was asked for already, by a batch within READ_AHEAD, stays.
        soon = {group for ahead in self.schedule.needed[step + 1 : self._asked] for group in ahead}
        for group in self.schedule.dropped[step]:
            if group not in soon:
                del self._read[group]
