"""The folder that a submitted job works in: Armillary's own source, its jobs and search spaces, and the job itself.

What is shipped is the package that runs here, so that the cluster trains with the code that checked the job. The
packages it depends on are not shipped: the cluster's environment holds them.
"""

from __future__ import annotations

import shutil
from pathlib import Path

JOB_FILE = "job.yaml"
RESOURCES = ("jobs", "search_spaces")
_NOT_CODE = shutil.ignore_patterns("__pycache__", "*.pyc", ".*", "resources")


def write_bundle(folder: Path, job_yaml: str) -> Path:
    """Fills an empty folder with ``armillary/`` (as a wheel lays it out) and ``job.yaml``.

    Args:
        folder: an existing empty folder.
        job_yaml: the job, complete in itself.

    Returns:
        The path of the job's file inside the folder.
    """
    package = Path(__file__).resolve().parents[1]
    shutil.copytree(package, folder / "armillary", ignore=_NOT_CODE)
    for name in RESOURCES:
        source = _resource_folder(package, name)
        if source is not None:
            shutil.copytree(source, folder / "armillary" / "resources" / name, ignore=_only_yaml)
    job_file = folder / JOB_FILE
    job_file.write_text(job_yaml)
    return job_file


def _resource_folder(package: Path, name: str) -> Path | None:
    # A wheel keeps them inside the package, a checkout beside platform/.
    for candidate in (package / "resources" / name, package.parents[1] / name):
        if candidate.is_dir():
            return candidate
    return None


def _only_yaml(folder: str, names: list[str]) -> set[str]:
    return {name for name in names if not (Path(folder, name).is_dir() or name.endswith((".yaml", ".yml")))}
