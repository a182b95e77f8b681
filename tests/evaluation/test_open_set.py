"""Open-set identification: who is enrolled, and the rates, against plain loops."""

from typing import Any

import numpy as np
import pytest

from armillary.evaluation.open_set import best_matches, detection_rates, enrolment, open_set
from armillary.evaluation.protocols import evaluate
from armillary.evaluation.similarity import normalize


def slow_rate(points: Any, labels: Any, gallery: Any, probe: Any, allowed: int) -> Any:
    """Tries every threshold that occurs."""
    unit = np.asarray(normalize(points))
    scores = np.round(unit @ unit[gallery].T * 2**40)
    mated = np.isin(labels, labels[gallery]) & probe
    strangers = ~np.isin(labels, labels[gallery]) & probe
    best = -1.0
    for threshold in np.append(np.unique(scores), np.inf):
        if (scores[strangers].max(axis=1) >= threshold).sum() > allowed:
            continue
        hits = 0
        for i in np.flatnonzero(mated):
            own = labels[gallery] == labels[i]
            top = scores[i][own].max()
            hits += top > scores[i][~own].max(initial=-np.inf) and top >= threshold
        best = max(best, hits / mated.sum())
    return best


@pytest.mark.parametrize("ties", [False, True])
def test_rates_equal_a_search_over_thresholds(blobs: Any, ties: bool) -> None:
    points, labels = blobs(classes=8, per_class=4, width=3, noise=1.0)
    points = np.round(points) if ties else points
    chosen = enrolment(labels, 3)
    assert chosen is not None
    gallery, probe = chosen
    unit = normalize(points)
    rates = detection_rates(*best_matches(unit[probe], labels[probe], unit[gallery], labels[gallery]))[1]
    for allowed in range(len(rates)):
        assert rates[allowed] == pytest.approx(slow_rate(points, labels, gallery, probe, allowed)), allowed


def test_half_of_the_classes_with_two_images_are_enrolled_with_one() -> None:
    labels = np.array([0] * 5 + [1] * 2 + [2] * 3 + [3] * 2 + [4, 5])
    seen = set()
    for seed in range(20):
        chosen = enrolment(labels, seed)
        assert chosen is not None
        gallery, probe = chosen
        assert len(gallery) == len(np.unique(labels[gallery])) == 2
        assert set(labels[gallery]) <= {0, 1, 2, 3}
        assert np.flatnonzero(~probe).tolist() == sorted(gallery)
        seen |= set(gallery.tolist())
    assert seen == set(range(12))
    assert enrolment(np.arange(5), 0) is None
    assert enrolment(np.zeros(5, int), 0) is None


def test_the_seed_decides_and_rates_are_bounded_by_the_closed_set(blobs: Any) -> None:
    points, labels = blobs(classes=30, per_class=8, noise=1.2)
    first = evaluate("identification", points, labels, seed=1).metrics
    assert evaluate("identification", points, labels, seed=1).metrics == first
    assert evaluate("identification", points, labels, seed=2).metrics != first
    rate, tenth = first["identification/dir_at_far_1e-2"], first["identification/dir_at_far_1e-1"]
    assert 0 < rate <= tenth <= 1
    assert open_set(np.ones((60, 4)), np.repeat(np.arange(20), 3), 0)[0]["dir_at_far_1e-1"] == 0.0
    perfect = open_set(np.eye(20)[np.repeat(np.arange(20), 3)], np.repeat(np.arange(20), 3), 0)[0]
    assert perfect["dir_at_far_1e-1"] == 1.0
