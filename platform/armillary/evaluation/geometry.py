"""Geometry: how embeddings lie on the sphere, and whether they have collapsed. Labels are used by alignment alone."""

from __future__ import annotations

import numpy as np

from armillary.evaluation.result import EvaluationSet, Floats, Ints, ProtocolResult
from armillary.evaluation.similarity import block_rows, normalize


def alignment(points: Floats, labels: Ints) -> float | None:
    """Mean squared distance of same-class pairs of normalised ``points``; ``None`` without such a pair.

    Computed from class sums: over ordered pairs of a class with sum S and squared norms q, the sum of ``|x - y|**2`` is
    ``2 n sum(q) - 2 |S|**2``.
    """
    counts = np.bincount(labels).astype(np.float64)
    sums = np.zeros((len(counts), points.shape[1]))
    np.add.at(sums, labels, points)
    squares = np.bincount(labels, (points**2).sum(axis=1))
    ordered_pairs = float((counts * (counts - 1)).sum())
    if not ordered_pairs:
        return None
    total = float((2 * counts * squares - 2 * (sums**2).sum(axis=1)).sum())
    return max(0.0, total / ordered_pairs)


def uniformity(points: Floats, *, temperature: float = 2.0, elements: int | None = None) -> float:
    """Log of the mean over pairs of ``exp(-temperature * |x - y|**2)``; 0 when all coincide, lower is more uniform."""
    squares, size, total = (points**2).sum(axis=1), len(points), 0.0
    start = 0
    while start < size - 1:
        stop = min(size, start + block_rows(size - start, elements))
        distance = squares[start:stop, None] + squares[None, start:] - 2.0 * points[start:stop] @ points[start:].T
        later = np.arange(size - start)[None, :] > np.arange(stop - start)[:, None]
        total += float(np.exp(-temperature * np.maximum(distance[later], 0.0)).sum())
        start = stop
    return float(np.log(total / (size * (size - 1) / 2)))


def effective_rank(embeddings: Floats) -> float:
    """RankMe: the exponential of the entropy of :func:`spectrum`; 1 to ``min(n, d)``, and 0 when all are zero."""
    share = spectrum(embeddings)
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum())) if len(share) else 0.0


def spectrum(embeddings: Floats) -> Floats:
    """The singular values of the raw embeddings ``(min(n, d),)``, descending, as shares of their sum."""
    # Through the triangular factor: as exact as the direct way, and no n x d factor is made.
    values = np.linalg.svd(np.linalg.qr(embeddings, mode="r"), compute_uv=False)
    return np.asarray(values / (values.sum() or 1.0))


def geometry(data: EvaluationSet, *, elements: int | None = None) -> ProtocolResult:
    """How the evaluated embeddings are spread.

    ``alignment``
        Mean squared distance of same-class pairs on the unit sphere, 0 to 4, lower is tighter; left out when no class
        has two images.
    ``uniformity``
        Log mean Gaussian potential (t = 2) over all pairs on the unit sphere, from -8 to 0, lower is more uniform.
    ``effective_rank``
        RankMe of the raw embeddings (not centred), 1 to their width.
    ``mean_norm``
        Mean L2 norm of the raw embeddings.
    ``std_ratio``
        Mean over dimensions of the standard deviation on the unit sphere, times sqrt(width): 1 when spread evenly, 0
        when collapsed to a point.

    Curve: ``spectrum``, see :func:`spectrum`.

    Sources: Wang, Isola, Understanding Contrastive Representation Learning through Alignment and Uniformity, ICML
    2020; Garrido et al., RankMe, ICML 2023; Chen, He, Exploring Simple Siamese Representation Learning, CVPR 2021,
    section 4.1.
    """
    points = normalize(data.embeddings)
    aligned = alignment(points, data.labels)
    metrics = {} if aligned is None else {"geometry/alignment": aligned}
    metrics["geometry/uniformity"] = uniformity(points, elements=elements)
    metrics["geometry/effective_rank"] = effective_rank(data.embeddings)
    metrics["geometry/mean_norm"] = float(np.linalg.norm(data.embeddings, axis=1).mean())
    metrics["geometry/std_ratio"] = float(points.std(axis=0).mean() * np.sqrt(points.shape[1]))
    return ProtocolResult(metrics, {"spectrum": spectrum(data.embeddings)})
