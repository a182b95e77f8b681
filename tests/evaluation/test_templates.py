"""Templates: how images become one feature, and how those are compared."""

from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from armillary.evaluation.protocols import evaluate
from armillary.evaluation.result import Pairs, Templates
from armillary.evaluation.templates import pool_templates
from armillary.spec.errors import UserError


@pytest.fixture
def faces() -> Any:
    """Twelve people of eight images whose norms say how good they are, in 24 templates of two media."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(12), 8)
    quality = rng.uniform(0.1, 1.0, 96)
    points = quality[:, None] * rng.standard_normal((12, 10))[labels] + 0.5 * rng.standard_normal((96, 10))
    row = rng.permutation(96)
    return points, labels, Templates(row, 1000 - row // 4, row // 2)


def slow_pooling(points: Any, templates: Templates) -> Any:
    features = {}
    for name in sorted(set(templates.template.tolist())):
        media: dict[int, list[Any]] = {}
        for row, template, number in zip(templates.row, templates.template, templates.media, strict=True):
            if template == name:
                media.setdefault(int(number), []).append(points[row])
        mean = np.mean([np.mean(frames, axis=0) for frames in media.values()], axis=0)
        features[name] = mean / np.linalg.norm(mean)
    return features


def test_pooling_follows_its_definition(faces: Any) -> None:
    points, _, templates = faces
    # One image in two templates, under one media number.
    templates = Templates(
        np.append(templates.row, 0), np.append(templates.template, 2000), np.append(templates.media, 0)
    )
    expected = slow_pooling(points, templates)
    names, features = pool_templates(points, templates)
    assert names.tolist() == list(expected)
    np.testing.assert_allclose(features, np.stack(list(expected.values())), atol=1e-12)


def test_good_images_and_not_long_videos_weigh_more() -> None:
    points = np.array([[10.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    _, features = pool_templates(points, Templates(np.arange(4), np.zeros(4, int), np.array([0, 1, 1, 1])))
    np.testing.assert_allclose(features, [[10 / np.hypot(10, 1), 1 / np.hypot(10, 1)]])


def test_matches_decide_what_is_compared(faces: Any) -> None:
    points, labels, templates = faces
    features = slow_pooling(points, templates)
    names = np.array(list(features))
    subject = {1000 - row // 4: labels[row] for row in range(96)}
    rng = np.random.default_rng(1)
    first, second = rng.choice(names, 150), rng.choice(names, 150)
    same = np.array([subject[a] == subject[b] for a, b in zip(first, second, strict=True)])
    scores = [round(float(features[a] @ features[b]), 11) for a, b in zip(first, second, strict=True)]
    given = Templates(templates.row, templates.template, templates.media, Pairs(first, second, same))
    metrics = evaluate("templates", points, labels, templates=given).metrics
    assert metrics["templates/auc"] == pytest.approx(roc_auc_score(same, scores), abs=1e-9)
    genuine, impostor = np.array(scores)[same], np.array(scores)[~same]
    rates = [(genuine >= t).mean() for t in np.unique(scores) if (impostor >= t).mean() <= 0.1]
    assert metrics["templates/tpr_at_fpr_1e-1"] == pytest.approx(max(rates))


def test_without_matches_all_templates_are_compared(faces: Any) -> None:
    points, labels, templates = faces
    features = slow_pooling(points, templates)
    stacked = np.stack(list(features.values()))
    subject = [labels[4 * (1000 - name)] for name in features]
    expected = evaluate("verification", stacked, subject).metrics
    metrics = evaluate("templates", points, labels, templates=templates).metrics
    assert metrics["templates/auc"] == pytest.approx(expected["verification/auc"], abs=1e-12)
    assert metrics["templates/tpr_at_fpr_1e-2"] == expected["verification/tar_at_far_1e-2"]


def test_identification_searches_each_gallery(faces: Any) -> None:
    points, labels, templates = faces
    # People 0-4 are in gallery 0, 5-7 in gallery 1, the others in none; their second template is the probe.
    person, second = templates.row // 8, templates.row // 4 % 2
    gallery = np.where(second == 1, -1, np.where(person < 5, 0, np.where(person < 8, 1, -1)))
    given = Templates(templates.row, templates.template, templates.media, gallery=gallery)
    metrics = evaluate("templates", points, labels, templates=given).metrics
    features = slow_pooling(points, given)

    def feature(who: int, which: int) -> Any:
        return features[1000 - (who * 2 + which)]

    expected = []
    for people in (range(5), range(5, 8)):
        hits = [int(np.argmax([feature(who, 1) @ feature(other, 0) for other in people])) for who in people]
        expected.append(np.mean([people[hit] == who for hit, who in zip(hits, people, strict=True)]))
    assert metrics["templates/rank1"] == pytest.approx(np.mean(expected))
    assert 0 <= metrics["templates/tpir_at_fpir_1e-1"] <= metrics["templates/rank1"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"template": np.zeros(96, int)}, "more than one class"),
        ({"row": np.arange(96) + 1}, r"0\.\.95"),
        ({"media": np.arange(95)}, "shape"),
        ({"gallery": np.arange(96)}, "more than one gallery"),
        ({"gallery": np.zeros(96, int)}, "no probe template"),
        ({"gallery": np.full(96, -1)}, "no template is in a gallery"),
        ({"matches": Pairs(np.array([1]), np.array([2]), np.array([True]))}, "do not exist, the first is 1"),
    ],
)
def test_wrong_templates_are_refused(faces: Any, changes: Any, words: Any) -> None:
    points, labels, templates = faces
    with pytest.raises(UserError, match=words):
        evaluate("templates", points, labels, templates=Templates(**{**vars(templates), **changes}))


def test_no_templates_says_where_they_come_from(faces: Any) -> None:
    with pytest.raises(UserError, match="--templates FILE"):
        evaluate("templates", *faces[:2])
