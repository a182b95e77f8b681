"""Two metrics of a study against each other: the points of the picture, and what they answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from armillary.spec.jobs import StudyJob
from armillary.tracking.leaderboard import Board, Group
from armillary.tracking.uncertainty import Difference, difference

# Fewer points than this have no order to speak of.
_FEWEST = 4
_ORDERS = 10_000


def sentences(job: StudyJob, board: Board) -> list[str]:
    """What the study's first metric does over the metrics of ``against``.

    Where it is the second of them: its peak, and how far it falls to both ends. Where it is neither: its rank
    correlation with each, over the means of the variants.
    """
    if job.against is None:
        return []
    x, y = job.against
    if y == job.metrics[0]:
        return _peak(x, y, [group for group in board.groups if x in group.metrics])
    if x == job.metrics[0]:
        return []
    return [line for metric in job.against for line in _correlation(metric, job.metrics[0], board.groups)]


def _peak(x: str, y: str, groups: Sequence[Group]) -> list[str]:
    if len(groups) < _FEWEST:
        return []
    ordered = sorted(groups, key=lambda group: group.metrics[x].mean)
    best = max(ordered, key=lambda group: group.metrics[y].mean)
    lines = [f"{y} is highest, {best.metrics[y].mean:.4f}, at {_place(x, best)}."]
    ends = {"lowest": ordered[0], "highest": ordered[-1]}
    for end, group in ends.items():
        if group is best:
            lines.append(f"That is the {end} {x} there is: it has no peak inside this range.")
            continue
        gap = difference(best.values, group.values)
        lines.append(f"Towards the {end} {x} it falls by {gap.mean:.4f}, at {_place(x, group)}; {verdict(gap)}.")
    return lines


def _place(x: str, group: Group) -> str:
    return f"{group.variant} ({x} {group.metrics[x].mean:.3f})"


def verdict(gap: Difference) -> str:
    """Whether a difference tells its two sides apart, with its interval."""
    if gap.half_width is None:
        return "too few runs to say more"
    low, high = gap.mean - gap.half_width, gap.mean + gap.half_width
    told_apart = "tells them apart" if low > 0 or high < 0 else "does not tell them apart"
    return f"95% interval {low:+.4f} to {high:+.4f} ({gap.test}, {gap.n} pairs), which {told_apart}"


def _correlation(x: str, y: str, groups: Sequence[Group]) -> list[str]:
    """Spearman's rank correlation, with the share of all orders of the points that show one as strong."""
    import numpy as np
    from scipy.stats import permutation_test, spearmanr

    found = [(group.metrics[x].mean, group.metrics[y].mean) for group in groups if x in group.metrics]
    if len(found) < _FEWEST:
        return []
    xs, ys = map(np.array, zip(*found, strict=True))
    tested = permutation_test(
        (xs,),
        lambda values: spearmanr(values, ys).statistic,
        permutation_type="pairings",
        n_resamples=_ORDERS,
        rng=np.random.default_rng(0),
    )
    strength = f"{tested.statistic:+.2f} over the means of {len(found)} variants"
    return [f"Rank correlation of {y} with {x}: {strength} (p {tested.pvalue:.3f} by permutation)."]


def shades(job: StudyJob, board: Board) -> Mapping[str, float] | None:
    """The first metric of each variant, where it is neither axis of the picture."""
    if job.against is None or job.metrics[0] in job.against:
        return None
    return {str(group.variant): group.metrics[job.metrics[0]].mean for group in board.groups}
