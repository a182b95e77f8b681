"""Geometry: how embeddings lie on the sphere, whether they have collapsed, and what their norms tell."""

from __future__ import annotations

import numpy as np

from armillary.evaluation.reject import error_reject, rank_correlation
from armillary.evaluation.result import EvaluationSet, Floats, Ints, ProtocolResult
from armillary.evaluation.similarity import block_rows, normalize
from armillary.spec.errors import UserError

# Below these the embeddings are called collapsed: 1 is an even spread; RankMe as a share of the dimensions there are.
COLLAPSED_STD_RATIO = 0.3
COLLAPSED_RANK_SHARE = 0.02
MAP_POINTS = 2000


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
    return _entropy_rank(spectrum(embeddings))


def _entropy_rank(share: Floats) -> float:
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum())) if len(share) else 0.0


def spectrum(embeddings: Floats) -> Floats:
    """The singular values of the raw embeddings ``(min(n, d),)``, descending, as shares of their sum."""
    # Through the triangular factor: as exact as the direct way, and no n x d factor is made.
    values = np.linalg.svd(np.linalg.qr(embeddings, mode="r"), compute_uv=False)
    return np.asarray(values / (values.sum() or 1.0))


def center_angles(points: Floats, labels: Ints, *, elements: int | None = None) -> tuple[Floats, Floats]:
    """Angles of normalised ``points`` to their own class center and to the nearest other one, in degrees.

    A center is the normalised sum of the class's points; the own one leaves the point itself out, so that it is not
    drawn towards it. Classes of one point have no own angle.

    Returns:
        ``(m,)`` own angles of the points that have a class mate, and ``(n,)`` others, empty when there is one class.
    """
    counts = np.bincount(labels)
    sums = np.zeros((len(counts), points.shape[1]))
    np.add.at(sums, labels, points)
    several = counts[labels] > 1
    rest = normalize(sums[labels[several]] - points[several])
    own = _degrees(np.einsum("nd,nd->n", points[several], rest))
    present = np.flatnonzero(counts)
    if len(present) < 2:
        return own, np.empty(0)
    centers, nearest = normalize(sums, present), np.empty(len(points))
    step = block_rows(len(present), elements)
    for start in range(0, len(points), step):
        cosine = points[start : start + step] @ centers.T
        cosine[present[None, :] == labels[start : start + step, None]] = -np.inf
        nearest[start : start + step] = cosine.max(axis=1)
    return own, _degrees(nearest)


def _degrees(cosine: Floats) -> Floats:
    return np.asarray(np.degrees(np.arccos(np.clip(cosine, -1.0, 1.0))))


def collapse_warnings(std_ratio: float, rank: float, size: int, width: int) -> tuple[str, ...]:
    """Sentences for what looks like collapse.

    Args:
        std_ratio: of :func:`geometry`; complete collapse is when all points coincide.
        rank: effective rank; dimensional collapse is when points fill few directions.
        size: number of embeddings.
        width: of the embeddings.
    """
    warnings = []
    if std_ratio < COLLAPSED_STD_RATIO:
        warnings.append(
            f"the embeddings have collapsed to nearly one direction: their standard deviation on the unit sphere is "
            f"{std_ratio:.3g} of the 1/sqrt({width}) of an even spread"
        )
    least = max(2.0, COLLAPSED_RANK_SHARE * min(size, width))
    if min(size, width) > 2 and rank < least:
        warnings.append(f"the embeddings have collapsed to an effective rank of {rank:.1f} of {min(size, width)}")
    return tuple(warnings)


def projection(points: Floats, labels: Ints, seed: int) -> dict[str, Floats | Ints]:
    """An embedding map: up to 2,000 drawn points on the two main axes of a PCA, ``map (m, 2)`` and ``map_label (m,)``.

    Empty for points of one dimension.
    """
    from sklearn.decomposition import PCA

    if min(points.shape) < 2:
        return {}
    chosen = np.sort(np.random.default_rng(seed).permutation(len(points))[:MAP_POINTS])
    # Equal points have no axes; the map shows them as one point.
    with np.errstate(invalid="ignore"):
        axes = PCA(2, svd_solver="covariance_eigh").fit_transform(points[chosen])
    return {"map": np.nan_to_num(axes).astype(np.float32), "map_label": labels[chosen]}


def geometry(data: EvaluationSet, *, elements: int | None = None) -> ProtocolResult:
    """How the evaluated embeddings are spread, and what their norms tell.

    ``alignment``
        Mean squared distance of same-class pairs on the unit sphere, 0 to 4, lower is tighter; left out when no class
        has two images.
    ``uniformity``
        Log mean Gaussian potential (t = 2) over all pairs on the unit sphere, from -8 to 0, lower is more uniform.
    ``effective_rank``
        RankMe of the raw embeddings (not centred), 1 to their width.
    ``mean_norm``, ``std_norm``, ``norm_p05``, ``norm_p95``
        Mean, standard deviation and the 5th and 95th percentile of the L2 norms of the raw embeddings.
    ``std_ratio``
        Mean over dimensions of the standard deviation on the unit sphere, times sqrt(width): 1 when spread evenly, 0
        when collapsed to a point.
    ``angle_to_own_center``, ``angle_to_other_center``
        Mean angle in degrees to the own and to the nearest other class center, see :func:`center_angles`; left out when
        no class has two images, or there is one class.
    ``norm_quality_correlation``
        Spearman's rank correlation of norm and true quality; with a column ``quality`` that is not constant.
    ``reject_norm``, ``reject_quality``
        Area under the error-versus-reject curve by norm and by the column ``quality``, relative to rejecting nothing:
        below 1 when rejecting poor images helps; see :func:`armillary.evaluation.reject.error_reject`. Left out when
        there is no error to begin with, or not both kinds of pairs.

    Curves: ``spectrum``, see :func:`spectrum`; ``angle_own`` and ``angle_other``, counts per degree from 0 to 180;
    ``map`` and ``map_label``, see :func:`projection`; ``reject_share``, ``reject_fnmr_norm``, ``reject_fnmr_quality``.

    Warnings: ``std_ratio`` below 0.3, or ``effective_rank`` below 2 or 2% of what the width or the number of images
    allows.

    Sources: Wang, Isola, Understanding Contrastive Representation Learning through Alignment and Uniformity, ICML
    2020; Garrido et al., RankMe, ICML 2023; Chen, He, Exploring Simple Siamese Representation Learning, CVPR 2021,
    section 4.1; Jing et al., Understanding Dimensional Collapse, ICLR 2022; Grother, Tabassi, Performance of Biometric
    Quality Measures, TPAMI 2007; Deng et al., ArcFace, CVPR 2019, figure 3 for angles to centers.

    Raises:
        UserError: a column ``quality`` that does not hold finite numbers.
    """
    points, norms = normalize(data.embeddings), np.linalg.norm(data.embeddings, axis=1)
    singular = spectrum(data.embeddings)
    metrics = {} if (aligned := alignment(points, data.labels)) is None else {"alignment": aligned}
    metrics |= {
        "uniformity": uniformity(points, elements=elements),
        "effective_rank": _entropy_rank(singular),
        "mean_norm": float(norms.mean()),
        "std_norm": float(norms.std()),
        "norm_p05": float(np.quantile(norms, 0.05)),
        "norm_p95": float(np.quantile(norms, 0.95)),
        "std_ratio": float(points.std(axis=0).mean() * np.sqrt(points.shape[1])),
    }
    curves = {"spectrum": singular, **projection(points, data.labels, data.seed)}
    own, other = center_angles(points, data.labels, elements=elements)
    for name, angles in (("own", own), ("other", other)):
        if len(angles):
            metrics[f"angle_to_{name}_center"] = float(angles.mean())
            curves[f"angle_{name}"] = np.histogram(angles, np.arange(181))[0]
    _judge_norms(data, norms, metrics, curves)
    warnings = collapse_warnings(metrics["std_ratio"], metrics["effective_rank"], *points.shape)
    return ProtocolResult({f"geometry/{name}": value for name, value in metrics.items()}, curves, warnings)


def _judge_norms(
    data: EvaluationSet, norms: Floats, metrics: dict[str, float], curves: dict[str, Floats | Ints]
) -> None:
    """Adds what norms and true qualities say about errors."""
    qualities = {"norm": norms}
    if "quality" in data.columns:
        quality = np.asarray(data.columns["quality"])
        if quality.dtype.kind not in "fiub" or not np.isfinite(quality).all():
            raise UserError("must hold finite numbers", key="columns.quality")
        qualities["quality"] = quality.astype(np.float64)
        correlation = rank_correlation(norms, qualities["quality"])
        if correlation is not None:
            metrics["norm_quality_correlation"] = correlation
    for name, curve in error_reject(data, qualities).items():
        curves["reject_share"], curves[f"reject_fnmr_{name}"] = curve.share, curve.fnmr
        if curve.relative_area is not None:
            metrics[f"reject_{name}"] = curve.relative_area
