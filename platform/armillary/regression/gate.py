"""The statistical test between a regression's runs and their baseline: a pure function of numbers, no files, no clock.

The quantity judged is the *change*: the mean of the candidate minus the mean of the baseline, with its sign turned so
that a positive change is always better. Its two-sided confidence interval comes from

* the paired t test (Student 1908) when both sides hold exactly the same (job, fold, seed) keys: the runs share their
  initialisation and batches, so what the seeds have in common cancels;
* Welch's unequal-variances t test (Welch 1947, degrees of freedom after Satterthwaite 1946) otherwise.

With tolerance ``t`` and interval ``[low, high]`` of the change:

=============  =====================================================================================================
verdict        when
=============  =====================================================================================================
missing        a run did not finish, or lacks the metric, or reports no finite number; decided before anything else
no baseline    nothing was blessed for this data, job and configuration
regressed      ``high < -t``: even the kindest end of the interval is worse than tolerated
improved       ``low > 0``
pass           ``low >= -t``: a worsening beyond the tolerance is ruled out
inconclusive   the interval reaches to both sides of ``-t``, or one side has a single run and the other several
=============  =====================================================================================================

When nothing changed and the noise is normal, one decision raises a false alarm with probability at most
``(1 - confidence) / 2`` (the lower tail of the interval), so a list of ``m`` decisions does in at most
``m (1 - confidence) / 2`` of the nights. Quantised metrics on few images are not normal; give them a tolerance.

**Without an interval.** One run a side, or runs whose spread is zero (a deterministic trainer), give no interval. Then
the rule is fixed: equal numbers pass, a worsening beyond the tolerance is ``regressed``, a gain beyond it is
``improved``, anything between passes; the decision's ``method`` says ``without interval``.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from armillary.spec.jobs import GateMetric

Verdict = Literal["pass", "improved", "inconclusive", "no baseline", "regressed", "missing"]
Method = Literal["paired", "welch", "without interval", "none"]

# From harmless to alarming; the verdict of a whole list is its last one.
SEVERITY: tuple[Verdict, ...] = ("improved", "pass", "inconclusive", "no baseline", "regressed", "missing")
ALARMS: frozenset[Verdict] = frozenset({"regressed", "missing"})

# Differences below this share of the values are rounding: 0.90 - 0.89 is not exactly 0.01.
_ROUNDING = 1e-12


class Key(NamedTuple):
    """What makes two runs comparable one to one."""

    job: str
    fold: int
    seed: int


class Observation(NamedTuple):
    """One expected run's value of the metric; ``value`` is ``None`` when there is none, and ``note`` says why."""

    key: Key
    value: float | None
    note: str = ""


class Decision(BaseModel):
    """What the gate says of one metric of one job, with the numbers behind it.

    ``change`` is positive when the candidate is better, whatever the metric's direction; ``interval`` is its confidence
    interval. Means and change are in the metric's own unit and ``None`` where they could not be computed.
    """

    model_config = ConfigDict(frozen=True)

    job: str
    metric: str
    verdict: Verdict
    reason: str
    method: Method = "none"
    direction: Literal["higher", "lower"] = "higher"
    tolerance: float = 0.0
    confidence: float = 0.95
    baseline_mean: float | None = None
    candidate_mean: float | None = None
    change: float | None = None
    interval: tuple[float, float] | None = None
    baseline_runs: int = 0
    candidate_runs: int = 0

    @property
    def alarm(self) -> bool:
        """Whether this decision alone makes the check fail."""
        return self.verdict in ALARMS


def decide(
    metric: GateMetric,
    baseline: Sequence[Observation],
    candidate: Sequence[Observation],
    *,
    confidence: float = 0.95,
    job: str = "",
    no_baseline: str = "no baseline is blessed for this job",
) -> Decision:
    """Judges one metric of one job; see the module's table for the rules.

    Args:
        metric: the metric's name, the direction that is better, and the tolerated worsening in the metric's unit.
        baseline: the blessed runs' values, all finite; empty when there is nothing to compare with.
        candidate: one observation for every run that was *expected*, finished or not.
        confidence: of the two-sided interval, in (0.5, 1).
        job: the job's name, carried into the decision.
        no_baseline: the reason given when ``baseline`` is empty.

    Raises:
        ValueError: a key occurs twice on a side, or a baseline value is not a finite number.
    """
    old, new = _by_key(baseline), _by_key(candidate)
    if any(value is None or not math.isfinite(value) for value in old.values()):
        raise ValueError(f"the baseline of {job!r} holds a value of {metric.name} that is not a finite number")

    def decision(verdict: Verdict, reason: str, **numbers: object) -> Decision:
        return Decision.model_validate(
            {
                "job": job,
                "metric": metric.name,
                "verdict": verdict,
                "reason": reason,
                "direction": metric.direction,
                "tolerance": metric.tolerance,
                "confidence": confidence,
                "baseline_runs": len(old),
                "candidate_runs": sum(_present(value) for value in new.values()),
                **numbers,
            }
        )

    absent = [observation for observation in candidate if not _present(observation.value)]
    if absent or not candidate:
        return decision("missing", _missing_reason(metric.name, absent, len(candidate)))
    if not old:
        return decision("no baseline", _sentence(no_baseline))

    before, after = [_real(value) for value in old.values()], [_real(value) for value in new.values()]
    means = {"baseline_mean": statistics.mean(before), "candidate_mean": statistics.mean(after)}
    sign = 1.0 if metric.direction == "higher" else -1.0
    scale = max(abs(value) for value in [*before, *after])
    paired = old.keys() == new.keys()
    if paired:
        differences = [sign * (_real(new[key]) - _real(old[key])) for key in old]
        change = statistics.mean(differences)
    else:
        differences = []
        change = sign * (means["candidate_mean"] - means["baseline_mean"])
    if abs(change) <= _ROUNDING * scale:
        change = 0.0
    numbers: dict[str, object] = {**means, "change": change}

    if (len(before) == 1) != (len(after) == 1):
        counts = f"{len(after)} candidate and {len(before)} baseline run{'s' if len(before) > 1 else ''}"
        return decision("inconclusive", f"Too few runs for an interval: {counts}.", **numbers)
    half = _half_width(differences, confidence) if paired else _welch_half_width(before, after, confidence)
    if half is None or half <= _ROUNDING * scale:
        verdict, reason, method = _without_interval(metric, change, scale, single=len(after) == 1)
        return decision(verdict, reason, method=method, **numbers)
    low, high = change - half, change + half
    verdict, reason = _with_interval(metric, change, low, high, confidence, scale)
    return decision(verdict, reason, method="paired" if paired else "welch", interval=(low, high), **numbers)


def overall(decisions: Iterable[Decision]) -> Verdict:
    """The most alarming verdict of a list; ``missing`` for an empty one, because nothing was shown."""
    verdicts = {decision.verdict for decision in decisions}
    return max(verdicts, key=SEVERITY.index) if verdicts else "missing"


def exit_code(decisions: Iterable[Decision]) -> int:
    """1 when any metric regressed or is missing (or nothing was decided at all), otherwise 0."""
    return int(overall(decisions) in ALARMS)


def _by_key(observations: Sequence[Observation]) -> Mapping[Key, float | None]:
    values = {observation.key: observation.value for observation in observations}
    if len(values) != len(observations):
        raise ValueError("two runs share one (job, fold, seed); the gate cannot pair them")
    return values


def _present(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _real(value: float | None) -> float:
    assert value is not None  # absent values are turned away before any arithmetic
    return float(value)


def _quantile(confidence: float, freedom: float) -> float:
    # scipy.special's t quantile; importing scipy.stats for it would cost a second.
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.5 + confidence / 2))


def _half_width(differences: Sequence[float], confidence: float) -> float | None:
    count = len(differences)
    if count < 2:
        return None
    error = statistics.stdev(differences) / math.sqrt(count)
    return _quantile(confidence, count - 1) * error


def _welch_half_width(before: Sequence[float], after: Sequence[float], confidence: float) -> float | None:
    if len(before) < 2 or len(after) < 2:
        return None
    shares = [statistics.variance(side) / len(side) for side in (before, after)]
    error = math.sqrt(sum(shares))
    if error == 0:
        return None
    # In units of the summed variance, so that tiny variances do not underflow when squared.
    weights = [share / sum(shares) for share in shares]
    freedom = 1 / (weights[0] ** 2 / (len(before) - 1) + weights[1] ** 2 / (len(after) - 1))
    return _quantile(confidence, freedom) * error


def _with_interval(
    metric: GateMetric, change: float, low: float, high: float, confidence: float, scale: float
) -> tuple[Verdict, str]:
    floor = -metric.tolerance - _ROUNDING * scale
    interval = f"{100 * confidence:g}% interval of the change [{low:+.4g}, {high:+.4g}]"
    allowed = f"the tolerated worsening of {metric.tolerance:g}" if metric.tolerance else "no change"
    if high < floor:
        return "regressed", f"{_moved(change)}: the whole {interval} lies below {allowed}."
    if low > 0:
        return "improved", f"{_moved(change)}: the whole {interval} lies above zero."
    if low >= floor:
        return "pass", f"{_moved(change)}: the {interval} stays above {allowed}."
    return "inconclusive", f"{_moved(change)}: the {interval} straddles {allowed}; more seeds would narrow it."


def _without_interval(metric: GateMetric, change: float, scale: float, *, single: bool) -> tuple[Verdict, str, Method]:
    why = "one run a side" if single else "no spread between the runs"
    margin = metric.tolerance + _ROUNDING * scale
    if change == 0:
        return "pass", f"Equal to the baseline ({why}, without interval).", "without interval"
    if change < -margin:
        text = f"{_moved(change)}, more than the tolerated {metric.tolerance:g} ({why}, without interval)."
        return "regressed", text, "without interval"
    if change > margin:
        return "improved", f"{_moved(change)} ({why}, without interval).", "without interval"
    return "pass", f"{_moved(change)}, within {metric.tolerance:g} ({why}, without interval).", "without interval"


def _moved(change: float) -> str:
    if change == 0:
        return "Unchanged"
    return f"{'Better' if change > 0 else 'Worse'} by {abs(change):.4g}"


def _missing_reason(metric: str, absent: Sequence[Observation], expected: int) -> str:
    if not absent:
        return f"No run was expected to report {metric}."
    first = absent[0]
    note = first.note or f"reported no finite {metric}"
    more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
    return _sentence(f"{len(absent)} of {expected} runs missing: seed {first.key.seed} {note}{more}")


def _sentence(text: str) -> str:
    text = text.strip().rstrip(".")
    return text[:1].upper() + text[1:] + "."
