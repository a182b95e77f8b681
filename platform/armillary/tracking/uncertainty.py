"""Means with their uncertainty, and whether two configurations can be told apart. No MLflow, no I/O."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

CONFIDENCE = 0.95

# Differences and spreads below this share of the values are rounding, not variation.
_ROUNDING = 1e-12

Pair = tuple[int, int]


@dataclass(frozen=True)
class Summary:
    """Mean of ``n`` runs; ``half_width`` is that of the 95% Student t interval, ``None`` for a single run."""

    n: int
    mean: float
    half_width: float | None


@dataclass(frozen=True)
class Difference:
    """A mean difference with its interval and two-sided p-value; both ``None`` where ``n`` is too small to tell."""

    test: Literal["paired", "welch"]
    n: int
    mean: float
    half_width: float | None
    p: float | None


def t_quantile(degrees: float, confidence: float = CONFIDENCE) -> float:
    """The two-sided Student t quantile, e.g. 4.303 for 2 degrees of freedom at 0.95."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 0.5 + confidence / 2))


def summarize(values: Sequence[float], confidence: float = CONFIDENCE) -> Summary:
    """Mean and Student t interval over runs.

    Args:
        values: one finite number a run, at least one.
        confidence: coverage of the interval, in (0, 1).
    """
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Summary(1, mean, None)
    error = math.sqrt(_variance(values) / n)
    if error <= _ROUNDING * max(map(abs, values)):
        return Summary(n, mean, 0.0)
    return Summary(n, mean, t_quantile(n - 1, confidence) * error)


def paired_difference(a: Mapping[Pair, float], b: Mapping[Pair, float], confidence: float = CONFIDENCE) -> Difference:
    """Mean of ``a - b`` over the (fold, seed) pairs that both have, by the paired t-test.

    Pairing takes out what the fold and the seed do to both sides alike, which is most of the variation when a fold
    holds out other classes.

    Args:
        a: a run's value by (fold, seed).
        b: the same for the other side; the two must share at least one pair.
        confidence: coverage of the interval, in (0, 1).

    Raises:
        ValueError: no pair in common.
    """
    pairs = sorted(a.keys() & b.keys())
    if not pairs:
        raise ValueError("the two sides share no (fold, seed)")
    differences = [a[pair] - b[pair] for pair in pairs]
    scale = max(abs(value) for pair in pairs for value in (a[pair], b[pair]))
    mean = math.fsum(differences) / len(pairs)
    if len(pairs) == 1:
        return Difference("paired", 1, mean, None, None)
    error = math.sqrt(_variance(differences) / len(pairs))
    half_width, p = _interval(mean, error, len(pairs) - 1, scale, confidence)
    return Difference("paired", len(pairs), mean, half_width, p)


def welch_difference(a: Sequence[float], b: Sequence[float], confidence: float = CONFIDENCE) -> Difference:
    """Mean of ``a`` minus mean of ``b`` by Welch's t-test, which assumes neither pairs nor equal variances.

    Args:
        a: one value a run.
        b: the same for the other side. The interval needs two runs on either side.
        confidence: coverage of the interval, in (0, 1).
    """
    mean = math.fsum(a) / len(a) - math.fsum(b) / len(b)
    n = min(len(a), len(b))
    if n < 2:
        return Difference("welch", n, mean, None, None)
    shares = _variance(a) / len(a), _variance(b) / len(b)
    error = math.sqrt(sum(shares))
    weights = shares[0] ** 2 / (len(a) - 1) + shares[1] ** 2 / (len(b) - 1)
    degrees = sum(shares) ** 2 / weights if weights > 0 else len(a) + len(b) - 2
    half_width, p = _interval(mean, error, degrees, max(map(abs, [*a, *b])), confidence)
    return Difference("welch", n, mean, half_width, p)


def difference(a: Mapping[Pair, float], b: Mapping[Pair, float], confidence: float = CONFIDENCE) -> Difference:
    """Paired where both sides have exactly the same (fold, seed) pairs, Welch's otherwise."""
    if a.keys() == b.keys():
        return paired_difference(a, b, confidence)
    return welch_difference(list(a.values()), list(b.values()), confidence)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: adjusted p-values in the order given, each at most 1."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for position, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - position) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def _variance(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)


def _interval(mean: float, error: float, degrees: float, scale: float, confidence: float) -> tuple[float, float]:
    """Half width and two-sided p-value; runs that repeat to the last digit have neither spread nor doubt."""
    # scipy.stats has the same functions, a second of import and checks that cost more than the numbers.
    from scipy.special import stdtr

    if error <= _ROUNDING * scale:
        return 0.0, 1.0 if abs(mean) <= _ROUNDING * scale else 0.0
    return t_quantile(degrees, confidence) * error, float(2 * stdtr(degrees, -abs(mean) / error))
