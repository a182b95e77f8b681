"""Verification by a given list of pairs, as LFW's: the folds, the thresholds, the files."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from armillary.evaluation.protocols import evaluate
from armillary.evaluation.result import Pairs
from armillary.evaluation.tables import read_pairs
from armillary.evaluation.verification import best_threshold, list_folds
from armillary.spec.errors import UserError


@pytest.fixture
def listed(blobs: Any) -> Any:
    points, labels = blobs(classes=10, per_class=8, noise=1.5)
    rng = np.random.default_rng(4)
    first, second = rng.integers(0, 80, 400), rng.integers(0, 80, 400)
    return points, labels, Pairs(first, second, labels[first] == labels[second])


def cosines(points: Any, pairs: Pairs) -> Any:
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    return np.array([unit[a] @ unit[b] for a, b in zip(pairs.first, pairs.second, strict=True)])


def test_only_the_given_pairs_count(listed: Any) -> None:
    points, labels, pairs = listed
    scores = np.round(cosines(points, pairs) * 2**40)
    metrics = evaluate("verification", points, labels, pairs=pairs).metrics
    assert metrics["verification/auc"] == pytest.approx(roc_auc_score(pairs.same, scores), abs=1e-9)
    far, tar, _ = roc_curve(pairs.same, scores, drop_intermediate=False)
    assert metrics["verification/tar_at_far_1e-2"] == pytest.approx(tar[far <= 0.01].max(), abs=1e-9)


def test_accuracy_is_lfws_with_the_lists_folds(listed: Any) -> None:
    points, labels, pairs = listed
    fold = np.random.default_rng(0).integers(0, 5, 400) * 7
    scores, correct = cosines(points, pairs), []
    for index in np.unique(fold):
        threshold = best_threshold(scores[fold != index], pairs.same[fold != index])
        correct.append(((scores[fold == index] >= threshold) == pairs.same[fold == index]).mean())
    result = evaluate("verification", points, labels, pairs=Pairs(pairs.first, pairs.second, pairs.same, fold))
    assert result.metrics["verification/accuracy"] == pytest.approx(np.mean(correct))
    assert len(result.curves["fold_accuracy"]) == 5


def test_a_list_without_folds_is_cut_as_lfws_was_written() -> None:
    lfw = np.tile(np.repeat([True, False], 300), 10)
    folds = list_folds(lfw)
    assert folds is not None
    assert folds.tolist() == np.repeat(np.arange(10), 600).tolist()
    grouped = list_folds(np.repeat([True, False], [30, 60]))
    assert grouped is not None
    assert np.bincount(grouped).tolist() == [9] * 10
    assert list_folds(np.array([True, False, False])) is None


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_equals_scikit_learn_with_many_ties(data: Any) -> None:
    size = data.draw(st.integers(4, 12))
    rows = data.draw(st.lists(st.tuples(st.integers(-2, 2), st.integers(-2, 2)), min_size=size, max_size=size))
    labels = data.draw(st.lists(st.integers(0, 2), min_size=size, max_size=size))
    points, classes = np.array(rows, float), np.array(labels)
    first, second = np.triu_indices(size, 1)
    same = classes[first] == classes[second]
    if same.all() or not same.any():
        return
    length = np.linalg.norm(points, axis=1)
    product = (points[first] * points[second]).sum(axis=1)
    scores = np.round(product / np.where(length[first] * length[second], length[first] * length[second], 1), 11)
    far, tar, _ = roc_curve(same, scores, drop_intermediate=False)
    listed = evaluate("verification", points, classes, pairs=Pairs(first, second, same))
    everything = evaluate("verification", points, classes)
    for result in (listed, everything):
        assert result.metrics["verification/auc"] == pytest.approx(roc_auc_score(same, scores), abs=1e-9)
        for x, y in zip(result.curves["roc_far"], result.curves["roc_tar"], strict=True):
            assert y == pytest.approx(tar[far <= x + 1e-12].max(), abs=1e-9)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"first": np.array([0, 80])}, r"(?s)pairs\.first.*0\.\.79"),
        ({"second": np.array([-1, 3])}, r"(?s)pairs\.second"),
        ({"same": np.array([True, True])}, "genuine and impostor"),
        ({"same": np.array([2, 0])}, "true or false"),
        ({"fold": np.array([0.5, 1])}, "integers"),
        ({"first": np.array([1])}, "shape"),
    ],
)
def test_wrong_lists_are_refused(listed: Any, changes: Any, words: Any) -> None:
    points, labels, _ = listed
    columns = {"first": np.array([0, 1]), "second": np.array([2, 3]), "same": np.array([True, False])} | changes
    with pytest.raises(UserError, match=words):
        evaluate("verification", points, labels, pairs=Pairs(**columns))


@pytest.mark.parametrize("ending", ["npz", "csv", "parquet"])
def test_files_of_pairs(tmp_path: Any, ending: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / f"pairs.{ending}"
    columns: dict[str, Any] = {"first": [0, 1, 2], "second": [3, 4, 5], "same": [True, False, True], "fold": [0, 0, 1]}
    if ending == "npz":
        np.savez(path, **columns)
    elif ending == "csv":
        path.write_text("first,second,same,fold\n0,3,true,0\n1,4,false,0\n2,5,true,1\n")
    else:
        pq.write_table(pa.table(columns), path)
    pairs = read_pairs(path)
    assert {name: getattr(pairs, name).tolist() for name in columns} == columns


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("first,second,sam\n0,1,1\n", "rename 'sam' to 'same'"),
        ("first,second,same\n0,,1\n", "1 rows are empty"),
        ("", "not a readable CSV"),
        ("first,second,same\n0,1\n", "not a readable CSV"),
    ],
)
def test_damaged_files_of_pairs_are_named(tmp_path: Any, content: Any, words: Any) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=words) as caught:
        read_pairs(path)
    assert str(path) in str(caught.value)
