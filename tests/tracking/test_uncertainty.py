from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from armillary.tracking.uncertainty import (
    difference,
    holm,
    paired_difference,
    summarize,
    t_quantile,
    welch_difference,
)


def test_interval_by_hand() -> None:
    # Mean 2, standard deviation 1, standard error 1/sqrt(3); Student's table gives 4.303 for 2 degrees of freedom.
    found = summarize([1.0, 2.0, 3.0])
    assert (found.n, found.mean) == (3, 2.0)
    assert found.half_width == pytest.approx(4.3026527 / 3**0.5, rel=1e-6)


def test_one_run_has_no_interval() -> None:
    assert summarize([0.7]).half_width is None


def test_quantile_depends_on_confidence() -> None:
    assert t_quantile(2) == pytest.approx(4.3026527, rel=1e-6)
    assert t_quantile(2, 0.9) == pytest.approx(2.9199856, rel=1e-6)


@pytest.mark.parametrize("sizes", [(2, 2), (3, 5), (8, 4)])
def test_welch_agrees_with_scipy(sizes: tuple[int, int]) -> None:
    generator = np.random.default_rng(sum(sizes))
    a, b = (list(generator.normal(loc, scale, n)) for loc, scale, n in zip((0.9, 0.8), (0.1, 0.02), sizes, strict=True))
    found, expected = welch_difference(a, b), stats.ttest_ind(a, b, equal_var=False)
    interval = expected.confidence_interval(0.95)
    assert found.test == "welch"
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert found.mean == pytest.approx((interval.low + interval.high) / 2, rel=1e-9)
    assert found.half_width == pytest.approx((interval.high - interval.low) / 2, rel=1e-9)


def test_paired_agrees_with_scipy_and_uses_the_pairs() -> None:
    generator = np.random.default_rng(7)
    pairs = [(fold, seed) for fold in range(3) for seed in range(2)]
    a = {pair: float(generator.normal(0.95 + 0.05 * pair[0], 0.01)) for pair in pairs}
    b = {pair: a[pair] - 0.01 + float(generator.normal(0, 0.002)) for pair in reversed(pairs)}
    found = difference(a, b)
    expected = stats.ttest_rel([a[pair] for pair in pairs], [b[pair] for pair in pairs])
    interval = expected.confidence_interval(0.95)
    assert (found.test, found.n) == ("paired", 6)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert found.half_width == pytest.approx((interval.high - interval.low) / 2, rel=1e-9)
    # The folds differ by far more than the sides: without the pairs the difference would drown.
    unpaired = welch_difference(list(a.values()), list(b.values()))
    assert unpaired.p is not None
    assert found.p is not None
    assert found.p < 0.01 < 0.5 < unpaired.p


def test_other_pairs_mean_welch() -> None:
    a = {(0, 0): 0.9, (0, 1): 0.91, (0, 2): 0.92}
    assert difference(a, {(0, 0): 0.9, (0, 1): 0.91}).test == "welch"
    assert difference(a, {(1, seed): 0.9 + seed / 50 for seed in range(3)}).test == "welch"


def test_paired_takes_what_both_have() -> None:
    found = paired_difference({(0, 0): 3.0, (0, 1): 5.0, (9, 9): 100.0}, {(0, 0): 1.0, (0, 1): 2.0, (8, 8): -100.0})
    assert (found.n, found.mean) == (2, 2.5)
    assert paired_difference({(0, 0): 3.0}, {(0, 0): 1.0}).p is None
    with pytest.raises(ValueError, match="share no"):
        paired_difference({(0, 0): 3.0}, {(0, 1): 1.0})


def test_values_without_spread() -> None:
    # 0.1 three times has a mean that is not 0.1 in binary, and so a variance of rounding alone.
    assert summarize([0.1, 0.1, 0.1]).half_width == 0.0
    same = {(0, 0): 0.1 + 0.2, (0, 1): 0.5}
    rounded = {(0, 0): 0.3, (0, 1): 0.5}
    assert difference(same, rounded).p == 1.0
    shifted = {pair: value + 0.1 for pair, value in rounded.items()}
    assert difference(shifted, rounded).p == 0.0
    assert welch_difference([0.5, 0.5], [0.5, 0.5]).p == 1.0
    assert welch_difference([0.5, 0.5], [0.4, 0.4]).p == 0.0
    assert welch_difference([0.5], [0.4, 0.5]).p is None


def test_holm_by_hand() -> None:
    # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1; the last two may not fall below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
