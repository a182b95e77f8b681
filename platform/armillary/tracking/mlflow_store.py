"""The only module that knows MLflow; it is imported inside functions, because that takes seconds.

Everything MLflow, its HTTP client or the database raises leaves this module as :class:`StoreError`, with passwords
taken out of the message.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from armillary.spec.errors import UserError, WorkFailed
from armillary.spec.home import home, tracking_uri
from armillary.tracking.records import MAX_KEY, MAX_TAG, PREFIX, ROW_TAGS, RUN_ID

# (name, value, milliseconds since 1970, step)
MetricPoint = tuple[str, float, int, int]

Ending = Literal["FINISHED", "FAILED", "KILLED"]

DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_MARK = PREFIX + "experiment"
_METRICS_A_CALL, _TAGS_A_CALL, _RUNS_A_PAGE = 1000, 100, 1000
_SECRET_QUERY = re.compile(r"([?&](?:password|passwd|pwd|token|secret)=)[^&\s'\"]+", re.IGNORECASE)
_SECRET_USER = re.compile(r"(://[^/@:\s]*):[^@\s]*@")


class StoreError(WorkFailed):
    """The store cannot be reached or refuses; what was to be written is still in the run folder."""


@dataclass(frozen=True)
class StoredRun:
    """What the leaderboard needs of a run."""

    tags: dict[str, str]
    metrics: dict[str, float]


def redact(text: str) -> str:
    """The text with the passwords and tokens of URIs in it replaced by ``***``.

    Example:
        >>> redact("postgresql://ann:secret@db/mlflow")
        'postgresql://ann:***@db/mlflow'
    """
    return _SECRET_QUERY.sub(r"\1***", _SECRET_USER.sub(r"\1:***@", text))


def check_uri(uri: str | None, *, where: str | None = None) -> str:
    """The URI, or the default one; costs nothing and imports nothing.

    Raises:
        UserError: not a database or a server. MLflow's file stores append blindly, so that a repeated send after a
            kill would log points twice.
    """
    uri = uri or tracking_uri()
    scheme = urlsplit(uri).scheme.split("+")[0]
    if scheme in DATABASES or (scheme in ("http", "https") and urlsplit(uri).netloc):
        return uri
    raise UserError(
        f"{redact(uri)!r} is no MLflow database or server",
        where=where,
        key="tracking.uri",
        allowed="sqlite:///<file>, postgresql://..., mysql://..., http://<host>:<port>, https://...",
    )


def is_server(uri: str) -> bool:
    """Whether the URI names a tracking server rather than a database."""
    return urlsplit(uri).scheme in ("http", "https")


def sqlite_path(uri: str) -> Path | None:
    """The file of an SQLite URI, ``None`` for any other."""
    return Path(uri.partition(":///")[2].partition("?")[0]) if uri.startswith("sqlite") and ":///" in uri else None


def exists(uri: str) -> bool:
    """False for an SQLite store whose file was never made; reading from it would only create an empty one."""
    path = sqlite_path(uri)
    return path is None or path.is_file()


def artifact_root() -> Path:
    """Where artifacts of stores without a server go."""
    return home() / "artifacts"


def open_store(uri: str | None = None) -> MlflowStore:
    """The store of a URI, opened once a process; the default is SQLite in the Armillary home.

    Raises:
        UserError: not a URI this can open.
        StoreError: the database or server does not answer.
    """
    return _open(check_uri(uri), str(home()))


@cache
def _open(uri: str, _home: str) -> MlflowStore:
    return MlflowStore(uri)


class MlflowStore:
    """Reads and writes runs; every write can be repeated without changing what is stored."""

    def __init__(self, uri: str) -> None:
        self._uri, self.uri = uri, redact(uri)
        self._experiments: dict[str, str] = {}
        self._client = self._connect()

    def _connect(self) -> Any:
        _settle()
        path = sqlite_path(self._uri)
        if path is None:
            return self._call(_client, self._uri)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Two processes that both find an empty file would both run the migrations.
        with path.with_name(path.name + ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return self._call(_client, self._uri)

    def _call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with _translated(self.uri):
            return function(*args, **kwargs)

    def experiment(self, name: str) -> str:
        """The id of an experiment, which is made on first use.

        Raises:
            StoreError: the store does not answer, or somebody deleted the experiment in it.
        """
        if name not in self._experiments:
            found = self._call(self._client.get_experiment_by_name, name)
            if found is None:
                found_id = self._create_experiment(name)
            elif found.lifecycle_stage != "active":
                raise StoreError(f"experiment {name!r} was deleted in {self.uri}; restore it or name another")
            else:
                found_id = found.experiment_id
                if _MARK not in found.tags:
                    self._call(self._client.set_experiment_tag, found_id, _MARK, "true")
            self._experiments[name] = found_id
        return self._experiments[name]

    def _create_experiment(self, name: str) -> str:
        location = None
        if not is_server(self._uri):
            location = (artifact_root() / re.sub(r"[^\w.-]", "_", name)).as_uri()
        try:
            created = self._call(self._client.create_experiment, name, artifact_location=location, tags={_MARK: "true"})
        except StoreError:
            # Another process may have been first.
            found = self._call(self._client.get_experiment_by_name, name)
            if found is None:
                raise
            created = found.experiment_id
        return str(created)

    def open_run(self, experiment: str, run_id: str, name: str, started: float, known: str | None) -> str | None:
        """Starts a run or takes an existing one up again.

        Args:
            experiment: its name.
            run_id: our id; a run tagged with it is never made twice.
            name: shown in MLflow.
            started: seconds since 1970.
            known: MLflow's id of the run, if this machine remembers it.

        Returns:
            MLflow's id, or ``None`` if somebody deleted the run in MLflow; it is then left deleted.
        """
        experiment_id = self.experiment(experiment)
        found = self._lookup(known) if known else None
        if found is None:
            query = f"tags.`{RUN_ID}` = '{run_id}'"
            # Deleted ones too: a run that was deleted on purpose must not come back under a new id.
            view = _view(deleted=True)
            matches = self._call(self._client.search_runs, [experiment_id], query, run_view_type=view, max_results=1)
            found = next(iter(matches), None)
        if found is None:
            made = self._call(
                self._client.create_run,
                experiment_id,
                start_time=int(started * 1000),
                run_name=name,
                tags={RUN_ID: run_id},
            )
            return str(made.info.run_id)
        if found.info.lifecycle_stage != "active":
            return None
        return str(found.info.run_id)

    def _lookup(self, mlflow_id: str) -> Any:
        from mlflow.exceptions import MlflowException

        with _translated(self.uri):
            try:
                return self._client.get_run(mlflow_id)
            except MlflowException as error:
                if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                    return None
                raise

    def log(
        self,
        mlflow_id: str,
        points: Sequence[MetricPoint] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Writes metric points, parameters and tags in as few calls as MLflow's limits allow.

        A point that is already stored with the same step, time and value is left as it is. MLflow never changes a
        parameter; one that has another value by now, as after a resume with more workers, becomes a tag
        ``armillary.now.<name>`` beside the old one.
        """
        from mlflow.entities import Metric, Param, RunTag

        metrics = [Metric(*point) for point in points]
        stored = self._call(self._client.get_run, mlflow_id).data.params if params else {}
        parameters = [Param(key, value) for key, value in (params or {}).items() if key not in stored]
        changed = {key: value for key, value in (params or {}).items() if stored.get(key, value) != value}
        labels = [RunTag(key, value) for key, value in (tags or {}).items()]
        labels += [RunTag(f"{PREFIX}now.{key}"[:MAX_KEY], value[:MAX_TAG]) for key, value in changed.items()]
        for part in _parts(metrics, _METRICS_A_CALL):
            self._call(self._client.log_batch, mlflow_id, metrics=part)
        for part in _parts(parameters, _TAGS_A_CALL):
            self._call(self._client.log_batch, mlflow_id, params=part)
        for part in _parts(labels, _TAGS_A_CALL):
            self._call(self._client.log_batch, mlflow_id, tags=part)

    def log_artifact(self, mlflow_id: str, path: Path, folder: str | None = None) -> None:
        """Copies a file into the run's artifacts, over an earlier copy."""
        self._call(self._client.log_artifact, mlflow_id, str(path), folder)

    def log_text(self, mlflow_id: str, text: str, name: str) -> None:
        """Stores a text as an artifact, over an earlier copy."""
        self._call(self._client.log_text, mlflow_id, text, name)

    def set_running(self, mlflow_id: str) -> None:
        """Marks a run as running, also one that had ended."""
        self._call(self._client.update_run, mlflow_id, status="RUNNING")

    def end(self, mlflow_id: str, status: Ending, finished: float | None) -> None:
        """Ends a run; ``finished`` in seconds since 1970, now by default."""
        self._call(self._client.set_terminated, mlflow_id, status, None if finished is None else int(finished * 1000))

    def history(self, mlflow_id: str, metric: str) -> list[tuple[int, int, float]]:
        """All points of a metric as (step, milliseconds, value), sorted."""
        found = self._call(self._client.get_metric_history, mlflow_id, metric)
        return sorted((point.step, point.timestamp, point.value) for point in found)

    def known_runs(self) -> set[str]:
        """Our ids of all runs in the store, deleted ones included."""
        return {run.tags[RUN_ID] for run in self.search(finished=False, deleted=True, only_ids=True)}

    def search(
        self,
        where: Mapping[str, str] | None = None,
        *,
        finished: bool = True,
        deleted: bool = False,
        only_ids: bool = False,
    ) -> list[StoredRun]:
        """Armillary's runs with the tags of a leaderboard row and the last metric values.

        Databases are read column by column, which is some thirty times faster than MLflow's search, servers by paged
        search.

        Args:
            where: values that tags must have, by full tag name.
            finished: only runs that ended well.
            deleted: also runs deleted in MLflow.
            only_ids: leave out metrics and all tags but our run id, where that saves time.
        """
        experiments = self._call(self._client.search_experiments, filter_string=f"tags.`{_MARK}` = 'true'")
        ids = [experiment.experiment_id for experiment in experiments]
        if not ids:
            return []
        if is_server(self._uri):
            return self._search_pages(ids, where or {}, finished, deleted)
        return self._search_columns(ids, where or {}, finished, deleted, only_ids)

    def _search_pages(
        self, experiments: list[str], where: Mapping[str, str], finished: bool, deleted: bool
    ) -> list[StoredRun]:
        clauses = ["attributes.status = 'FINISHED'"] if finished else []
        clauses += [f"tags.`{key}` = {_quoted(value)}" for key, value in where.items()]
        runs: list[StoredRun] = []
        token = None
        while True:
            page = self._call(
                self._client.search_runs,
                experiments,
                " and ".join(clauses),
                run_view_type=_view(deleted),
                max_results=_RUNS_A_PAGE,
                page_token=token,
            )
            for run in page:
                tags = {key: value for key, value in run.data.tags.items() if key in ROW_TAGS}
                if RUN_ID in tags:
                    runs.append(StoredRun(tags, dict(run.data.metrics)))
            token = page.token
            if not token:
                return runs

    def _search_columns(
        self, experiments: list[str], where: Mapping[str, str], finished: bool, deleted: bool, only_ids: bool
    ) -> list[StoredRun]:
        from mlflow.store.tracking.dbmodels import models
        from mlflow.tracking._tracking_service.utils import _get_store
        from sqlalchemy import select
        from sqlalchemy.orm import aliased

        # MLflow annotates its columns as plain values, with which no query would type-check.
        tables: Any = models
        SqlRun, SqlTag, latest = tables.SqlRun, tables.SqlTag, tables.SqlLatestMetric  # noqa: N806
        chosen = select(SqlRun.run_uuid).where(SqlRun.experiment_id.in_([int(item) for item in experiments]))
        if finished:
            chosen = chosen.where(SqlRun.status == "FINISHED")
        if not deleted:
            chosen = chosen.where(SqlRun.lifecycle_stage == "active")
        for key, value in where.items():
            tag = aliased(SqlTag)
            chosen = chosen.join(tag, tag.run_uuid == SqlRun.run_uuid).where(tag.key == key, tag.value == value)
        wanted = SqlTag.key.in_([RUN_ID] if only_ids else ROW_TAGS)
        tags: dict[str, dict[str, str]] = defaultdict(dict)
        metrics: dict[str, dict[str, float]] = defaultdict(dict)
        with _translated(self.uri), _get_store(self._uri).ManagedSessionMaker() as session:
            rows = session.execute(
                select(SqlTag.run_uuid, SqlTag.key, SqlTag.value).where(wanted, SqlTag.run_uuid.in_(chosen))
            )
            for run, key, value in rows:
                tags[run][key] = value
            if not only_ids:
                columns = select(latest.run_uuid, latest.key, latest.value, latest.is_nan)
                for run, key, value, is_nan in session.execute(columns.where(latest.run_uuid.in_(chosen))):
                    metrics[run][key] = float("nan") if is_nan else value
        return [StoredRun(found, metrics[run]) for run, found in tags.items() if RUN_ID in found]


def _client(uri: str) -> Any:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    # The client opens its store lazily: ask for something small, so that a wrong address shows here.
    client.search_experiments(max_results=1)
    return client


@cache
def _settle() -> None:
    """Imports MLflow quietly and keeps it from waiting minutes for a dead server or phoning home."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    import mlflow  # noqa: F401  (its import sets up the loggers below)

    for name in ("mlflow", "mlflow.store.db.utils", "alembic", "alembic.runtime.migration"):
        logging.getLogger(name).setLevel(logging.WARNING)


@contextmanager
def _translated(uri: str) -> Iterator[None]:
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        reason = redact(" ".join(str(error).split()))
        raise StoreError(f"{uri}: {reason[:400]}") from None


def _view(deleted: bool) -> int:
    from mlflow.entities import ViewType

    return int(ViewType.ALL if deleted else ViewType.ACTIVE_ONLY)


def _parts(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _quoted(value: str) -> str:
    """A string of MLflow's filter language, which has no escapes.

    Raises:
        UserError: the value holds both kinds of quotes.
    """
    for quote in "'\"":
        if quote not in value:
            return f"{quote}{value}{quote}"
    raise UserError(f"cannot search for {value!r}: it holds both kinds of quotes")
