"""Rankings: every evaluated image asks for its class among all the others.

Ties count against the system: an image of another class that scores exactly as high as a right one is ranked before
it, so that a collapsed encoder finds nothing. A query whose class has no other image has nothing to find and is left
out; when that is so for all, the protocol refuses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from armillary.evaluation.result import EvaluationSet, Floats, Ints, ProtocolResult
from armillary.evaluation.similarity import block_rows, grid_scores, normalize
from armillary.spec.errors import UserError

# Ranks a CMC curve shows.
CMC_RANKS = 100


@dataclass(frozen=True)
class QueryBlock:
    """Some queries and their scores against everything.

    Args:
        label: ``(q,)`` the queries' classes.
        mates: ``(q,)`` other images of that class; at least 1.
        scores: ``(q, n)`` in grid units; mates half a unit lower (so that ties count against them), the query itself
            minus infinity.
        best: ``(q,)`` the score of each query's best-placed mate.
    """

    label: Ints
    mates: Ints
    scores: Floats
    best: Floats


class Rankings:
    """Leave-one-out queries of a labelled set in blocks, ordered by class size so that a block's queries are alike.

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
        self.points, self.labels, self.mates = normalize(data.embeddings, order), data.labels[order], sizes[order] - 1
        self.elements = elements
        self.first = int(np.searchsorted(self.mates, 1))
        self.count = len(order) - self.first
        if not self.count:
            raise UserError(f"{protocol} needs a class with two images or more; every evaluated class has one")

    def __iter__(self) -> Iterator[QueryBlock]:
        size = len(self.labels)
        # Sorted by class, so that the images of a query's class are neighbours.
        changes = np.flatnonzero(np.diff(self.labels)) + 1
        borders = np.concatenate(([0], changes, [size]))
        step = block_rows(size, self.elements)
        for start in range(self.first, size, step):
            stop = min(start + step, size)
            scores = grid_scores(self.points[start:stop], self.points)
            best = np.empty(stop - start)
            own = np.searchsorted(borders, np.arange(start, stop), side="right")
            for row, (first, last) in enumerate(zip(borders[own - 1], borders[own], strict=True)):
                mates = scores[row, first:last]
                mates -= 0.5
                scores[row, start + row] = -np.inf
                best[row] = mates.max()
            yield QueryBlock(self.labels[start:stop], self.mates[start:stop], scores, best)


def first_mate_ranks(rankings: Rankings) -> Ints:
    """The rank (from 1) of each query's best-placed mate."""
    ranks = [1 + np.count_nonzero(block.scores > block.best[:, None], axis=1) for block in rankings]
    return np.concatenate(ranks).astype(np.int64)


def identification(data: EvaluationSet, *, elements: int | None = None) -> ProtocolResult:
    """Closed-set identification, leave one out: each image against all others.

    ``rank1``, ``rank5``
        Share of queries with an image of their class among the 1 or 5 best-scored others (with fewer than five others,
        among all).

    Curve: ``cmc``, whose entry k-1 is the share found within rank k, up to rank 100.

    Source: Phillips, Grother, Micheals, Evaluation methods in face recognition, Handbook of Face Recognition, 2005.

    Raises:
        UserError: no class has two images.
    """
    ranks = first_mate_ranks(Rankings(data, "identification", elements=elements))
    deepest = min(CMC_RANKS, len(data.labels) - 1)
    found = np.bincount(np.minimum(ranks, deepest + 1), minlength=deepest + 2)[1 : deepest + 1]
    cmc = np.cumsum(found) / len(ranks)
    metrics = {f"identification/rank{k}": float(cmc[min(k, deepest) - 1]) for k in (1, 5)}
    return ProtocolResult(metrics, {"cmc": cmc})


def retrieval(data: EvaluationSet, *, elements: int | None = None) -> ProtocolResult:
    """Retrieval, leave one out: each image's R mates (other images of its class) should fill its first R places.

    ``recall_at_1``
        Share of queries whose best-scored other image is a mate.
    ``r_precision``
        Share of mates among the first R places, mean over queries.
    ``map_at_r``
        (1/R) times the sum over places i <= R held by a mate of the precision at i, mean over queries.

    Source: Musgrave, Belongie, Lim, A Metric Learning Reality Check, ECCV 2020, section 3.2.

    Raises:
        UserError: no class has two images.
    """
    import torch

    rankings = Rankings(data, "retrieval", elements=elements)
    recall, precision, average = 0.0, 0.0, 0.0
    for block in rankings:
        deepest = int(block.mates.max())
        top = torch.topk(torch.from_numpy(block.scores), deepest, dim=1).indices.numpy()
        place = np.arange(1, deepest + 1)
        hits = (rankings.labels[top] == block.label[:, None]) & (place <= block.mates[:, None])
        recall += float(hits[:, 0].sum())
        precision += float((hits.sum(axis=1) / block.mates).sum())
        average += float(((hits * np.cumsum(hits, axis=1) / place).sum(axis=1) / block.mates).sum())
    names = ("recall_at_1", "r_precision", "map_at_r")
    sums = (recall, precision, average)
    return ProtocolResult({f"retrieval/{n}": s / rankings.count for n, s in zip(names, sums, strict=True)})
