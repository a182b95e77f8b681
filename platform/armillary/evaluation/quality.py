"""Quality-aware comparison (QMagFace): a low score says less when one of the images is poor."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from armillary.evaluation.result import EvaluationSet, Flags, Floats, Ints, ProtocolResult
from armillary.evaluation.similarity import GRID
from armillary.evaluation.verification import AllPairs, pair_scores, verify
from armillary.spec.errors import UserError

# The fit: false match rates 1e-5 to 1e-2, and constant weights up to half a unit at the best quality.
MATCH_RATES = np.geomspace(1e-5, 1e-2, 50)
WEIGHTS = 101
FITTED_PAIRS = 200_000


@dataclass(frozen=True)
class QualityScore:
    """``s + min(0, beta * s - alpha) * q`` for a cosine s and the lower quality q of the two images.

    Symmetric in the images; the cosine itself where ``s >= alpha / beta`` or both constants are 0. Qualities are norms
    of raw embeddings, not below 0.

    Source: Terhoerst et al., QMagFace: Simple and Accurate Quality-Aware Face Recognition, WACV 2023, equations 4-6.
    """

    alpha: float
    beta: float

    def __call__(self, cosine: Floats, quality: Floats) -> Floats:
        """The score, of the cosines' shape."""
        return np.asarray(cosine + np.minimum(0.0, self.beta * cosine - self.alpha) * quality)

    def bound(self, highest_quality: float) -> float:
        """No score's magnitude is above this."""
        return 1.0 + (abs(self.alpha) + abs(self.beta)) * highest_quality


def fit_quality_score(cosine: Floats, quality: Floats, same: Flags) -> QualityScore:
    """Fits the two constants to comparisons that are never evaluated.

    For each false match rate of a log grid, the constant weight w of a grid over ``+-0.5 / max(quality)`` is sought
    whose score ``s + w q`` has the lowest false non-match rate (of several, the one nearest 0), with its threshold t;
    then ``w = beta t - alpha`` is fitted by least squares. Rates below one impostor comparison are left out.

    Args:
        cosine: ``(p,)``.
        quality: ``(p,)`` the lower quality of each comparison, not below 0.
        same: ``(p,)`` whether it is genuine; both kinds must occur, and 100 impostors or more.

    Raises:
        ValueError: there are too few comparisons, or no quality is above 0.
    """
    impostors, highest = int((~same).sum()), float(quality.max(initial=0.0))
    if impostors < 100 or not same.any() or highest <= 0:
        raise ValueError("the fit needs genuine comparisons, 100 impostor ones, and a quality above 0")
    # A hair more keeps 100 * 0.01 at one false match.
    allowed = np.unique((MATCH_RATES * impostors * (1 + 1e-12)).astype(np.int64))
    allowed = allowed[allowed > 0]
    # From the middle outwards, so that of equal weights the first is nearest 0.
    weights = np.linspace(-0.5, 0.5, WEIGHTS) / highest
    weights = weights[np.argsort(np.abs(weights), kind="stable")]
    missed, threshold = np.empty((WEIGHTS, len(allowed))), np.empty((WEIGHTS, len(allowed)))
    for row, weight in enumerate(weights):
        score = cosine + weight * quality
        genuine, impostor = np.sort(score[same]), np.sort(score[~same])[::-1]
        # As many false matches as allowed are above the next impostor score.
        threshold[row] = impostor[allowed]
        missed[row] = np.searchsorted(genuine, threshold[row], side="right")
    best = missed.argmin(axis=0)
    chosen, at = weights[best], threshold[best, np.arange(len(allowed))]
    if np.ptp(at) < 1e-12:
        return QualityScore(alpha=-float(chosen.mean()), beta=0.0)
    slope, intercept = np.polyfit(at, chosen, 1)
    return QualityScore(alpha=-float(intercept), beta=float(slope))


def quality_verification(
    data: EvaluationSet, *, elements: int | None = None, capacity: int | None = None
) -> ProtocolResult:
    """Verification with a quality-aware score, whose two constants are fitted on training embeddings.

    The quality of an image is the norm of its raw embedding, that of a comparison the lower of the two; the score is
    :class:`QualityScore`, fitted by :func:`fit_quality_score` on up to 200,000 genuine and as many impostor pairs of
    training images, drawn by ``seed``. No evaluated pair takes part in the fit.

    ``auc``, ``eer``, ``tar_at_far_1e-k``, ``accuracy``
        As for verification, over all pairs or the given ones.
    ``alpha``, ``beta``
        The fitted constants.

    Curves: those of verification, thresholds in units of the score.

    Source: Terhoerst et al., QMagFace, WACV 2023.

    Raises:
        UserError: as for verification, or the training part has no genuine or under 100 impostor pairs.
    """
    score = _fitted(data)
    quality = np.linalg.norm(data.embeddings, axis=1)
    # Scores live on a grid over [-1, 1]: divided by their bound they fit, and their order stays.
    bound = score.bound(float(quality.max()))

    def compare(cosine: Floats, first: Ints, second: Ints) -> Floats:
        scores = score(cosine / GRID, np.minimum(quality[first], quality[second])) / bound
        return np.rint(scores * GRID)

    result = verify(data, "quality_verification", comparison=compare, elements=elements, capacity=capacity)
    constants = {"quality_verification/alpha": score.alpha, "quality_verification/beta": score.beta}
    thresholds = {"roc_threshold": result.curves["roc_threshold"] * bound}
    return replace(result, metrics=result.metrics | constants, curves=result.curves | thresholds)


def _fitted(data: EvaluationSet) -> QualityScore:
    if data.train_embeddings is None or data.train_labels is None:
        raise UserError(
            "quality_verification needs training embeddings with labels, to fit its score on",
            hint="give --train FILE, or evaluate a run, whose training part is used",
        )
    everything = AllPairs(data.train_embeddings, data.train_labels)
    genuine, impostor = (min(FITTED_PAIRS, count) for count in (everything.num_genuine, everything.num_impostor))
    if genuine < 1 or impostor < 100:
        raise UserError(
            f"the training part makes {genuine} genuine and {impostor} impostor pairs; the fit needs 1 and 100",
            key="train_embeddings",
        )
    pairs = everything.sample(genuine, impostor, data.seed)
    norms = np.linalg.norm(data.train_embeddings, axis=1)
    if not norms.any():
        raise UserError("all training embeddings are zero", key="train_embeddings", hint="training diverged")
    cosine = pair_scores(data.train_embeddings, pairs) / GRID
    return fit_quality_score(cosine, np.minimum(norms[pairs.first], norms[pairs.second]), pairs.same)
