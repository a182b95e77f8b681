"""Finished runs to ranked groups with uncertainty. Pure: rows in, boards out; no MLflow, no I/O.

Runs of one configuration that differ only in seed and fold form a group. Groups are ranked only against groups that
were judged on the same images: a board holds one data fingerprint, split and holdout.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from armillary.spec.errors import UserError, unknown_name
from armillary.tracking.uncertainty import (
    Difference,
    Pair,
    Summary,
    difference,
    holm,
    paired_difference,
    summarize,
)

__all__ = ["Board", "Group", "Row", "build_boards", "lower_is_better", "paired_difference"]

SIGNIFICANCE = 0.05

# Shown beside the ranking metric where a group has them, in this order.
HEADLINE = (
    "verification/auc",
    "verification/eer",
    "verification/tar_at_far_1e-2",
    "identification/rank1",
    "knn/top1",
    "probe/top1",
)

_LOWER = ("eer", "loss", "error", "fnmr", "fmr", "frr", "far", "seconds", "alignment", "uniformity")

# Part of the data fingerprint, beside the images themselves.
_DATA_DETAILS = ("data.image_size", "data.label_noise")

Verdict = Literal["best", "tied", "worse", "untested"]


@dataclass(frozen=True)
class Row:
    """One finished run, as the leaderboard sees it.

    ``digest`` names the configuration without seed and fold; ``changes`` holds, by dotted key, where it departs from
    the defaults; ``metrics`` the final values.
    """

    run_id: str
    objective: str
    backbone: str
    dataset: str
    fingerprint: str
    split: str
    holdout: str
    digest: str
    epochs: int
    fold: int
    seed: int
    created: float
    metrics: Mapping[str, float]
    variant: str | None = None
    group: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """One configuration on a board.

    ``label`` is the objective, or the baseline's name (``pixels``, ``untrained``); ``config`` states what tells it
    from its neighbours; ``verdict`` compares it with the best group: ``tied`` when the two cannot be told apart,
    ``untested`` when either has too few runs to say; ``p`` is Holm-corrected over the board.
    """

    label: str
    baseline: bool
    backbone: str
    variant: str | None
    digest: str
    config: str
    folds: tuple[int, ...]
    seeds: tuple[int, ...]
    run_ids: tuple[str, ...]
    metrics: Mapping[str, Summary]
    values: Mapping[Pair, float]
    verdict: Verdict = "untested"
    difference: Difference | None = None
    p: float | None = None


@dataclass(frozen=True)
class Board:
    """Groups judged on the same data, best first.

    ``skipped`` counts runs without a finite value of the metric; ``details`` states the data settings that are not the
    defaults, e.g. ``image_size=[56, 48]``; ``also`` names metrics to be shown beside the one that ranks.
    """

    dataset: str
    fingerprint: str
    split: str
    holdout: str
    metric: str
    groups: tuple[Group, ...]
    skipped: int = 0
    details: str = ""
    also: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """E.g. ``orl, split by identity, test``."""
        return ", ".join(filter(None, (self.dataset, f"split by {self.split}", self.holdout, self.details)))


def lower_is_better(metric: str) -> bool:
    """Whether a smaller value ranks first: error rates, losses and times; everything else counts upwards.

    Example:
        >>> lower_is_better("verification/eer"), lower_is_better("verification/tar_at_far_1e-2")
        (True, False)
    """
    return metric.rsplit("/", 1)[-1].startswith(_LOWER)


def build_boards(rows: Iterable[Row], metric: str, *, limit: int | None = None) -> list[Board]:
    """Groups, tests and sorts.

    Args:
        rows: finished runs.
        metric: ranks the groups, e.g. ``verification/auc``.
        limit: groups kept a board, after ranking and testing all of them.

    Returns:
        One board for each (dataset fingerprint, split, holdout) that has the metric, the largest first.

    Raises:
        UserError: there are rows and none has the metric; shows the nearest names.
    """
    rows = list(rows)
    named: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        named[(row.fingerprint, row.split, row.holdout)].append(row)
    boards = [board for part in named.values() if (board := _board(part, metric)).groups]
    if rows and not boards:
        raise _unknown_metric(rows, metric)
    boards.sort(key=lambda board: (-sum(len(group.run_ids) for group in board.groups), board.title))
    return [replace(board, groups=board.groups[:limit]) for board in boards]


def build_board(rows: Sequence[Row], metric: str) -> Board:
    """One board of runs that were planned to be compared, whatever data they were trained on.

    The title states only those data settings that all of them share.

    Args:
        rows: finished runs, at least one.
        metric: ranks the groups.

    Raises:
        UserError: none has the metric; shows the nearest names.
    """
    board = _board(rows, metric)
    if not board.groups:
        raise _unknown_metric(rows, metric)
    return board


def _unknown_metric(rows: Sequence[Row], metric: str) -> UserError:
    return unknown_name("metric", metric, sorted({name for row in rows for name in row.metrics}), where="--metric")


def _board(rows: Sequence[Row], metric: str) -> Board:
    usable = [row for row in rows if math.isfinite(row.metrics.get(metric, math.nan))]
    members: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in usable:
        members[(_label(row), row.backbone, row.digest, row.variant)].append(row)
    configs = _distinctions([group[-1] for group in members.values()])
    groups = [_group(group, config, metric) for group, config in zip(members.values(), configs, strict=True)]
    sign = 1 if lower_is_better(metric) else -1
    # A lone run ranks by its value like any other; ties keep a fixed order so that two calls print the same.
    groups.sort(key=lambda group: (sign * group.metrics[metric].mean, group.label, group.config, group.digest))
    names = Counter(row.dataset for row in rows)
    first = rows[0]
    return Board(
        names.most_common(1)[0][0],
        first.fingerprint,
        first.split,
        first.holdout,
        metric,
        _judge(groups),
        len(rows) - len(usable),
        " ".join(f"{key[5:]}={_value(first.changes[key])}" for key in _DATA_DETAILS if _shared(rows, key)),
    )


def _shared(rows: Sequence[Row], key: str) -> bool:
    return all(key in row.changes and row.changes[key] == rows[0].changes[key] for row in rows)


def _label(row: Row) -> str:
    if row.epochs > 0:
        return row.objective
    return "pixels" if row.backbone == "pixels" else "untrained"


def _group(rows: Sequence[Row], config: str, metric: str) -> Group:
    """One row a (fold, seed): a repetition of the same seed is no new evidence, so the newest stands for all."""
    newest: dict[Pair, Row] = {}
    for row in sorted(rows, key=lambda item: item.created):
        newest[(row.fold, row.seed)] = row
    kept = [newest[pair] for pair in sorted(newest)]
    columns: dict[str, list[float]] = defaultdict(list)
    for row in kept:
        for name, value in row.metrics.items():
            if math.isfinite(value):
                columns[name].append(value)
    first = kept[0]
    return Group(
        label=_label(first),
        baseline=first.epochs == 0,
        backbone=first.backbone,
        variant=first.variant,
        digest=first.digest,
        config=config,
        folds=tuple(sorted({row.fold for row in kept})),
        seeds=tuple(sorted({row.seed for row in kept})),
        run_ids=tuple(row.run_id for row in kept),
        metrics={name: summarize(values) for name, values in sorted(columns.items())},
        values={pair: row.metrics[metric] for pair, row in sorted(newest.items())},
    )


def _judge(groups: Sequence[Group]) -> tuple[Group, ...]:
    """Compares every group with the first, correcting for the number of comparisons."""
    if not groups:
        return ()
    best, *others = groups
    found = [difference(group.values, best.values) for group in others]
    tested = [index for index, item in enumerate(found) if item.p is not None]
    corrected = dict(zip(tested, holm([found[index].p or 0.0 for index in tested]), strict=True))
    judged = [replace(best, verdict="best")]
    for index, (group, item) in enumerate(zip(others, found, strict=True)):
        p = corrected.get(index)
        verdict: Verdict = "untested" if p is None else "tied" if p >= SIGNIFICANCE else "worse"
        judged.append(replace(group, verdict=verdict, difference=item, p=p))
    return tuple(judged)


def _distinctions(rows: Sequence[Row]) -> list[str]:
    """For each group, the settings in which the groups of its kind differ, e.g. ``margin=0.3 scale=16``."""
    kinds: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        kinds[(_label(row), row.backbone)].append(row)
    varying = {}
    for kind, group in kinds.items():
        keys = sorted({key for row in group for key in row.changes})
        varying[kind] = [key for key in keys if len({repr(row.changes.get(key)) for row in group}) > 1]
    labels = []
    for row in rows:
        keys = varying[(_label(row), row.backbone)]
        shorts = Counter(key.rsplit(".", 1)[-1] for key in keys)
        parts = []
        for key in keys:
            short = key.rsplit(".", 1)[-1]
            name = short if shorts[short] == 1 else key
            parts.append(f"{name}={_value(row.changes[key])}" if key in row.changes else f"{name}=default")
        labels.append(" ".join(parts))
    return labels


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
