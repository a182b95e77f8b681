"""What makes a run reproducible, gathered when it is created."""

from __future__ import annotations

import functools
import os
import secrets
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import armillary
from armillary.spec.jobs import TrainJob
from armillary.spec.loading import digest, dump_job
from armillary.training.rundir import RunDirectory, RunRecord

COMMIT_VARIABLE = "ARMILLARY_GIT_COMMIT"
PACKAGES = ("torch", "torchvision", "deepspeed", "ray", "timm", "numpy", "pyarrow", "scikit-learn")


@functools.cache
def versions() -> dict[str, str]:
    """Versions of what computes the numbers."""
    found = {"armillary": armillary.__version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


@functools.cache
def git_commit() -> str | None:
    """The commit of the working directory, with ``+changes`` when it is not clean; ``None`` outside a checkout.

    A submitted job runs where there is no checkout; who submitted it says the commit in ``$ARMILLARY_GIT_COMMIT``.
    """
    if COMMIT_VARIABLE in os.environ:
        return os.environ[COMMIT_VARIABLE] or None
    try:
        head = _git("rev-parse", "HEAD")
        return head + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, timeout=10, cwd=Path.cwd())
    return done.stdout.strip()


def new_run_id(job: TrainJob) -> str:
    """Sorts by time, names the job, and is unique."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{job.name}-{secrets.token_hex(3)}"


def create_run(
    job: TrainJob, fingerprint: str, *, group: str | None = None, variant: str | None = None
) -> RunDirectory:
    """Makes the folder of a run that is about to start; ``fingerprint`` is that of its prepared data."""
    record = RunRecord(
        run_id=new_run_id(job),
        name=job.name,
        group=group,
        variant=variant,
        fingerprint=fingerprint,
        digest=digest(job),
        git_commit=git_commit(),
        versions=versions(),
    )
    return RunDirectory.create(record, dump_job(job))
