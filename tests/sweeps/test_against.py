"""Two metrics against each other: what a study says of a peak and of a correlation."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from armillary.spec.jobs import StudyJob
from armillary.sweeps import against
from armillary.tracking import format as shown
from armillary.tracking.leaderboard import Board, Group
from armillary.tracking.uncertainty import summarize


def group(name: str, first: str, metrics: Mapping[str, list[float]]) -> Group:
    values = {(0, seed): value for seed, value in enumerate(metrics[first])}
    return Group(
        label=name,
        baseline=False,
        backbone="b",
        variant=name,
        digest=name,
        config="",
        folds=(0,),
        seeds=tuple(range(len(values))),
        run_ids=tuple(f"{name}{seed}" for _, seed in values),
        metrics={metric: summarize(found) for metric, found in metrics.items()},
        values=values,
    )


def board(first: str, found: Mapping[str, Mapping[str, list[float]]], also: tuple[str, ...] = ()) -> Board:
    groups = tuple(group(name, first, metrics) for name, metrics in found.items())
    return Board("d", "f", "sample", "test", first, groups, also=also)


def job(study_job: StudyJob, metrics: tuple[str, ...], pair: tuple[str, str]) -> StudyJob:
    return study_job.model_copy(update={"compare": None, "metrics": metrics, "against": pair})


def curve(accuracies: list[float]) -> dict[str, dict[str, list[float]]]:
    """Places 0, 1, ...; three runs each, that differ by their seed alone."""
    return {
        f"crop {place}": {"acc": [value, value + 0.01, value + 0.021], "info": [float(place)] * 3}
        for place, value in enumerate(accuracies)
    }


def test_a_peak_falls_to_both_sides(study_job: StudyJob) -> None:
    study = job(study_job, ("acc", "info"), ("info", "acc"))
    top, low, high = against.sentences(study, board("acc", curve([0.5, 0.7, 0.9, 0.6])))
    assert top == "acc is highest, 0.9103, at crop 2 (info 2.000)."
    assert low.startswith("Towards the lowest info it falls by 0.4000, at crop 0 (info 0.000);")
    assert high.startswith("Towards the highest info it falls by 0.3000, at crop 3 (info 3.000);")
    assert "(paired, 3 pairs), which tells them apart" in high


def test_no_peak_is_said_so(study_job: StudyJob) -> None:
    study = job(study_job, ("acc", "info"), ("info", "acc"))
    found = against.sentences(study, board("acc", curve([0.5, 0.6, 0.7, 0.9])))
    assert found[-1] == "That is the highest info there is: it has no peak inside this range."
    assert "falls by 0.4000" in found[1]


@pytest.mark.parametrize(("values", "strength"), [([1, 2, 3, 4, 5], "+1.00"), ([5, 4, 3, 2, 1], "-1.00")])
def test_a_rank_correlation(study_job: StudyJob, values: list[float], strength: str) -> None:
    found = {
        f"m{place}": {"acc": [float(value)], "a": [float(place**2)], "u": [7.0 - place]}
        for place, value in enumerate(values)
    }
    study = job(study_job, ("acc", "a", "u"), ("a", "u"))
    first, second = against.sentences(study, board("acc", found))
    # Of the 120 orders of five points one is as strong, and its reverse.
    assert first == f"Rank correlation of acc with a: {strength} over the means of 5 variants (p 0.017 by permutation)."
    assert ("-" in second) is ("+" in strength)
    assert against.shades(study, board("acc", found)) == {name: metrics["acc"][0] for name, metrics in found.items()}


def test_too_few_variants_say_nothing(study_job: StudyJob) -> None:
    few = {f"m{place}": {"acc": [place * 1.0], "a": [place * 1.0], "u": [place * 1.0]} for place in range(3)}
    assert against.sentences(job(study_job, ("acc",), ("a", "u")), board("acc", few)) == []
    assert against.sentences(job(study_job, ("acc",), ("a", "acc")), board("acc", few)) == []
    assert against.sentences(study_job, board("acc", few)) == []


def test_the_table_shows_what_the_study_measures() -> None:
    found = board("acc", curve([0.5, 0.7]), also=("info", "absent"))
    assert shown.columns(found) == ["acc", "info"]
