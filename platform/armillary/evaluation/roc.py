"""The exact ROC curve of two streams of scores, in bounded memory.

The smaller stream ("held") is sorted; the larger one ("streamed") passes block by block and is counted into the gaps
between held scores. That is all a ROC curve contains: between two neighbouring held scores it is a straight line. When
even the smaller stream is larger than ``capacity``, the range of scores is cut (by histogram passes) into parts that
fit, which are treated one after another, from the highest scores down. Nothing is approximated on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

import numpy as np

from armillary.evaluation.result import Floats, Ints
from armillary.evaluation.similarity import GRID, threads

# Held scores at a time: about 0.4 GB with the counts that go with them.
CAPACITY = 1 << 23
_FOLDED = 1 << 20
_LOWEST, _HIGHEST = -GRID - 2, GRID + 2
_BINS = 4096

Stream = Callable[[], Iterable[Floats]]


@dataclass(frozen=True)
class Roc:
    """Exact figures of a ROC curve.

    Args:
        genuine: number of genuine pairs.
        impostor: number of impostor pairs.
        auc: area under the curve, ties counted one half.
        eer: the rate at which false accepts equal false rejects, linear between neighbouring thresholds.
        far: false accept rates, ascending, from 0 to 1: every one there is, or a log-spaced choice of at most 600.
        tar: at each, the highest true accept rate of a threshold whose false accept rate is not above ``far``.
        threshold: that threshold, a cosine similarity; a pair is accepted at or above it.
    """

    genuine: int
    impostor: int
    auc: float
    eer: float
    far: Floats
    tar: Floats
    threshold: Floats


@dataclass
class _Accumulator:
    """Folds the vertices of a curve, brought in the order of falling thresholds, into the figures of :class:`Roc`."""

    genuine: int
    impostor: int
    allowed: Ints

    def __post_init__(self) -> None:
        self.accepted_genuine, self.accepted_impostor = 0, 0
        self.doubled_area = 0.0
        self.eer: float | None = None
        self.best = np.zeros(len(self.allowed), dtype=np.int64)
        self.threshold = np.full(len(self.allowed), _HIGHEST)

    def add(self, genuine: Ints, impostor: Ints, threshold: Floats) -> None:
        """Takes the pairs newly accepted at each of some falling thresholds (grid units)."""
        tp = np.concatenate(([0], np.cumsum(genuine))) + self.accepted_genuine
        fp = np.concatenate(([0], np.cumsum(impostor))) + self.accepted_impostor
        self.doubled_area += float(np.dot(impostor.astype(np.float64), (tp[1:] + tp[:-1]).astype(np.float64)))
        if self.eer is None:
            self._cross(tp, fp)
        last = np.searchsorted(fp[1:], self.allowed, side="right") - 1
        found = last >= 0
        self.best[found] = tp[1:][last[found]]
        self.threshold[found] = threshold[last[found]]
        self.accepted_genuine, self.accepted_impostor = int(tp[-1]), int(fp[-1])

    def _cross(self, tp: Ints, fp: Ints) -> None:
        """Finds where FAR = 1 - TAR: their sum grows along the curve and passes 1 once."""
        total = tp / self.genuine + fp / self.impostor
        after = int(np.searchsorted(total, 1.0))
        if after == len(total):
            return
        share = (1.0 - total[after - 1]) / (total[after] - total[after - 1])
        self.eer = float((fp[after - 1] + share * (fp[after] - fp[after - 1])) / self.impostor)

    def roc(self) -> Roc:
        """The curve, once everything was added."""
        area = self.doubled_area / (2.0 * self.genuine * self.impostor)
        if self.eer is None:
            raise ValueError("the streams brought fewer scores than announced")
        far, tar = self.allowed / self.impostor, self.best / self.genuine
        return Roc(self.genuine, self.impostor, area, self.eer, far, tar, self.threshold / GRID)


def allowed_false_accepts(impostor: int, points: int = 600) -> Ints:
    """The numbers of false accepts at which the curve is read off.

    All of them up to ``points``; beyond, log-spaced ones, with every power of ten as a rate that the pairs resolve.
    """
    if impostor < points:
        return np.arange(impostor + 1, dtype=np.int64)
    spaced = np.geomspace(1, impostor, points // 2)
    linear = np.linspace(0, impostor, points // 4)
    powers = [impostor // 10**k for k in range(20)]
    return np.unique(np.concatenate((spaced, linear, powers)).astype(np.int64))


def roc_curve(
    genuine: Stream, impostor: Stream, num_genuine: int, num_impostor: int, *, capacity: int | None = None
) -> Roc:
    """The exact curve of two streams of scores in grid units (see :func:`similarity.grid_scores`).

    Args:
        genuine: gives the scores of same-class pairs in blocks, the same ones each time it is called.
        impostor: gives those of different-class pairs.
        num_genuine: how many there are, at least 1.
        num_impostor: how many there are, at least 1.
        capacity: scores sorted at a time.
    """
    capacity = capacity or CAPACITY
    fold = _Accumulator(num_genuine, num_impostor, allowed_false_accepts(num_impostor))
    swap = num_impostor < num_genuine
    held, streamed = (impostor, genuine) if swap else (genuine, impostor)
    for low, high in _ranges(held, _LOWEST, _HIGHEST, min(num_genuine, num_impostor), capacity):
        values, counts = _collect(held, low, high)
        slots = _count_into_gaps(streamed, values, low, high)
        # In parts, so that the temporaries of a fold stay small beside the scores that are held.
        for stop in range(len(slots), 0, -_FOLDED):
            streamed_new, held_new, threshold = _descend(values, counts, slots, low, max(0, stop - _FOLDED), stop)
            fold.add(streamed_new if swap else held_new, held_new if swap else streamed_new, threshold)
    return fold.roc()


def _descend(values: Floats, counts: Ints, slots: Ints, low: float, start: int, stop: int) -> tuple[Ints, Ints, Floats]:
    """Slots ``start`` to ``stop`` from the highest scores down: streamed and held scores, and their threshold."""
    slot = np.arange(stop - 1, start - 1, -1)
    at_held, index = slot % 2 == 1, slot // 2
    held = np.where(at_held, np.append(counts, 0)[index], 0)
    # Everything in a gap is accepted just above the held score below it; scores are whole numbers here.
    above_held = np.append(low - 1, values)[index] + 1
    return slots[slot], held, np.where(at_held, np.append(values, 0.0)[index], above_held)


def _ranges(stream: Stream, low: float, high: float, count: int, capacity: int) -> Iterator[tuple[float, float]]:
    """Half-open ranges ``[low, high)``, highest first, that hold at most ``capacity`` scores or one single value."""
    if count <= capacity or high - low <= 1:
        yield low, high
        return
    edges = np.unique(np.rint(np.linspace(low, high, _BINS + 1)))
    histogram = np.zeros(len(edges) - 1, dtype=np.int64)
    for block in stream():
        inside = block[(block >= low) & (block < high)]
        histogram += np.bincount(np.searchsorted(edges, inside, side="right") - 1, minlength=len(histogram))
    top, held = len(histogram), 0
    for index in range(len(histogram) - 1, -1, -1):
        if held + histogram[index] > capacity:
            if top > index + 1:
                yield from _ranges(stream, float(edges[index + 1]), float(edges[top]), held, capacity)
            top, held = index + 1, 0
        if histogram[index] > capacity:
            yield from _ranges(stream, float(edges[index]), float(edges[top]), int(histogram[index]), capacity)
            top = index
        else:
            held += int(histogram[index])
    if top:
        yield from _ranges(stream, float(edges[0]), float(edges[top]), held, capacity)


def _collect(stream: Stream, low: float, high: float) -> tuple[Floats, Ints]:
    """The distinct scores in ``[low, high)``, ascending, and how often each occurs."""
    if high - low <= 1:
        total = sum(int(np.count_nonzero(block == low)) for block in stream())
        return np.array([low]), np.array([total], dtype=np.int64)
    inside = np.concatenate([block[(block >= low) & (block < high)] for block in stream()] or [np.empty(0)])
    inside.sort()
    starts = _run_starts(inside)
    counts = np.diff(np.append(starts, len(inside)))
    return inside[starts], counts


def _count_into_gaps(stream: Stream, values: Floats, low: float, high: float) -> Ints:
    """Counts scores in ``[low, high)``: slot 2i lies below ``values[i]`` (and above the one before), 2i+1 is equal."""
    slots = np.zeros(2 * len(values) + 1, dtype=np.int64)
    padded = np.append(values, np.inf)
    everything = low <= _LOWEST and high >= _HIGHEST
    adding = Lock()

    def count(block: Floats) -> None:
        # Sorted queries walk through the values in order: several times faster than random ones.
        inside = np.sort(block if everything else block[(block >= low) & (block < high)])
        if len(values) < len(inside):
            below = _ranks(inside, values)
            with adding:
                slots[:] += np.diff(below, prepend=0, append=len(inside))
            return
        position = np.searchsorted(values, inside)
        slot = 2 * position + (padded[position] == inside)
        starts = _run_starts(slot)
        with adding:
            slots[slot[starts]] += np.diff(np.append(starts, len(slot)))

    _in_threads(stream, count)
    return slots


def _ranks(ascending: Floats, values: Floats) -> Ints:
    """Of each of some distinct values: how many are below it, and how many not above it, in turns, ``(2 v,)``."""
    left = np.searchsorted(ascending, values)
    right = left.copy()
    tied = np.append(ascending, np.inf)[left] == values
    right[tied] = np.searchsorted(ascending, values[tied], side="right")
    return np.stack((left, right), axis=1).reshape(-1)


def _in_threads(stream: Stream, work: Callable[[Floats], None]) -> None:
    """Passes every block to ``work``; while one thread makes a block, the others work on theirs."""
    blocks, making = iter(stream()), Lock()

    def run() -> None:
        while True:
            with making:
                block = next(blocks, None)
            if block is None:
                return
            work(block)

    count = threads()
    with ThreadPoolExecutor(count) as pool:
        for future in [pool.submit(run) for _ in range(count)]:
            future.result()


def _run_starts(ascending: Floats | Ints) -> Ints:
    """Where each run of equal values begins."""
    if not len(ascending):
        return np.empty(0, dtype=np.int64)
    return np.concatenate(([0], np.flatnonzero(ascending[1:] != ascending[:-1]) + 1))
