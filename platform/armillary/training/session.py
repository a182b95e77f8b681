"""Joining a Ray cluster, or starting a quiet one on this machine for as long as it is needed."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from armillary.spec.errors import UserError, WorkFailed
from armillary.training.desk import NAMESPACE

_ENVIRONMENT = {
    # The controller polls its workers; the default of 2 s costs a short run several seconds.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Tune's new console prints where its files are whatever its verbosity; ours says what matters.
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
}
# One machine warns of no preemption and has nobody to scrape metrics: a process and seconds saved at every start.
_LOCAL_ENVIRONMENT = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0", "RAY_TRAIN_METRICS_ENABLED": "0"}


@contextmanager
def ray_session(address: str | None = None, *, cpus: int | None = None) -> Iterator[Mapping[str, float]]:
    """Yields the cluster's resources; a cluster started here is stopped at the end.

    Args:
        address: of a running cluster; ``None`` takes ``$RAY_ADDRESS``, and without it starts one on this machine.
            Ray opens that one's ports on the machine's own address; its token keeps strangers out.
        cpus: what a cluster started here counts as its CPUs; ``None`` is what the machine has.

    Raises:
        UserError: no cluster answers at the address.
        WorkFailed: none starts on this machine.
    """
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    # Set here, they reach the processes of a cluster started below; a running one is sent them.
    for key, value in (_ENVIRONMENT | (_LOCAL_ENVIRONMENT if address == "local" else {})).items():
        os.environ.setdefault(key, value)
    import ray

    if ray.is_initialized():
        yield ray.cluster_resources()
        return
    options: dict[str, Any] = (
        {"runtime_env": {"env_vars": _ENVIRONMENT}}
        if address != "local"
        else {
            "include_dashboard": False,
            "num_cpus": cpus or os.cpu_count(),
            "object_store_memory": _store_bytes(),
        }
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            ray.init(
                address=address,
                namespace=NAMESPACE,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **options,
            )
    except Exception as error:
        said = str(error).partition("\n")[0]
        if address == "local":  # Ray raises a bare Exception where its processes do not come up in time.
            raise WorkFailed(
                f"Ray did not start on this machine, which may be too busy or short of memory: {said}\n"
                "  nothing was trained; give the same command again"
            ) from error
        if not isinstance(error, (ConnectionError, ValueError, RuntimeError)):
            raise
        raise UserError(
            f"no Ray cluster answers at {address!r}: {said}",
            key="cluster.address",
            hint="start one with `ray start --head`, or leave the address out to use this machine",
        ) from None
    try:
        yield ray.cluster_resources()
    finally:
        ray.shutdown()


def _store_bytes() -> int:
    """Room for the datasets that workers share; memory is taken only as it is filled."""
    import psutil

    share = int(0.3 * psutil.virtual_memory().total)
    # Ray refuses more on a Mac.
    return max(512 * 2**20, min(share, 2 * 2**30) if sys.platform == "darwin" else share)
