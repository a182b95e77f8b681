"""From stored runs to boards: syncs what is pending, asks MLflow, ranks."""

from __future__ import annotations

from armillary.spec.errors import UserError
from armillary.tracking.leaderboard import Board, Row, build_board, build_boards
from armillary.tracking.mlflow_store import check_uri, exists, open_store
from armillary.tracking.records import PREFIX, row_of
from armillary.tracking.spool import SyncReport, sync


def rows(
    uri: str | None = None, *, dataset: str | None = None, group: str | None = None, trials: bool = False
) -> list[Row]:
    """The finished runs of a store.

    Args:
        uri: MLflow database or server; ``None`` for SQLite in the Armillary home.
        dataset: only runs on the dataset of this name.
        group: only runs of this sweep, study or regression, as ``kind/name``; trials of a named sweep are included.
        trials: also the trials of sweeps.

    Raises:
        UserError: the URI cannot be one.
        StoreError: the store does not answer.
    """
    uri = check_uri(uri, where="--uri")
    if not exists(uri):
        return []
    where = {}
    if dataset is not None:
        where[PREFIX + "dataset"] = dataset
    if group is not None:
        where[PREFIX + "group"] = group
    elif not trials:
        where[PREFIX + "trial"] = "false"
    found = (row_of(run.tags, run.metrics) for run in open_store(uri).search(where))
    return [row for row in found if row is not None]


def leaderboard(
    metric: str = "verification/auc",
    *,
    uri: str | None = None,
    dataset: str | None = None,
    group: str | None = None,
    trials: bool = False,
    limit: int | None = None,
) -> tuple[list[Board], SyncReport]:
    """Sends what is pending and ranks the finished runs; arguments as in :func:`rows` and :func:`build_boards`.

    Returns:
        The boards, and what the sync before them did.
    """
    report = sync()
    return build_boards(rows(uri, dataset=dataset, group=group, trials=trials), metric, limit=limit), report


def group_board(metric: str, group: str) -> Board:
    """Sends what is pending and ranks the runs of one study on one board; see :func:`build_board`.

    Args:
        metric: ranks the groups.
        group: ``study/name``.

    Raises:
        UserError: no run of it has finished, or none has the metric.
    """
    sync()
    found = rows(group=group)
    if not found:
        raise UserError(f"no run of {group} has finished")
    return build_board(found, metric)
