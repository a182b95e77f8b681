"""Qualities: the quality-aware score, error-versus-reject curves, and what geometry says of norms."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from armillary.evaluation.protocols import evaluate
from armillary.evaluation.quality import QualityScore, fit_quality_score
from armillary.evaluation.reject import SHARES, rank_correlation, reject_curve
from armillary.evaluation.result import Pairs
from armillary.spec.errors import UserError


@pytest.fixture
def degraded() -> Any:
    """People seen well and badly: of poor images little but noise is left, and their embeddings are short."""

    def make(seed: int) -> Any:
        rng = np.random.default_rng(seed)
        labels, quality = np.repeat(np.arange(60), 10), rng.uniform(0.3, 1.0, 600)
        points = quality[:, None] * rng.standard_normal((60, 24))[labels] + 0.3 * rng.standard_normal((600, 24))
        return 10 * points, labels, quality

    return make


def test_the_score_has_the_published_values() -> None:
    score = QualityScore(alpha=0.077428, beta=0.125926)
    found = score(np.array([0.3, 0.7]), np.array([20.0, 20.0]))
    np.testing.assert_allclose(found, [-0.493004, 0.7], atol=1e-6)


@given(st.floats(-1, 1), st.floats(0, 50), st.floats(0, 50), st.floats(0, 0.3), st.floats(0.001, 0.5))
def test_the_score_is_the_cosine_above_the_switch_and_falls_below(
    cosine: float, low: float, more: float, alpha: float, beta: float
) -> None:
    score = QualityScore(alpha, beta)
    first, second = (float(score(np.array(cosine), np.array(quality))) for quality in (low, low + more))
    if beta * cosine >= alpha:
        assert first == second == cosine
    else:
        assert second <= first <= cosine
    assert abs(second) <= score.bound(low + more) + 1e-9


def test_the_fit_finds_a_score_that_helps_on_other_people(degraded: Any) -> None:
    points, labels, _ = degraded(0)
    train, train_labels, _ = degraded(1)
    options: dict[str, Any] = {"train_embeddings": train, "train_labels": train_labels}
    metrics = evaluate("quality_verification", points, labels, **options).metrics
    plain = evaluate("verification", points, labels).metrics
    name = "tar_at_far_1e-3"
    assert metrics[f"quality_verification/{name}"] > plain[f"verification/{name}"] + 0.01
    # The fit never sees what is judged.
    other = evaluate("quality_verification", points[:50], labels[:50], **options).metrics
    for constant in ("alpha", "beta"):
        assert other[f"quality_verification/{constant}"] == metrics[f"quality_verification/{constant}"]


def test_given_and_all_pairs_agree(degraded: Any) -> None:
    points, labels, _ = degraded(0)
    points, labels = points[:80], labels[:80]
    train, train_labels, _ = degraded(1)
    options: dict[str, Any] = {"train_embeddings": train, "train_labels": train_labels}
    first, second = np.triu_indices(80, 1)
    pairs = Pairs(first, second, labels[first] == labels[second])
    whole = evaluate("quality_verification", points, labels, **options)
    listed = evaluate("quality_verification", points, labels, pairs=pairs, **options)
    for name in ("auc", "eer", "tar_at_far_1e-2"):
        assert listed.metrics[f"quality_verification/{name}"] == whole.metrics[f"quality_verification/{name}"]
    np.testing.assert_allclose(listed.curves["roc_threshold"], whole.curves["roc_threshold"])


def test_quality_without_effect_is_given_no_weight() -> None:
    rng = np.random.default_rng(0)
    same = np.arange(20_000) % 2 == 0
    cosine = rng.normal(np.where(same, 0.6, 0.0), 0.1)
    score = fit_quality_score(cosine, np.full(20_000, 7.0), same)
    np.testing.assert_allclose(score(cosine, np.full(20_000, 7.0)), cosine, atol=1e-9)
    with pytest.raises(ValueError, match="100 impostor"):
        fit_quality_score(cosine[:50], np.ones(50), same[:50])


def test_training_embeddings_are_needed_for_the_fit(degraded: Any) -> None:
    points, labels, _ = degraded(0)
    with pytest.raises(UserError, match="--train FILE"):
        evaluate("quality_verification", points, labels)
    with pytest.raises(UserError, match="the fit needs"):
        evaluate("quality_verification", points, labels, train_embeddings=points[:4], train_labels=labels[:4])


def test_a_reject_curve_follows_its_definition() -> None:
    rng = np.random.default_rng(0)
    genuine, quality = rng.random(137), rng.permutation(137).astype(float)
    found = reject_curve(genuine, quality, 0.4)
    order = np.argsort(quality)
    for share, value in zip(SHARES, found.fnmr, strict=True):
        assert value == pytest.approx((genuine[order[int(share * 137) :]] < 0.4).mean())


def test_reject_curves_of_extreme_qualities() -> None:
    genuine = np.linspace(0, 1, 200)
    helpful = reject_curve(genuine, genuine, 0.3)
    assert helpful.fnmr[0] == pytest.approx(0.3)
    assert helpful.fnmr[-1] == 0.0
    assert helpful.relative_area is not None
    assert helpful.relative_area < 0.5
    # Equal qualities: no order is made up, whatever the order of the pairs.
    constant = reject_curve(genuine, np.ones(200), 0.3)
    np.testing.assert_allclose(constant.fnmr, 0.3)
    assert constant.relative_area is None
    assert reject_curve(genuine, genuine, -1.0).relative_area is None


def test_geometry_reads_the_quality_column(degraded: Any) -> None:
    points, labels, quality = degraded(0)
    result = evaluate("geometry", points, labels, columns={"quality": quality})
    norms = np.linalg.norm(points, axis=1)
    correlation = spearmanr(norms, quality).statistic
    assert result.metrics["geometry/norm_quality_correlation"] == pytest.approx(correlation)
    assert result.metrics["geometry/reject_quality"] < 0.8
    assert {"reject_share", "reject_fnmr_norm", "reject_fnmr_quality"} <= result.curves.keys()
    without = evaluate("geometry", points, labels)
    assert "geometry/norm_quality_correlation" not in without.metrics
    assert "reject_fnmr_quality" not in without.curves
    with pytest.raises(UserError, match=r"(?s)columns\.quality"):
        evaluate("geometry", points, labels, columns={"quality": np.where(quality > 0.9, np.nan, quality)})
    with pytest.raises(UserError, match="600 rows"):
        evaluate("geometry", points, labels, columns={"quality": quality[1:]})


def test_a_constant_has_no_correlation() -> None:
    assert rank_correlation(np.ones(5), np.arange(5)) is None
    assert rank_correlation(np.array([3, 1, 1]), np.array([9, 2, 2])) == pytest.approx(1.0)
