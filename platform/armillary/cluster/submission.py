"""Jobs on a cluster over the Ray Jobs API: submit, list, status, logs, follow, stop.

The cluster runs what a user would run there, ``python -m armillary run job.yaml``, in a folder that holds this
machine's Armillary and the resolved job. ``python`` is the one on the path of the environment Ray was started in.
"""

from __future__ import annotations

import asyncio
import secrets
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from armillary.cluster.bundle import JOB_FILE, write_bundle
from armillary.cluster.connection import connect, explained
from armillary.objectives import registry
from armillary.spec import document, environment
from armillary.spec.errors import UserError, unknown_name
from armillary.spec.jobs import Job, RegressionJob, StudyJob, SweepJob, TrainJob
from armillary.spec.loading import load_job
from armillary.spec.section import as_tree
from armillary.training.records import COMMIT_VARIABLE, git_commit

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

CLUSTER_HOME = "~/.armillary"
# What each kind of job is run with; the same words a user would type.
COMMANDS = {"train": "run", "sweep": "run", "study": "run", "chain": "run", "regression": "regress run"}
POLL_SECONDS = 0.5
STOP_SECONDS = 60.0
# Not much longer than Ctrl-C takes: a driver that ignores it is killed then.
STOP_GRACE_SECONDS = 20
RECONNECTS = 5

# Ray's own words, so that its dashboard and this command line agree.
State = Literal["PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED"]
TERMINAL: frozenset[str] = frozenset({"STOPPED", "SUCCEEDED", "FAILED"})


@dataclass(frozen=True)
class PreparedJob:
    """A checked job that needs no other file: ``text`` is its YAML, ``entrypoint`` the command that runs it there.

    ``address`` is the cluster the job itself names, if it does.
    """

    name: str
    kind: str
    text: str
    entrypoint: str
    address: str | None = None


def prepare(path: str | Path, overrides: Sequence[str] = ()) -> PreparedJob:
    """Reads and checks a job here, before anything is sent.

    Jobs and search spaces that the file names are read in; values from ``${env:..}`` are sent as references, so the
    cluster must set these variables too; the job joins the cluster it runs on, whatever address it names. What only
    the cluster knows (its datasets, its size) is checked there.

    Args:
        path: a job file, or the name of one that ships with Armillary.
        overrides: ``dotted.key=value``.

    Raises:
        UserError: the first mistake, with its place.
    """
    job = load_job(path, overrides)
    if job.kind not in COMMANDS:
        raise UserError(f"found {job.kind!r}", where=str(path), key="kind", allowed=", ".join(COMMANDS))
    trained = _train_jobs(job)
    for train in trained:
        registry.hyperparameters(train.objective.name, train.objective.options, where=str(path))
    tree = environment.references(as_tree(job))
    _join_surrounding_cluster(tree)
    command = f"python -m armillary {COMMANDS[job.kind]} {JOB_FILE}"
    address = next((train.cluster.address for train in trained if train.cluster.address), None)
    return PreparedJob(job.name, job.kind, document.dump(tree), command, address)


def _train_jobs(job: Job) -> list[TrainJob]:
    if isinstance(job, TrainJob):
        return [job]
    if isinstance(job, SweepJob | StudyJob):
        return [job.base]
    if isinstance(job, RegressionJob):
        return [entry.job for entry in job.jobs]
    return []


def _join_surrounding_cluster(tree: Any) -> None:
    """Inside the cluster, ``auto`` is the cluster itself: Ray sets RAY_ADDRESS for every job it runs."""
    if isinstance(tree, dict):
        if "objective" in tree and "cluster" in tree:
            tree["cluster"]["address"] = "auto"
        for value in tree.values():
            _join_surrounding_cluster(value)
    elif isinstance(tree, list):
        for value in tree:
            _join_surrounding_cluster(value)


@dataclass(frozen=True)
class ClusterJob:
    """What the cluster knows of one submitted job; times are ISO 8601 in UTC."""

    id: str
    state: State
    name: str
    kind: str
    message: str
    started: str | None
    ended: str | None
    seconds: float
    exit_code: int | None

    @property
    def finished(self) -> bool:
        """Whether the state will not change any more."""
        return self.state in TERMINAL

    @property
    def result(self) -> int:
        """The exit code a follower ends with: the job's own, 1 where it has none or was stopped."""
        if self.state == "SUCCEEDED":
            return 0
        return self.exit_code if self.exit_code is not None and self.exit_code > 0 else 1

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for ``--json``."""
        return asdict(self)


class Cluster:
    """One cluster's submitted jobs.

    Args:
        client: a connected client of Ray's Jobs API.
        address: the address it was reached by, for messages.
    """

    def __init__(self, client: JobSubmissionClient, address: str) -> None:
        self._client = client
        self.address = address

    @classmethod
    def at(cls, address: str) -> Self:
        """Connects.

        Raises:
            UserError: the cluster cannot be reached or refuses the token.
        """
        return cls(connect(address), address)

    def submit(self, job: PreparedJob, *, home: str = CLUSTER_HOME) -> str:
        """Ships a job and starts it.

        Args:
            job: what :func:`prepare` made.
            home: Armillary's state folder on the cluster; ``~`` is expanded there. Nodes that work on one job must
                share it.

        Returns:
            The id under which the cluster knows the job.

        Raises:
            UserError: the connection failed.
        """
        submission_id = f"{job.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        with tempfile.TemporaryDirectory(prefix="armillary-") as folder, explained(self.address):
            write_bundle(Path(folder), job.text)
            return self._client.submit_job(
                entrypoint=job.entrypoint,
                submission_id=submission_id,
                runtime_env={
                    "working_dir": folder,
                    "env_vars": {
                        "ARMILLARY_HOME": home,
                        COMMIT_VARIABLE: git_commit() or "",
                        # Stop as Ctrl-C does, and leave it the time to write its last state.
                        "RAY_JOB_STOP_SIGNAL": "SIGINT",
                        "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_GRACE_SECONDS),
                    },
                },
                metadata={"name": job.name, "kind": job.kind},
            )

    def jobs(self) -> list[ClusterJob]:
        """Every submitted job the cluster remembers, newest first; drivers started by hand are left out."""
        with explained(self.address):
            details = self._client.list_jobs()
        jobs = [_cluster_job(detail) for detail in details if detail.submission_id]
        return sorted(jobs, key=lambda job: job.started or "", reverse=True)

    def find(self, job_id: str) -> ClusterJob:
        """The job of that id, or of an unambiguous beginning of one.

        Raises:
            UserError: no job, or several, begin with ``job_id``.
        """
        jobs = {job.id: job for job in self.jobs()}
        matches = [job_id] if job_id in jobs else [known for known in jobs if known.startswith(job_id)]
        if len(matches) == 1:
            return jobs[matches[0]]
        if matches:
            raise UserError(f"job {job_id!r} is ambiguous", allowed=", ".join(matches[:8]))
        if not jobs:
            raise UserError(f"there is no job {job_id!r}: none was submitted to {self.address}")
        raise unknown_name("job", job_id, list(jobs)[:20])

    def logs(self, job_id: str) -> str:
        """What the job has printed so far."""
        found = self.find(job_id)
        with explained(self.address):
            return str(self._client.get_job_logs(found.id))

    def follow(self, job_id: str, write: Callable[[str], object]) -> ClusterJob:
        """Hands on what the job prints, from its beginning, until it ends.

        Args:
            job_id: an id, or an unambiguous beginning of one.
            write: takes each piece of text.

        Returns:
            The finished job; its ``result`` is the exit code to end with.

        Raises:
            UserError: there is no such job, or the connection was lost and did not come back.
        """
        found = self.find(job_id)
        with explained(self.address):
            asyncio.run(self._tail(found.id, write))
            return self._state(found.id)

    def stop(self, job_id: str) -> ClusterJob:
        """Asks the job to stop, as Ctrl-C would, and waits up to a minute until it has.

        Returns:
            The job as it then is; one that had already ended is returned unchanged.
        """
        job = self.find(job_id)
        if job.finished:
            return job
        deadline = time.monotonic() + STOP_SECONDS
        with explained(self.address):
            self._client.stop_job(job.id)
            while not job.finished and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
                job = self._state(job.id)
        return job

    def _state(self, job_id: str) -> ClusterJob:
        return _cluster_job(self._client.get_job_info(job_id))

    async def _tail(self, job_id: str, write: Callable[[str], object]) -> None:
        import aiohttp

        written, failures = 0, 0
        while True:
            skip, before = written, written
            try:
                async for text in self._client.tail_job_logs(job_id):
                    # A new connection begins at the first character again.
                    fresh = text[skip:]
                    skip = max(0, skip - len(text))
                    if fresh:
                        write(fresh)
                        written += len(fresh)
            except (RuntimeError, OSError, aiohttp.ClientError) as error:
                failures = 0 if written > before else failures + 1
                if failures > RECONNECTS:
                    raise ConnectionError(f"the log of {job_id} broke off {failures} times") from error
            if self._state(job_id).finished:
                # The stream may close before the last lines: they are in the log by now.
                if rest := self._client.get_job_logs(job_id)[written:]:
                    write(rest)
                return
            await asyncio.sleep(POLL_SECONDS)


def _cluster_job(details: JobDetails) -> ClusterJob:
    metadata: Mapping[str, str] = details.metadata or {}
    end = details.end_time or int(time.time() * 1000)
    started = details.start_time
    return ClusterJob(
        id=str(details.submission_id),
        state=details.status.value,
        name=metadata.get("name", ""),
        kind=metadata.get("kind", ""),
        # Ray appends the last of the log to it.
        message=(details.message or "")
        .split("\n", 1)[0]
        .removesuffix(", last available logs (truncated to 20,000 chars):"),
        started=_iso(started),
        ended=_iso(details.end_time),
        seconds=round((end - started) / 1000, 1) if started else 0.0,
        exit_code=details.driver_exit_code,
    )


def _iso(milliseconds: int | None) -> str | None:
    if not milliseconds:
        return None
    return datetime.fromtimestamp(milliseconds / 1000, tz=UTC).isoformat(timespec="seconds")
