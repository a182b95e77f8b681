"""Error versus reject: does leaving poor images out lower the error? A test of any measure of quality."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from armillary.evaluation.result import EvaluationSet, Floats, Ints
from armillary.evaluation.similarity import GRID
from armillary.evaluation.verification import AllPairs, pair_scores

DRAWN_PAIRS = 100_000
FALSE_MATCHES_ONE_IN = (1000, 100, 10)
SHARES = np.arange(0, 0.96, 0.01)


@dataclass(frozen=True)
class RejectCurve:
    """Errors that remain when the pairs of lowest quality are rejected.

    Args:
        share: ``(k,)`` rejected share of the genuine pairs, from 0 to 0.95.
        fnmr: ``(k,)`` false non-match rate of the others, at a fixed threshold.
        relative_area: mean of ``fnmr`` over the shares up to 0.5, over that without rejection; ``None`` without error.
    """

    share: Floats
    fnmr: Floats
    relative_area: float | None


def reject_curve(genuine: Floats, quality: Floats, threshold: float) -> RejectCurve:
    """The curve of genuine pairs.

    Args:
        genuine: ``(p,)`` scores, p >= 1; below ``threshold`` is an error.
        quality: ``(p,)`` the lower quality of each pair. Of pairs of equal quality the share is rejected that is due:
            each counts for the mean error of them all, so that no order among them is made up.
        threshold: the score at or above which a pair is accepted.
    """
    levels, level = np.unique(quality, return_inverse=True)
    counts = np.bincount(level)
    wrong = (np.bincount(level, (genuine < threshold).astype(np.float64)) / counts)[np.sort(level)]
    remaining = np.concatenate((np.cumsum(wrong[::-1])[::-1], [0.0]))
    rejected = np.minimum((SHARES * len(genuine)).astype(np.int64), len(genuine) - 1)
    fnmr = remaining[rejected] / (len(genuine) - rejected)
    area = float(fnmr[SHARES <= 0.5].mean() / fnmr[0]) if fnmr[0] > 0 and len(levels) > 1 else None
    return RejectCurve(SHARES, fnmr, area)


def error_reject(data: EvaluationSet, qualities: Mapping[str, Floats]) -> dict[str, RejectCurve]:
    """Error-versus-reject curves of a labelled set, one for each measure of quality.

    Up to 100,000 genuine and as many impostor pairs are drawn by the set's seed. The threshold is the lowest whose
    false match rate, without rejection, does not exceed 1e-3 (or 1e-2, 1e-1: the lowest that the pairs resolve), and
    stays as it is; a pair is as good as the poorer of its images.

    Source: Grother, Tabassi, Performance of Biometric Quality Measures, TPAMI 2007, section 4.

    Args:
        data: the evaluated set.
        qualities: by name, ``(n,)`` numbers, higher is better.

    Returns:
        By the names of ``qualities``; empty without a genuine pair, or with under ten impostor pairs.
    """
    everything = AllPairs(data.embeddings, data.labels)
    genuine, impostor = (min(DRAWN_PAIRS, count) for count in (everything.num_genuine, everything.num_impostor))
    if genuine < 1 or impostor < 10:
        return {}
    pairs = everything.sample(genuine, impostor, data.seed)
    scores = pair_scores(data.embeddings, pairs) / GRID
    allowed = next(impostor // parts for parts in FALSE_MATCHES_ONE_IN if impostor >= parts)
    threshold = float(np.nextafter(np.sort(scores[~pairs.same])[::-1][allowed], np.inf))
    same = np.flatnonzero(pairs.same)
    return {
        name: reject_curve(scores[same], np.minimum(quality[pairs.first[same]], quality[pairs.second[same]]), threshold)
        for name, quality in qualities.items()
    }


def rank_correlation(first: Floats | Ints, second: Floats | Ints) -> float | None:
    """Spearman's rank correlation, ties by mean rank; ``None`` when one of them is constant."""
    from scipy.stats import rankdata

    ranks = [rankdata(values) for values in (first, second)]
    deviations = [rank - rank.mean() for rank in ranks]
    scale = float(np.sqrt((deviations[0] ** 2).sum() * (deviations[1] ** 2).sum()))
    return float((deviations[0] * deviations[1]).sum() / scale) if scale else None
