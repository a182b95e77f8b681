"""k-NN, probe and few labels: judged with the help of training embeddings."""

from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler, normalize

from armillary.evaluation.neighbors import knn
from armillary.evaluation.probe import stratified_share
from armillary.evaluation.protocols import evaluate
from armillary.evaluation.result import EvaluationSet
from armillary.spec.errors import UserError

NAMES = ("knn", "probe", "few_label")


@pytest.fixture
def digits() -> Any:
    data, target = load_digits(return_X_y=True)
    return {"train": (data[:900], target[:900]), "test": (data[900:], target[900:])}


def judge(name: Any, digits: Any, **changes: Any) -> Any:
    options = {"train_embeddings": digits["train"][0], "train_labels": digits["train"][1]} | changes
    return evaluate(name, *digits["test"], **options)


def test_knn_equals_scikit_learn(digits: Any) -> None:
    (train, labels), (test, truth) = digits["train"], digits["test"]
    metrics = judge("knn", digits).metrics
    votes = KNeighborsClassifier(20, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07)).fit(train, labels)
    assert metrics["knn/top1"] == pytest.approx(votes.score(test, truth))
    plain = KNeighborsClassifier(20, metric="cosine").fit(train, labels)
    # Vote ties fall differently there: to the smaller label instead of to the nearer neighbours.
    assert metrics["knn/top1_plain"] == pytest.approx(plain.score(test, truth), abs=0.01)
    far = KNeighborsClassifier(200, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07)).fit(train, labels)
    assert metrics["knn/top1_k200"] == pytest.approx(far.score(test, truth))
    counts = np.sort(plain.predict_proba(test))[:, ::-1]
    clear = counts[:, 0] > counts[:, 1]
    sure = EvaluationSet(test[clear], truth[clear].astype(np.int64), train, labels.astype(np.int64))
    assert knn(sure).metrics["knn/top1_plain"] == pytest.approx(plain.score(test[clear], truth[clear]))


def test_knn_does_not_depend_on_blocks_or_order(digits: Any) -> None:
    (train, labels), (test, truth) = digits["train"], digits["test"]
    # Copies under other labels: ties at every place.
    train, labels = np.vstack([train, train]), np.concatenate([labels, (labels + 1) % 10])
    expected = knn(EvaluationSet(test, truth, train, labels)).metrics
    order = np.random.default_rng(0).permutation(len(labels))
    assert knn(EvaluationSet(test, truth, train[order], labels[order]), elements=9000).metrics == expected


def test_a_gallery_smaller_than_k_is_used_whole() -> None:
    metrics = evaluate(
        "knn", [[1.0, 0.1], [0.1, 1.0]], ["a", "b"], train_embeddings=np.eye(2), train_labels=["a", "b"]
    ).metrics
    assert metrics == dict.fromkeys(("knn/top1", "knn/top1_plain", "knn/top1_k200", "knn/top1_plain_k200"), 1.0)


def test_probe_is_logistic_regression_on_standardised_embeddings(digits: Any) -> None:
    (train, labels), (test, truth) = digits["train"], digits["test"]
    scaler = StandardScaler().fit(train)
    expected = (
        LogisticRegression(max_iter=1000).fit(scaler.transform(train), labels).score(scaler.transform(test), truth)
    )
    assert judge("probe", digits).metrics["probe/top1"] == pytest.approx(expected, abs=0.002)
    assert expected > 0.9


def test_more_labels_help_and_more_than_chance(digits: Any) -> None:
    metrics = judge("few_label", digits).metrics
    few, more = metrics["few_label/top1_1pct"], metrics["few_label/top1_10pct"]
    assert 0.3 < few < more < judge("probe", digits).metrics["probe/top1"]


def test_the_share_is_stratified_and_never_empty() -> None:
    labels = np.repeat([0, 1, 2], [300, 100, 1])
    chosen = stratified_share(labels, 0.1, np.random.default_rng(0))
    assert np.bincount(labels[chosen]).tolist() == [30, 10, 1]
    assert len(np.unique(chosen)) == len(chosen)


def test_the_seed_fixes_the_draws(digits: Any) -> None:
    first, second = judge("few_label", digits, seed=1), judge("few_label", digits, seed=1)
    assert first.metrics == second.metrics
    assert judge("few_label", digits, seed=2).metrics != first.metrics


@pytest.mark.parametrize("name", NAMES)
def test_shuffled_training_labels_give_chance(digits: Any, name: Any) -> None:
    shuffled = np.random.default_rng(0).permutation(digits["train"][1])
    for value in judge(name, digits, train_labels=shuffled).metrics.values():
        assert value == pytest.approx(0.1, abs=0.07)


@pytest.mark.parametrize("name", NAMES)
def test_what_cannot_be_judged_is_refused(digits: Any, name: Any) -> None:
    with pytest.raises(UserError, match="training embeddings"):
        evaluate(name, *digits["test"])
    with pytest.raises(UserError, match="open set"):
        judge(name, digits, train_labels=digits["train"][1] + 100)
    with pytest.raises(UserError, match="wide"):
        judge(name, digits, train_embeddings=digits["train"][0][:, :5])
    with pytest.raises(UserError, match="both"):
        judge(name, digits, train_labels=digits["train"][1].astype(str))


def test_an_untrained_class_counts_as_wrong() -> None:
    train, test = normalize(np.eye(3)[[0, 0, 1, 1]] + 0.01), np.eye(3)
    for name in ("knn", "probe"):
        metrics = evaluate(name, test, [0, 1, 2], train_embeddings=train, train_labels=[0, 0, 1, 1]).metrics
        assert metrics[f"{name}/top1"] == pytest.approx(2 / 3)


def test_a_probe_of_one_class_is_refused() -> None:
    with pytest.raises(UserError, match="one class"):
        evaluate("probe", np.eye(2), [0, 1], train_embeddings=np.eye(2), train_labels=[0, 0])
