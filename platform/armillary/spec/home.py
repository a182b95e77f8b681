"""Where Armillary keeps its state: ``$ARMILLARY_HOME``, or ``.armillary`` in the working directory."""

from __future__ import annotations

import os
from pathlib import Path

# In the folder ``model`` of a run: the encoder's weights, how it is built, the rows of class heads.
WEIGHTS, DESCRIPTION, HEAD = "encoder.safetensors", "model.json", "head.safetensors"


def home() -> Path:
    """The absolute state folder; it is not created here."""
    return Path(os.environ.get("ARMILLARY_HOME") or ".armillary").expanduser().absolute()


def runs_dir() -> Path:
    """One folder per run."""
    return home() / "runs"


def datasets_dir() -> Path:
    """One folder per dataset."""
    return home() / "datasets"


def tracking_uri() -> str:
    """The default MLflow store."""
    return f"sqlite:///{home() / 'mlflow.db'}"


def resource(folder: str, name: str) -> Path | None:
    """A job or search space that ships with Armillary, in a checkout or in a wheel; ``None`` when there is none."""
    package = Path(__file__).resolve().parents[1]
    for root in (package / "resources", package.parents[1]):
        path = root / folder / name
        if os.path.isfile(path):  # noqa: PTH113 - answers False where pathlib raises: a name that is too long
            return path
    return None


def resources(folder: str) -> list[str]:
    """The names, relative to ``folder``, of all job or search-space files that ship with Armillary."""
    package = Path(__file__).resolve().parents[1]
    roots = (package / "resources" / folder, package.parents[1] / folder)
    return sorted({str(path.relative_to(root)) for root in roots for path in root.rglob("*.yaml")})
