"""Identification and retrieval against plain loops, and the rule for ties."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from armillary.evaluation.protocols import evaluate
from armillary.evaluation.ranking import identification, mate_ranks, retrieval
from armillary.evaluation.result import EvaluationSet
from armillary.spec.errors import UserError


def slow_ranking(points: Any, labels: Any, query: Any) -> Any:
    """The others from best to worst; among equals, other classes first. Says for each whether it is a mate."""
    unit = points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-300)
    others = [i for i in range(len(labels)) if i != query]
    others.sort(key=lambda i: (-round(float(unit[i] @ unit[query]), 11), labels[i] == labels[query]))
    return np.array([labels[i] == labels[query] for i in others])


def slow_metrics(points: Any, labels: Any) -> Any:
    rows = [r for r in (slow_ranking(points, labels, q) for q in range(len(labels))) if r.any()]
    first = np.array([np.flatnonzero(r)[0] + 1 for r in rows])
    precision = [r[: r.sum()].mean() for r in rows]
    average = [sum(r[: i + 1].mean() for i in range(r.sum()) if r[i]) / r.sum() for r in rows]
    full = [np.mean([r[: i + 1].mean() for i in np.flatnonzero(r)]) for r in rows]
    return {
        "identification/rank1": (first <= 1).mean(),
        "identification/rank5": (first <= 5).mean(),
        **{f"retrieval/recall_at_{k}": (first <= k).mean() for k in (1, 2, 4, 8, 10, 100)},
        "retrieval/map": np.mean(full),
        "retrieval/r_precision": np.mean(precision),
        "retrieval/map_at_r": np.mean(average),
    }


def without_draws(metrics: Any) -> Any:
    """Without the open set, whose enrolment is drawn by position."""
    return {name: value for name, value in metrics.items() if "dir_at_far" not in name}


def tied(blobs: Any) -> Any:
    points, labels = blobs(classes=5, per_class=4, width=2)
    labels[:6] = [0, 0, 0, 0, 0, 77]  # classes of unequal size, one of a single image
    return np.round(points), labels


@pytest.mark.parametrize("case", ["plain", "ties"])
@pytest.mark.parametrize("elements", [None, 1, 60])
def test_equals_plain_loops_at_any_block_size(blobs: Any, case: Any, elements: Any) -> None:
    points, labels = blobs(noise=2.0) if case == "plain" else tied(blobs)
    labels = np.unique(labels, return_inverse=True)[1]
    data = EvaluationSet(points, labels)
    found = identification(data, elements=elements).metrics | retrieval(data, elements=elements).metrics
    assert without_draws(found) == pytest.approx(slow_metrics(points, labels), abs=1e-9)


def test_order_of_samples_does_not_matter(blobs: Any) -> None:
    points, labels = tied(blobs)
    order = np.random.default_rng(0).permutation(len(labels))
    for name in ("identification", "retrieval"):
        expected = without_draws(evaluate(name, points, labels).metrics)
        found = without_draws(evaluate(name, points[order], labels[order]).metrics)
        assert found == pytest.approx(expected, abs=1e-12)


def test_a_collapsed_encoder_finds_nothing() -> None:
    labels = np.repeat(np.arange(4), 3)
    for name in ("identification", "retrieval"):
        metrics = evaluate(name, np.ones((12, 7)), labels).metrics
        for short in ("rank1", "rank5", "recall_at_1", "recall_at_8", "r_precision", "map_at_r", "dir_at_far_1e-1"):
            assert metrics.get(f"{name}/{short}", 0.0) == 0.0
    # The mates come last: at places 10 and 11 of 11.
    assert metrics["retrieval/map"] == pytest.approx((1 / 10 + 2 / 11) / 2)


def test_random_embeddings_are_at_chance() -> None:
    rng = np.random.default_rng(2)
    metrics = evaluate("identification", rng.standard_normal((600, 32)), rng.integers(0, 10, 600)).metrics
    assert metrics["identification/rank1"] == pytest.approx(0.1, abs=0.04)
    assert metrics["identification/rank5"] == pytest.approx(1 - 0.9**5, abs=0.06)


def test_the_cmc_rises_to_one_and_passes_the_metrics(blobs: Any) -> None:
    points, labels = blobs(noise=2.0)
    result = evaluate("identification", points, labels)
    cmc = result.curves["cmc"]
    assert (np.diff(cmc) >= 0).all()
    assert cmc[-1] == 1.0
    assert cmc[0] == result.metrics["identification/rank1"]
    assert cmc[4] == result.metrics["identification/rank5"]


def test_fewer_than_five_others_is_rank_five_among_all() -> None:
    metrics = evaluate("identification", np.eye(3), [0, 0, 1]).metrics
    assert metrics == {"identification/rank1": 0.0, "identification/rank5": 1.0}


@pytest.mark.parametrize("name", ["identification", "retrieval"])
def test_only_single_images_are_refused(name: Any) -> None:
    with pytest.raises(UserError, match="two images"):
        evaluate(name, np.eye(3), [0, 1, 2])


def test_map_at_r_agrees_with_pytorch_metric_learning(blobs: Any) -> None:
    torch = pytest.importorskip("torch")
    calculator_module = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator")
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.utils.inference import CustomKNN

    points, labels = blobs(noise=1.5)
    calculator = calculator_module.AccuracyCalculator(
        include=("precision_at_1", "r_precision", "mean_average_precision_at_r"),
        k="max_bin_count",
        knn_func=CustomKNN(CosineSimilarity()),
    )
    theirs = calculator.get_accuracy(torch.tensor(points), torch.tensor(labels))
    ours = evaluate("retrieval", points, labels).metrics
    assert ours["retrieval/recall_at_1"] == pytest.approx(theirs["precision_at_1"])
    assert ours["retrieval/r_precision"] == pytest.approx(theirs["r_precision"])
    assert ours["retrieval/map_at_r"] == pytest.approx(theirs["mean_average_precision_at_r"])


@given(
    st.lists(st.integers(-6, 6), max_size=40),
    st.lists(st.integers(-6, 6), min_size=1, max_size=8),
    st.sampled_from([0, 2**39, -(2**40)]),
)
def test_ranks_are_exact_in_the_last_digit_and_ties_count_against_mates(others: Any, mates: Any, near: int) -> None:
    own = np.array([*mates, np.inf]) + near - 0.5
    row = np.concatenate([np.array(others, float) + near, own])
    ranks = mate_ranks(row, len(others), len(row))
    expected = [
        sum(other >= mate for other in others) + place for place, mate in enumerate(sorted(mates, reverse=True), 1)
    ]
    assert ranks.tolist() == expected


def test_mates_are_ranked_after_others_that_tie() -> None:
    row = np.array([5.0, 3.0, 3.0, 1.0, 2.5, 5.5, np.inf, -0.5])
    assert mate_ranks(row, 4, 8).tolist() == [1, 5, 7]


def test_retrieval_does_not_depend_on_threads(blobs: Any) -> None:
    torch = pytest.importorskip("torch")
    data = EvaluationSet(*blobs(classes=9, per_class=7, noise=1.5))
    expected, threads = retrieval(data, elements=100).metrics, torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert retrieval(data, elements=100).metrics == expected
    finally:
        torch.set_num_threads(threads)
