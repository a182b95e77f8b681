"""Clustering agreement and the geometry of embeddings, against their definitions written out."""

import itertools
from typing import Any

import numpy as np
import pytest
from scipy.spatial.distance import pdist

from armillary.evaluation.clustering import agreement, cluster
from armillary.evaluation.geometry import (
    alignment,
    center_angles,
    effective_rank,
    geometry,
    projection,
    uniformity,
)
from armillary.evaluation.protocols import evaluate
from armillary.evaluation.result import EvaluationSet
from armillary.spec.errors import UserError


def test_agreement_follows_its_definitions() -> None:
    rng = np.random.default_rng(0)
    labels, groups = rng.integers(0, 4, 40), rng.integers(0, 5, 40)
    found = agreement(labels, groups)
    pairs = list(itertools.combinations(range(40), 2))
    both = sum(labels[i] == labels[j] and groups[i] == groups[j] for i, j in pairs)
    precision = both / sum(groups[i] == groups[j] for i, j in pairs)
    recall = both / sum(labels[i] == labels[j] for i, j in pairs)
    assert found["pairwise_precision"] == pytest.approx(precision)
    assert found["pairwise_recall"] == pytest.approx(recall)
    assert found["pairwise_f1"] == pytest.approx(2 * precision * recall / (precision + recall))
    right = [(labels == labels[i]) & (groups == groups[i]) for i in range(40)]
    precision = np.mean([r.sum() / (groups == groups[i]).sum() for i, r in enumerate(right)])
    recall = np.mean([r.sum() / (labels == labels[i]).sum() for i, r in enumerate(right)])
    assert found["bcubed_precision"] == pytest.approx(precision)
    assert found["bcubed_recall"] == pytest.approx(recall)
    assert found["bcubed_f1"] == pytest.approx(2 * precision * recall / (precision + recall))
    purity = sum(np.bincount(labels[groups == g]).max() for g in np.unique(groups)) / 40
    assert found["purity"] == pytest.approx(purity)


def test_a_perfect_clustering_is_one_everywhere_and_a_random_one_is_not(blobs: Any) -> None:
    points, labels = blobs(noise=0.05)
    assert set(np.round(list(evaluate("clustering", points, labels).metrics.values()), 9)) == {1.0}
    rng = np.random.default_rng(0)
    chance = evaluate("clustering", rng.standard_normal((300, 16)), rng.integers(0, 5, 300)).metrics
    assert chance["clustering/ari"] == pytest.approx(0.0, abs=0.03)
    assert chance["clustering/ami"] == pytest.approx(0.0, abs=0.03)


def test_coinciding_and_wide_embeddings_are_clustered() -> None:
    labels = np.repeat(np.arange(4), 5)
    collapsed = evaluate("clustering", np.ones((20, 3)), labels).metrics
    assert collapsed["clustering/nmi"] == 0.0
    assert collapsed["clustering/purity"] == 0.25
    wide = np.random.default_rng(0).standard_normal((20, 1000)) * 0.01 + np.eye(1000)[labels]
    assert len(np.unique(cluster(wide, 4, seed=0))) == 4


def test_one_class_is_refused() -> None:
    with pytest.raises(UserError, match="two classes"):
        evaluate("clustering", np.eye(3), [1, 1, 1])


def test_geometry_follows_its_definitions(blobs: Any) -> None:
    points, labels = blobs()
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    metrics = evaluate("geometry", points, labels).metrics
    pairs = [(i, j) for i, j in itertools.combinations(range(len(labels)), 2) if labels[i] == labels[j]]
    expected = np.mean([((unit[i] - unit[j]) ** 2).sum() for i, j in pairs])
    assert metrics["geometry/alignment"] == pytest.approx(expected)
    assert metrics["geometry/uniformity"] == pytest.approx(np.log(np.exp(-2 * pdist(unit) ** 2).mean()))
    values = np.linalg.svd(points, compute_uv=False)
    share = values / values.sum()
    assert metrics["geometry/effective_rank"] == pytest.approx(np.exp(-(share * np.log(share)).sum()))
    assert metrics["geometry/mean_norm"] == pytest.approx(np.linalg.norm(points, axis=1).mean())
    assert metrics["geometry/std_ratio"] == pytest.approx(unit.std(axis=0).mean() * 4)


def test_blocks_do_not_change_uniformity(blobs: Any) -> None:
    points, labels = blobs()
    data = EvaluationSet(points, labels)
    assert geometry(data, elements=7).metrics == pytest.approx(geometry(data).metrics)


def test_collapse_shows(blobs: Any) -> None:
    _, labels = blobs()
    collapsed = evaluate("geometry", np.ones((len(labels), 8)), labels).metrics
    assert collapsed["geometry/effective_rank"] == pytest.approx(1.0)
    assert collapsed["geometry/std_ratio"] == pytest.approx(0.0, abs=1e-12)
    assert collapsed["geometry/uniformity"] == pytest.approx(0.0, abs=1e-12)
    assert collapsed["geometry/alignment"] == pytest.approx(0.0, abs=1e-12)
    spread = evaluate("geometry", np.random.default_rng(0).standard_normal((2000, 8)), np.zeros(2000, int)).metrics
    assert spread["geometry/std_ratio"] == pytest.approx(1.0, abs=0.02)
    assert spread["geometry/effective_rank"] == pytest.approx(8.0, abs=0.05)


def test_zeros_and_single_images_are_defined() -> None:
    assert alignment(np.eye(3), np.arange(3)) is None
    assert effective_rank(np.zeros((4, 3))) == 0.0
    assert uniformity(np.zeros((4, 3))) == 0.0
    assert "geometry/alignment" not in evaluate("geometry", np.eye(3), [0, 1, 2]).metrics


def test_angles_to_centers_leave_the_image_itself_out(blobs: Any) -> None:
    points, labels = blobs(classes=4, per_class=3)
    labels[-1] = 9
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    own, other = center_angles(unit, labels)
    expected_own, expected_other = [], []
    for i, label in enumerate(labels):
        centers = {c: unit[(labels == c) & ((np.arange(12) != i) | (c != label))].sum(axis=0) for c in set(labels)}
        angles = {c: np.degrees(np.arccos(unit[i] @ v / np.linalg.norm(v))) for c, v in centers.items() if np.any(v)}
        expected_own += [angles[label]] if label in angles else []
        expected_other.append(min(angle for c, angle in angles.items() if c != label))
    np.testing.assert_allclose(own, expected_own)
    np.testing.assert_allclose(other, expected_other)
    assert len(center_angles(unit, np.zeros(12, int))[1]) == 0


def test_collapse_is_said(blobs: Any) -> None:
    points, labels = blobs(width=64)
    assert evaluate("geometry", points, labels).warnings == ()
    point = evaluate("geometry", np.ones(64) + 1e-3 * points, labels).warnings
    assert any("nearly one direction" in sentence for sentence in point)
    line = evaluate("geometry", points[:, :1] * np.ones(64), labels).warnings
    assert any("effective rank of 1.0 of 48" in sentence for sentence in line)


def test_the_map_keeps_the_main_axes_and_a_bound(blobs: Any) -> None:
    from sklearn.decomposition import PCA

    points, labels = blobs(classes=3, per_class=800, width=6)
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    found = projection(unit, labels, 0)
    assert found["map"].shape == (2000, 2)
    assert found["map_label"].shape == (2000,)
    share = found["map"].var(axis=0).sum() / unit.var(axis=0).sum()
    assert share == pytest.approx(PCA(2).fit(unit).explained_variance_ratio_.sum(), abs=0.03)
    assert projection(unit[:, :1], labels, 0) == {}
