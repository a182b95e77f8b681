"""Rankings: every evaluated image asks for its class among all the others.

Ties count against the system: an image of another class that scores exactly as high as a right one is ranked before
it, so that a collapsed encoder finds nothing. A query whose class has no other image has nothing to find and is left
out; when that is so for all, the protocol refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import local

import numpy as np

from armillary.evaluation.open_set import open_set
from armillary.evaluation.result import EvaluationSet, Floats, Ints, ProtocolResult
from armillary.evaluation.similarity import block_rows, grid_scores, normalize, threads
from armillary.spec.errors import UserError

# Ranks a CMC curve shows.
CMC_RANKS = 100
RECALL_AT = (1, 2, 4, 8, 10, 100)
# Scores in a block of a thread, 64 MB: with fewer rows a matrix product spends its time on fetching the columns.
_ELEMENTS = 1 << 23


class Rankings:
    """Leave-one-out queries of a labelled set, in blocks, ordered by class so that a query's mates are neighbours.

    Args:
        data: the evaluated set.
        protocol: named in the error.
        elements: scores in a block.

    Raises:
        UserError: no class has two images.
    """

    def __init__(self, data: EvaluationSet, protocol: str, *, elements: int | None = None) -> None:
        sizes = np.bincount(data.labels)[data.labels]
        order = np.lexsort((data.labels, sizes))
        self.points, labels = normalize(data.embeddings, order), data.labels[order]
        # Row i's class are rows first[i] to last[i]; sorted by size, so that classes of one image come first.
        starts = np.concatenate(([0], np.flatnonzero(np.diff(labels)) + 1, [len(labels)]))
        own = np.searchsorted(starts, np.arange(len(labels)), side="right")
        self.first, self.last = starts[own - 1], starts[own]
        self.begin = int(np.searchsorted(sizes[order], 2))
        self.elements = elements or _ELEMENTS
        if self.begin == len(labels):
            raise UserError(f"{protocol} needs a class with two images or more; every evaluated class has one")

    def __len__(self) -> int:
        """How many images have a mate, and so are queries."""
        return len(self.points) - self.begin

    def map(self, measure: Callable[[Floats, Ints, Ints], Floats]) -> Floats:
        """Applies ``measure`` to blocks of queries and puts its results in one array, in the order of the queries.

        Args:
            measure: gets a block of scores ``(q, n)`` and the columns ``first`` to ``last`` of each query's class,
                ``(q,)`` each; returns an array of first dimension q. Scores are in grid units, those of mates less one
                half (so that a mate falls behind others it ties with, and is known as the only broken number), and
                infinite at the query itself. Blocks run in as many threads as torch uses.
        """
        from threadpoolctl import threadpool_limits

        step = block_rows(len(self.points), self.elements)
        buffers = local()

        def block(start: int) -> Floats:
            stop = min(start + step, len(self.points))
            if not hasattr(buffers, "scores"):
                buffers.scores = np.empty((step, len(self.points)))
            scores = grid_scores(self.points[start:stop], self.points, out=buffers.scores[: stop - start])
            first, last = self.first[start:stop], self.last[start:stop]
            for row, (scored, low, high) in enumerate(zip(scores, first, last, strict=True), start):
                scored[low:high] -= 0.5
                scored[row] = np.inf
            return measure(scores, first, last)

        # A product in each of the threads, not each product in all of them: nobody waits for the others.
        count = threads()
        with threadpool_limits(1, "blas"), ThreadPoolExecutor(count) as pool:
            return np.concatenate(list(pool.map(block, range(self.begin, len(self.points), step))))


def first_mate_ranks(rankings: Rankings) -> Ints:
    """The rank (from 1) of each query's best-placed mate."""

    def measure(scores: Floats, first: Ints, last: Ints) -> Floats:
        own = (row[low:high] for row, low, high in zip(scores, first, last, strict=True))
        best = np.array([row[np.isfinite(row)].max() for row in own])
        # The query itself, which is infinite, makes ranks count from 1.
        return np.asarray(np.count_nonzero(scores > best[:, None], axis=1), dtype=np.float64)

    return rankings.map(measure).astype(np.int64)


def mate_ranks(scores: Floats, first: int, last: int) -> Ints:
    """The rank (from 1) of each mate of one query among all, ascending, ``(R,)``, R >= 1.

    Args:
        scores: ``(n,)`` as :meth:`Rankings.map` gives them: whole numbers, and infinity at the query.
        first: where the query's class begins, whose scores are whole numbers less one half.
        last: where it ends.
    """
    # What scores below the lowest mate changes no rank.
    rivals = scores[scores >= scores[first:last].min()]
    rivals.sort()
    mates = np.flatnonzero(np.floor(rivals) != rivals)[::-1]
    # The query itself stands at the end.
    return np.asarray(len(rivals) - 1 - mates, dtype=np.int64)


def identification(data: EvaluationSet, *, elements: int | None = None) -> ProtocolResult:
    """Identification: closed set by leave one out, each image against all others, and open set with a gallery.

    ``rank1``, ``rank5``
        Share of queries with an image of their class among the 1 or 5 best-scored others (with fewer than five others,
        among all).
    ``dir_at_far_1e-k``
        Open set: the share of probes of enrolled classes whose class is ranked first and accepted, at the lowest
        threshold that accepts no more than 10**-k of the probes of classes that are not enrolled. Half of the classes
        with two images are enrolled, drawn by ``seed``; see :func:`armillary.evaluation.open_set.open_set`. Left out
        where the probes do not resolve the rate.

    Curves: ``cmc``, whose entry k-1 is the share found within rank k, up to rank 100; ``dir_far`` and ``dir_rate``.

    Sources: Phillips, Grother, Micheals, Evaluation methods in face recognition, Handbook of Face Recognition, 2005.

    Raises:
        UserError: no class has two images.
    """
    ranks = first_mate_ranks(Rankings(data, "identification", elements=elements))
    deepest = min(CMC_RANKS, len(data.labels) - 1)
    found = np.bincount(np.minimum(ranks, deepest + 1), minlength=deepest + 2)[1 : deepest + 1]
    cmc = np.cumsum(found) / len(ranks)
    metrics = {f"identification/rank{k}": float(cmc[min(k, deepest) - 1]) for k in (1, 5)}
    rates, curves = open_set(data.embeddings, data.labels, data.seed)
    metrics |= {f"identification/{name}": value for name, value in rates.items()}
    return ProtocolResult(metrics, {"cmc": cmc, **curves})


def retrieval(data: EvaluationSet, *, elements: int | None = None) -> ProtocolResult:
    """Retrieval, leave one out: each image's R mates (other images of its class) should fill its first R places.

    ``recall_at_1``, ``recall_at_2``, ``recall_at_4``, ``recall_at_8``, ``recall_at_10``, ``recall_at_100``
        Share of queries with a mate among the first k places (with fewer than k others, among all).
    ``r_precision``
        Share of mates among the first R places, mean over queries.
    ``map_at_r``
        (1/R) times the sum over places i <= R held by a mate of the precision at i, mean over queries.
    ``map``
        (1/R) times the sum over all places i held by a mate of the precision at i, mean over queries.

    Sources: Jegou, Douze, Schmid, Product Quantization for Nearest Neighbor Search, TPAMI 2011 (Recall@k); Musgrave,
    Belongie, Lim, A Metric Learning Reality Check, ECCV 2020, section 3.2 (R-precision, MAP@R); Manning, Raghavan,
    Schuetze, Introduction to Information Retrieval, 2008, section 8.4 (MAP).

    Raises:
        UserError: no class has two images.
    """

    def measure(scores: Floats, first: Ints, last: Ints) -> Floats:
        return np.stack([_places(mate_ranks(*query)) for query in zip(scores, first, last, strict=True)])

    means = Rankings(data, "retrieval", elements=elements).map(measure).mean(axis=0)
    names = (*(f"recall_at_{k}" for k in RECALL_AT), "r_precision", "map_at_r", "map")
    return ProtocolResult({f"retrieval/{name}": float(mean) for name, mean in zip(names, means, strict=True)})


def _places(ranks: Ints) -> Floats:
    """Of one query: found within each k, R-precision, average precision up to place R, and in full."""
    size = len(ranks)
    precision = np.arange(1, size + 1) / ranks
    within = int(np.searchsorted(ranks, size, side="right"))
    found = (ranks[0] <= np.array(RECALL_AT)).astype(np.float64)
    return np.array([*found, within / size, precision[:within].sum() / size, precision.sum() / size])
