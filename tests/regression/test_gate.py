"""The gate against scipy, against hand computation, and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from armillary.regression.gate import Decision, Key, Observation, Verdict, decide, exit_code, overall
from armillary.spec.jobs import GateMetric

AUC = GateMetric(name="verification/auc")


def side(values: list[float] | np.ndarray, first_seed: int = 0, job: str = "arcface") -> list[Observation]:
    return [Observation(Key(job, 0, first_seed + i), float(value)) for i, value in enumerate(values)]


def verdict_of(old: list[float], new: list[float], metric: GateMetric = AUC, shift: int = 0) -> Decision:
    return decide(metric, side(old), side(new, first_seed=shift), job="arcface")


def test_paired_interval_is_scipys() -> None:
    old, new = [0.971, 0.975, 0.969, 0.980], [0.968, 0.974, 0.965, 0.975]
    decision = decide(AUC, side(old), side(new), confidence=0.9)
    low, high = stats.ttest_rel(new, old).confidence_interval(0.9)
    assert decision.method == "paired"
    assert decision.interval == pytest.approx((low, high))


@pytest.mark.parametrize("count", [2, 3, 7])
def test_welch_interval_is_scipys(count: int) -> None:
    rng = np.random.default_rng(count)
    old, new = rng.normal(0.97, 0.01, 4), rng.normal(0.96, 0.03, count)
    decision = decide(AUC, side(old), side(new, first_seed=100))
    low, high = stats.ttest_ind(new, old, equal_var=False).confidence_interval(0.95)
    assert decision.method == "welch"
    assert decision.interval == pytest.approx((low, high))


def test_paired_by_hand() -> None:
    # Differences -1, -2, -3: mean -2, standard error 1/sqrt(3); t(0.975, 2) = 4.302653.
    decision = verdict_of([10, 20, 30], [9, 18, 27])
    assert decision.change == pytest.approx(-2)
    assert decision.interval == pytest.approx((-2 - 4.302653 / math.sqrt(3), -2 + 4.302653 / math.sqrt(3)), abs=1e-5)


def test_pairs_follow_the_seed_not_the_order() -> None:
    old = side([0.90, 0.95, 0.99])
    new = [Observation(item.key, item.value and item.value - 0.01) for item in reversed(old)]
    decision = decide(AUC, old, new)
    assert (decision.verdict, decision.method) == ("regressed", "without interval"), "every pair lost exactly 0.01"
    assert decision.change == pytest.approx(-0.01)


def test_other_seeds_or_another_fold_are_not_paired() -> None:
    values = [0.90, 0.91, 0.93]
    assert verdict_of(values, values, shift=1).method == "welch"
    other_fold = [Observation(item.key._replace(fold=1), item.value) for item in side(values)]
    assert decide(AUC, side(values), other_fold).method == "welch"


def test_lower_is_better_turns_the_sign() -> None:
    eer = GateMetric(name="verification/eer", direction="lower")
    worse = verdict_of([0.050, 0.051, 0.049], [0.081, 0.080, 0.079], eer)
    assert worse.verdict == "regressed"
    assert worse.change == pytest.approx(-0.03)
    assert verdict_of([0.081, 0.080, 0.079], [0.050, 0.051, 0.049], eer).verdict == "improved"


@pytest.mark.parametrize(
    ("tolerance", "expected"), [(0.0, "regressed"), (0.008, "regressed"), (0.0102, "inconclusive"), (0.02, "pass")]
)
def test_tolerance(tolerance: float, expected: Verdict) -> None:
    # Differences -0.0099, -0.0100, -0.0104: interval about [-0.0108, -0.0094].
    metric = GateMetric(name="verification/auc", tolerance=tolerance)
    decision = verdict_of([0.97, 0.975, 0.98], [0.9601, 0.965, 0.9696], metric)
    assert decision.verdict == expected, decision.reason
    assert decision.alarm is (expected == "regressed")


def test_an_interval_across_zero_is_no_pass_without_tolerance() -> None:
    decision = verdict_of([0.97, 0.975, 0.98], [0.971, 0.973, 0.981])
    assert decision.verdict == "inconclusive"
    assert not decision.alarm


@pytest.mark.parametrize(
    ("new", "tolerance", "expected"),
    [
        (0.9, 0.0, "pass"),
        (0.9 - 1e-9, 0.0, "regressed"),
        (0.89, 0.01, "pass"),
        (0.889, 0.01, "regressed"),
        (0.905, 0.01, "pass"),
        (0.95, 0.01, "improved"),
    ],
)
def test_one_run_a_side(new: float, tolerance: float, expected: Verdict) -> None:
    decision = verdict_of([0.9], [new], GateMetric(name="verification/auc", tolerance=tolerance))
    assert (decision.verdict, decision.method, decision.interval) == (expected, "without interval", None)
    assert "without interval" in decision.reason


def test_one_against_several_is_too_few() -> None:
    for old, new in (([0.9], [0.1, 0.2, 0.3]), ([0.9, 0.91, 0.92], [0.1])):
        decision = verdict_of(old, new)
        assert decision.verdict == "inconclusive"
        assert "Too few runs" in decision.reason


def test_identical_runs_pass_with_zero_tolerance() -> None:
    decision = verdict_of([0.971, 0.975, 0.969], [0.971, 0.975, 0.969])
    assert (decision.verdict, decision.change, decision.method) == ("pass", 0.0, "without interval")


@pytest.mark.parametrize("shift", [0, 10])
def test_zero_variance(shift: int) -> None:
    # 0.1 three times sums to 0.30000000000000004: the mean must still equal that of two.
    assert verdict_of([0.1, 0.1], [0.1, 0.1, 0.1], shift=shift).verdict == "pass"
    assert verdict_of([0.7, 0.7, 0.7], [0.6, 0.6, 0.6], shift=shift).verdict == "regressed"
    assert verdict_of([0.6, 0.6, 0.6], [0.7, 0.7, 0.7], shift=shift).verdict == "improved"


def test_zero_variance_on_one_side_still_has_an_interval() -> None:
    decision = verdict_of([1.0, 1.0, 1.0], [0.79, 0.80, 0.81], shift=10)
    assert (decision.verdict, decision.method) == ("regressed", "welch")
    assert decision.interval == pytest.approx(
        (-0.2 - 0.024841, -0.2 + 0.024841), abs=1e-5
    )  # t(0.975, 2) / 100 / sqrt(3)


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_a_missing_run_is_never_a_pass(value: float | None) -> None:
    old = side([0.97, 0.975, 0.98])
    new = [*old[:2], Observation(old[2].key, value, "is failed: out of memory")]
    decision = decide(AUC, old, new)
    assert decision.verdict == "missing"
    assert "seed 2 is failed: out of memory" in decision.reason
    assert decide(AUC, [], new).verdict == "missing", "even without a baseline"
    assert decide(AUC, old, []).verdict == "missing"
    assert decision.candidate_runs == 2


def test_no_baseline_carries_its_reason() -> None:
    decision = decide(AUC, [], side([0.97, 0.98]), no_baseline="the data changed")
    assert (decision.verdict, decision.reason) == ("no baseline", "The data changed.")


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="share one"):
        decide(AUC, side([0.9, 0.9]), [*side([0.9]), *side([0.9])])
    with pytest.raises(ValueError, match="not a finite"):
        decide(AUC, side([math.nan]), side([0.9]))


def test_the_worst_verdict_decides_the_exit_code() -> None:
    decisions = [verdict_of([0.9], [0.9]), verdict_of([0.9], [0.95])]
    assert (overall(decisions), exit_code(decisions)) == ("pass", 0)
    decisions.append(decide(AUC, [], side([0.9])))
    assert (overall(decisions), exit_code(decisions)) == ("no baseline", 0)
    decisions.append(verdict_of([0.9], [0.8]))
    assert (overall(decisions), exit_code(decisions)) == ("regressed", 1)
    decisions.append(decide(AUC, side([0.9]), []))
    assert (overall(decisions), exit_code(decisions)) == ("missing", 1)
    assert exit_code([]) == 1, "nothing decided is nothing shown"


@pytest.mark.parametrize("drop", [0.0, 0.05])
@pytest.mark.parametrize(("shared", "shift", "spread"), [(0.01, 0, 0.005), (0.0, 1000, 0.005), (0.0, 1000, 0.02)])
def test_false_alarms_and_power(shared: float, shift: int, spread: float, drop: float) -> None:
    """2000 nights: without a change alarms stay at the nominal rate; a real drop is found.

    ``shared`` is what the seeds of both sides have in common (paired), ``spread`` the noise of the candidate's runs.
    """
    rng = np.random.default_rng(7)
    nights, runs = 2000, 5
    nominal = 0.025  # the lower tail of a 95% interval
    alarms = 0
    for _ in range(nights):
        by_seed = rng.normal(0.95, shared, runs) if shared else np.full(runs, 0.95)
        old = by_seed + rng.normal(0, 0.005, runs)
        new = by_seed + rng.normal(0, spread, runs) - drop
        alarms += verdict_of(list(old), list(new), shift=shift).alarm
    if drop:
        assert alarms / nights > 0.95
    else:
        limit = stats.binom.ppf(0.999, nights, nominal)
        assert alarms <= limit, f"{alarms} false alarms, at most {limit:.0f} are chance at the nominal rate"
        assert alarms > 0, "an alarm that can never ring proves nothing"


def test_tolerance_makes_false_alarms_rare() -> None:
    rng = np.random.default_rng(3)
    metric = GateMetric(name="verification/auc", tolerance=0.02)
    verdicts = [
        verdict_of(list(rng.normal(0.95, 0.005, 3)), list(rng.normal(0.95, 0.005, 3)), metric, shift=10).verdict
        for _ in range(500)
    ]
    assert verdicts.count("regressed") == 0
    assert verdicts.count("pass") + verdicts.count("improved") > 350
