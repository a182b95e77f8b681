"""Verification against scikit-learn, a quadratic reference, and itself with memory for almost nothing."""

from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score, roc_curve

from armillary.evaluation import verification as module
from armillary.evaluation.protocols import evaluate
from armillary.evaluation.result import EvaluationSet
from armillary.evaluation.similarity import normalize
from armillary.evaluation.verification import best_threshold, fold_accuracies, verification
from armillary.spec.errors import UserError


def all_pairs(embeddings: Any, labels: Any) -> Any:
    """Every unordered pair in two plain loops: cosine and whether it is genuine."""
    scores, same = [], []
    for i in range(len(labels)):
        for j in range(i + 1, len(labels)):
            a, b = embeddings[i], embeddings[j]
            length = np.sqrt(a @ a) * np.sqrt(b @ b)
            scores.append(round(float(a @ b / length) * 2**40) / 2**40 if length else 0.0)
            same.append(labels[i] == labels[j])
    return np.array(scores), np.array(same)


def slow_figures(scores: Any, same: Any) -> Any:
    """AUC by comparing every genuine with every impostor pair; TAR by trying every threshold."""
    genuine, impostor = scores[same], scores[~same]
    wins = sum((g > impostor).sum() + 0.5 * (g == impostor).sum() for g in genuine)
    figures = {"verification/auc": wins / (len(genuine) * len(impostor))}
    for power in range(1, 7):
        if len(impostor) < 10**power:
            break
        rates = [((impostor >= t).mean(), (genuine >= t).mean()) for t in np.append(np.unique(scores), np.inf)]
        figures[f"verification/tar_at_far_1e-{power}"] = max(tar for far, tar in rates if far <= 10.0**-power)
    return figures


def slow_eer(scores: Any, same: Any) -> Any:
    """Walks along scikit-learn's curve to the segment that meets FAR = 1 - TAR."""
    far, tar, _ = roc_curve(same, scores, drop_intermediate=False)
    for i in range(1, len(far)):
        before, after = far[i - 1] + tar[i - 1], far[i] + tar[i]
        if after >= 1:
            return far[i - 1] + (far[i] - far[i - 1]) * (1 - before) / (after - before)
    raise AssertionError("the curve ends at (1, 1)")


def with_ties(blobs: Any) -> Any:
    """Copies, a zero vector, a class of one image and few distinct directions."""
    points, labels = blobs(classes=6, per_class=5, width=3)
    points = np.round(points)
    points[3] = points[17] = points[4]
    points[8] = 0
    return np.vstack([points, points[:1]]), np.append(labels, 99)


@pytest.mark.parametrize("case", ["plain", "ties", "two classes"])
def test_equals_scikit_learn_and_the_slow_reference(blobs: Any, case: Any) -> None:
    if case == "ties":
        points, labels = with_ties(blobs)
    else:
        points, labels = blobs() if case == "plain" else blobs(classes=2, per_class=20)
    scores, same = all_pairs(points, labels)
    result = evaluate("verification", points, labels)
    for name, value in slow_figures(scores, same).items():
        assert result.metrics[name] == pytest.approx(value, abs=1e-9), name
    assert result.metrics["verification/auc"] == pytest.approx(roc_auc_score(same, scores), abs=1e-9)
    assert result.metrics["verification/eer"] == pytest.approx(slow_eer(scores, same), abs=1e-9)
    far, tar, _ = roc_curve(same, scores, drop_intermediate=False)
    for x, y in zip(result.curves["roc_far"], result.curves["roc_tar"], strict=True):
        assert y == pytest.approx(tar[far <= x + 1e-12].max(), abs=1e-9)


def test_the_thresholds_of_the_curve_give_its_rates(blobs: Any) -> None:
    points, labels = with_ties(blobs)
    scores, same = all_pairs(points, labels)
    curves = evaluate("verification", points, labels).curves
    for far, tar, threshold in zip(*(curves[f"roc_{name}"] for name in ("far", "tar", "threshold")), strict=True):
        assert (scores[same] >= threshold).mean() == pytest.approx(tar)
        assert (scores[~same] >= threshold).mean() <= far + 1e-12


@pytest.mark.parametrize("classes", [2, 7, 30])
@pytest.mark.parametrize(("elements", "capacity"), [(1, 1), (50, 3), (1000, 40)])
def test_little_memory_gives_the_same_result(blobs: Any, classes: Any, elements: Any, capacity: Any) -> None:
    points, labels = blobs(classes=classes, per_class=60 // classes, width=4)
    points = np.round(points, 1)
    order = np.random.default_rng(1).permutation(len(labels))
    data = EvaluationSet(points[order], labels[order].astype(np.int64))
    whole, parts = verification(data), verification(data, elements=elements, capacity=capacity)
    assert parts.metrics.keys() == whole.metrics.keys()
    for name, value in whole.metrics.items():
        assert parts.metrics[name] == pytest.approx(value, abs=1e-12), name
    np.testing.assert_allclose(parts.curves["roc_tar"], whole.curves["roc_tar"], atol=1e-12)


def test_blocks_hold_no_more_than_allowed(blobs: Any) -> None:
    points, labels = blobs(classes=40, per_class=10)
    pairs = module.AllPairs(points, labels, elements=500)
    for stream, total in ((pairs.genuine, pairs.num_genuine), (pairs.impostor, pairs.num_impostor)):
        sizes = [len(block) for block in stream()]
        assert max(sizes) <= 500
        assert sum(sizes) == total


def test_order_of_samples_and_names_of_classes_do_not_matter(blobs: Any) -> None:
    points, labels = with_ties(blobs)
    order = np.random.default_rng(3).permutation(len(labels))
    names = np.array([f"person {label}" for label in labels])
    first, second = evaluate("verification", points, labels), evaluate("verification", points[order], names[order])
    # The drawn pairs of the ten folds are named by position; everything over all pairs is not.
    for name in first.metrics.keys() - {"verification/accuracy"}:
        assert second.metrics[name] == pytest.approx(first.metrics[name], abs=1e-12), name


def test_length_does_not_matter_and_nothing_is_changed(blobs: Any) -> None:
    points, labels = blobs()
    scaled = points * np.geomspace(1e-200, 1e200, len(points))[:, None]
    before = scaled.copy()
    assert evaluate("verification", scaled, labels).metrics == pytest.approx(
        evaluate("verification", points, labels).metrics
    )
    np.testing.assert_array_equal(scaled, before)


def test_collapse_is_chance_and_separation_is_perfect() -> None:
    labels = np.repeat(np.arange(5), 4)
    rng = np.random.default_rng(0)
    # One direction, in lengths that leave different last bits behind.
    collapsed = evaluate("verification", rng.random(200).reshape(1, -1) * rng.uniform(0.1, 9, (20, 1)), labels).metrics
    assert collapsed["verification/auc"] == 0.5
    assert collapsed["verification/eer"] == 0.5
    assert collapsed["verification/tar_at_far_1e-1"] == 0.0
    perfect = evaluate("verification", np.eye(5)[labels], labels).metrics
    assert perfect["verification/auc"] == perfect["verification/accuracy"] == 1.0
    assert perfect["verification/tar_at_far_1e-2"] == 1.0
    assert perfect["verification/eer"] == 0.0


def test_random_embeddings_are_at_chance() -> None:
    rng = np.random.default_rng(5)
    metrics = evaluate("verification", rng.standard_normal((400, 32)), rng.integers(0, 20, 400)).metrics
    assert metrics["verification/auc"] == pytest.approx(0.5, abs=0.03)
    assert metrics["verification/accuracy"] == pytest.approx(0.5, abs=0.03)
    assert metrics["verification/tar_at_far_1e-2"] == pytest.approx(0.01, abs=0.01)


def test_only_rates_that_the_pairs_resolve_are_given() -> None:
    labels = np.repeat(np.arange(5), 2)  # 40 impostor pairs
    metrics = evaluate("verification", np.random.default_rng(0).standard_normal((10, 4)), labels).metrics
    assert "verification/tar_at_far_1e-1" in metrics
    assert "verification/tar_at_far_1e-2" not in metrics


@pytest.mark.parametrize(("labels", "words"), [([0, 1, 2, 3], "two images"), ([0, 0, 0, 0], "two classes")])
def test_sets_without_both_kinds_of_pairs_are_refused(labels: Any, words: Any) -> None:
    with pytest.raises(UserError, match=words):
        evaluate("verification", np.eye(4), labels)


def test_sampled_pairs_are_distinct_and_of_their_kind(blobs: Any, monkeypatch: Any) -> None:
    points, labels = blobs(classes=5, per_class=4)
    pairs = module.AllPairs(points, labels)
    drawn_pairs = pairs.sample(pairs.num_genuine, pairs.num_genuine, seed=1)
    scores, same = module.pair_scores(points, drawn_pairs) / 2**40, drawn_pairs.same
    assert (labels[drawn_pairs.first] == labels[drawn_pairs.second]).tolist() == same.tolist()
    expected, truth = all_pairs(points, labels)
    np.testing.assert_allclose(np.sort(scores[same]), np.sort(expected[truth]), atol=1e-9)
    drawn = scores[~same]
    assert len(np.unique(drawn)) == len(drawn)
    assert np.isclose(drawn[:, None], expected[~truth][None, :], atol=1e-9).any(axis=1).all()


def test_best_threshold_is_as_good_as_any(blobs: Any) -> None:
    scores, same = all_pairs(*blobs(classes=4, per_class=4, noise=2.0))
    found = ((scores >= best_threshold(scores, same)) == same).mean()
    assert found == max(((scores >= t) == same).mean() for t in np.append(scores, np.inf))


def test_fold_accuracy_uses_the_other_folds_threshold() -> None:
    # Fold 1 alone would choose 0.2 and be perfect; fold 0 tells it 0.6, which rejects its genuine pair.
    scores, same = np.array([0.9, 0.3, 0.4, 0.0]), np.array([True, False, True, False])
    assert fold_accuracies(scores, same, np.array([0, 0, 1, 1])).tolist() == [0.5, 0.5]


def test_zero_vectors_stay_zero() -> None:
    assert normalize(np.array([[0.0, 0.0], [3.0, 4.0]])).tolist() == [[0.0, 0.0], [0.6, 0.8]]
