"""Regression jobs on cron lines: APScheduler with its jobs in SQLite, one foreground process, one run at a time.

Under ``schedule/`` of the Armillary home::

    jobs.db          APScheduler's store: survives restarts, shared by ``up`` and ``add``
    history.jsonl    one line a firing, also for those that were skipped or missed
    logs/            what each firing printed
    up.lock          held by the running scheduler

A firing starts ``armillary regress run FILE`` and then ``armillary regress check``, each in a process of its own: a
crash or a leak in training cannot take the scheduler down.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TextIO

from pydantic import BaseModel, ConfigDict

from armillary.regression import cron
from armillary.regression.gate import SEVERITY, Verdict
from armillary.spec.errors import UserError, unknown_name
from armillary.spec.home import home
from armillary.spec.jobs import RegressionJob

logger = logging.getLogger(__name__)

# A firing that the machine slept through is still made up for within this time, once.
MISFIRE_GRACE_SECONDS = 3600
# How often a running scheduler looks for jobs that another process added.
_LOOK_SECONDS = 5.0
# What a training gets to save its state after Ctrl-C before it is ended.
_STOP_SECONDS = 30.0

# One regression at a time: the firing that comes second waits here. Waiting firings look at _stopping between turns.
_turn = threading.Lock()
_stopping = threading.Event()
_writing = threading.Lock()


Event = Literal["fired", "stopped", "skipped", "missed", "failed"]


class Firing(BaseModel):
    """One line of ``history.jsonl``.

    ``event``: ``fired``; ``stopped`` together with the scheduler; ``skipped`` because the previous firing was still
    going; ``missed`` by more than the grace; ``failed`` in the scheduler itself. ``run_exit`` and ``check_exit`` are
    the exit codes of the two commands (``None``: not started, negative: ended by that signal). ``verdict`` is the most
    alarming one of the check, ``missing`` when there is no fresh result.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    event: Event
    time: float
    verdict: Verdict
    reason: str = ""
    run_exit: int | None = None
    check_exit: int | None = None
    seconds: float = 0.0
    log: str | None = None


class Scheduled(BaseModel):
    """A row of the schedule."""

    name: str
    file: str
    cron: str
    next_run: datetime | None
    last: Firing | None = None


def schedule_dir() -> Path:
    """The scheduler's folder."""
    return home() / "schedule"


def check_line(file: Path, job: RegressionJob) -> str:
    """The cron line of a regression job.

    Raises:
        UserError: it has no ``schedule``, or a wrong one.
    """
    if job.schedule is None:
        raise UserError(
            "this regression has no schedule", where=str(file), key="schedule", hint='add schedule: "0 3 * * *"'
        )
    cron.parse(job.schedule, where=str(file))
    return job.schedule


def add(file: Path, job: RegressionJob) -> Scheduled:
    """Puts a regression job on its cron line, or moves it to a changed one; a running scheduler notices within seconds.

    Args:
        file: the job file, read again at every firing.
        job: what it holds.

    Raises:
        UserError: the job has no ``schedule``, the line is wrong, or the name belongs to another file.
    """
    path = str(file.expanduser().absolute())
    line = check_line(file, job)
    with _paused_scheduler() as scheduler:
        known = scheduler.get_job(job.name)
        if known is not None and known.args[1] != path:
            raise UserError(
                f"regression {job.name!r} is already scheduled from {known.args[1]}",
                where=path,
                key="name",
                hint=f"remove it first: armillary schedule remove {job.name}",
            )
        if known is None or known.args[2] != line:
            _store(scheduler, cron.trigger(line), job.name, path, line)
        return _row(scheduler.get_job(job.name), None)


def remove(name: str) -> None:
    """Takes a regression off the schedule; its results and history stay.

    Raises:
        UserError: nothing of that name is scheduled.
    """
    with _paused_scheduler() as scheduler:
        names = [job.id for job in scheduler.get_jobs()]
        if name not in names:
            if not names:
                raise UserError(f"{name!r} is not scheduled: nothing is")
            raise unknown_name("scheduled regression", name, names)
        scheduler.remove_job(name)


def rows() -> list[Scheduled]:
    """Everything scheduled, soonest first, each with its last firing."""
    last = {firing.name: firing for firing in history()}
    with _paused_scheduler() as scheduler:
        return [_row(job, last.get(job.id)) for job in scheduler.get_jobs()]


def history(name: str | None = None) -> list[Firing]:
    """All recorded firings, oldest first; of one regression when ``name`` is given."""
    path = schedule_dir() / "history.jsonl"
    if not path.is_file():
        return []
    # A kill can tear the last line.
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
    firings = [Firing.model_validate_json(line) for line in lines]
    return [firing for firing in firings if name in (None, firing.name)]


def up(announce: Callable[[], None] | None = None) -> None:
    """Runs the scheduler in the foreground until Ctrl-C or SIGTERM, which it forwards to a running regression.

    Args:
        announce: called once the scheduler is about to wait for the first firing.

    Raises:
        UserError: a scheduler with this home is already up.
    """
    from apscheduler import events
    from apscheduler.schedulers.blocking import BlockingScheduler

    with _only_one(), _signals_as_interrupt():
        scheduler = _configured(BlockingScheduler)
        left_out = events.EVENT_JOB_MISSED | events.EVENT_JOB_MAX_INSTANCES | events.EVENT_JOB_ERROR
        scheduler.add_listener(_on_left_out, left_out)
        if announce:
            scheduler.add_listener(lambda _: announce(), events.EVENT_SCHEDULER_STARTED)
        looker = threading.Thread(target=_look_for_new_jobs, args=(scheduler,), daemon=True)
        looker.start()
        try:
            scheduler.start()
        except KeyboardInterrupt:
            logger.info("stopping")
        finally:
            _stopping.set()
            looker.join()
            if scheduler.running:
                scheduler.shutdown(wait=True)
            _stopping.clear()


def fire(name: str, file: str, line: str = "") -> Firing:  # noqa: ARG001
    """Runs one regression now, waits for its turn first, and records the outcome.

    The job store pickles a reference to this function and its arguments, so its name and signature are stored data.

    Args:
        name: the regression.
        file: its job file.
        line: the cron line it was stored with, which :func:`add` compares with the file's.
    """
    waited_from = time.time()
    while not _turn.acquire(timeout=0.2):
        if _stopping.is_set():
            return _record(
                Firing(name=name, event="stopped", time=waited_from, verdict="missing", reason="not started")
            )
    try:
        return _record(_fire(name, file))
    finally:
        _turn.release()


def _fire(name: str, file: str) -> Firing:
    started = time.time()
    log = schedule_dir() / "logs" / f"{name}-{datetime.now().astimezone():%Y%m%dT%H%M%S}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    run_exit: int | None = None
    check_exit: int | None = None
    verdict: Verdict = "missing"
    with log.open("a") as output:
        run_exit = _command(["run", file], output, output)
        if _stopping.is_set():
            reason = "stopped together with the scheduler"
        elif run_exit == 2:
            reason = "the job file was refused; see the log"
        else:
            answer = log.with_suffix(".json")
            with answer.open("w") as report:
                check_exit = _command(["check", name, "--json"], report, output)
            verdict, reason = _read_check(answer, started)
    return Firing(
        name=name,
        event="stopped" if _stopping.is_set() else "fired",
        time=started,
        verdict=verdict,
        reason=reason,
        run_exit=run_exit,
        check_exit=check_exit,
        seconds=time.time() - started,
        log=str(log),
    )


def _read_check(answer: Path, started: float) -> tuple[Verdict, str]:
    """The check's verdict, unless it spoke of a result that is older than this firing."""
    try:
        report = json.loads(answer.read_text())
        verdict, when = report["verdict"], report["started"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return "missing", "the check gave no answer; see the log"
    if when < started:
        return "missing", "the run left no result; see the log"
    if verdict not in SEVERITY:
        return "missing", f"the check answered {verdict!r}"
    reasons = [item["reason"] for item in report["decisions"] if item["verdict"] == verdict]
    return verdict, reasons[0] if reasons else ""


def _command(arguments: Sequence[str], output: TextIO, errors: TextIO) -> int:
    """``armillary regress ...`` in a session of its own, so that Ctrl-C reaches it through us alone; its exit code."""
    command = [sys.executable, "-m", "armillary", "regress", *arguments]
    environment = {**os.environ, "ARMILLARY_HOME": str(home())}
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, env=environment, start_new_session=True
    )
    while not _stopping.is_set():
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(timeout=0.2)
    child.send_signal(signal.SIGINT)
    for end in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(timeout=_STOP_SECONDS)
        os.killpg(child.pid, end)
    return child.wait()


def _record(firing: Firing) -> Firing:
    path = schedule_dir() / "history.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with _writing, path.open("a+b") as file:
        torn = file.tell() > 0 and not path.read_bytes().endswith(b"\n")
        file.write((b"\n" if torn else b"") + firing.model_dump_json().encode() + b"\n")
    return firing


def _on_left_out(event: Any) -> None:
    """A night without a run is an entry too, never a gap."""
    from apscheduler.events import EVENT_JOB_ERROR, EVENT_JOB_MISSED

    what: Event
    if event.code == EVENT_JOB_ERROR:
        what, reason = "failed", f"{type(event.exception).__name__}: {event.exception}"
    elif event.code == EVENT_JOB_MISSED:
        what, reason = "missed", f"the scheduler came more than {MISFIRE_GRACE_SECONDS // 60} minutes late"
    else:
        what, reason = "skipped", "its previous run was still going"
    _record(Firing(name=event.job_id, event=what, time=time.time(), verdict="missing", reason=reason))


def _configured(kind: Callable[..., Any]) -> Any:
    from apscheduler.executors.pool import ThreadPoolExecutor
    from apscheduler.jobstores.sqlalchemy import SQLAlchemyJobStore

    schedule_dir().mkdir(parents=True, exist_ok=True)
    return kind(
        jobstores={"default": SQLAlchemyJobStore(url=f"sqlite:///{schedule_dir() / 'jobs.db'}")},
        # A thread for every firing that waits for its turn; in a queue it would grow late and be taken for missed.
        executors={"default": ThreadPoolExecutor(64)},
        job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": MISFIRE_GRACE_SECONDS},
    )


@contextlib.contextmanager
def _paused_scheduler() -> Iterator[Any]:
    """The job store through a scheduler that cannot fire: a paused BackgroundScheduler would, once, on its way out."""
    from apscheduler.schedulers.base import BaseScheduler

    class Still(BaseScheduler):
        def wakeup(self) -> None:
            """There is no thread to wake."""

        def shutdown(self, wait: bool = True) -> None:
            super().shutdown(wait)

    scheduler = _configured(Still)
    scheduler.start(paused=True)
    try:
        yield scheduler
    finally:
        scheduler.shutdown()


def _store(scheduler: Any, trigger: Any, name: str, path: str, line: str) -> None:
    scheduler.add_job(fire, trigger, id=name, name=name, args=[name, path, line], replace_existing=True)


def _row(job: Any, last: Firing | None) -> Scheduled:
    name, file, line = job.args
    return Scheduled(name=name, file=file, cron=line, next_run=job.next_run_time, last=last)


def _look_for_new_jobs(scheduler: Any) -> None:
    while not _stopping.wait(_LOOK_SECONDS):
        if scheduler.running:
            scheduler.wakeup()


@contextlib.contextmanager
def _only_one() -> Iterator[None]:
    schedule_dir().mkdir(parents=True, exist_ok=True)
    with (schedule_dir() / "up.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"a scheduler is already up for {home()}", hint="armillary schedule list") from None
        yield


@contextlib.contextmanager
def _signals_as_interrupt() -> Iterator[None]:
    """SIGTERM ends the scheduler as Ctrl-C does; both become one exception, raised in the main thread."""

    def interrupt(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
