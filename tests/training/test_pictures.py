"""Pictures that an objective draws of what it has learned: in the run's folder, and in MLflow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from armillary.tracking.mlflow_store import open_store
from armillary.tracking.run import track_finished
from armillary.tracking.spool import load_state
from armillary.training.launch import run_job
from armillary.training.rundir import RunDirectory

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]


def test_faces_before_and_after_super_resolution(tiny_job: Any, orl: Path, ray_cluster: Any) -> None:
    """A row of enlarged faces, one of them sharpened, one of originals."""
    objective = {"name": "super_identity", "upscale": 4.0, "width": 4, "layers": 2}
    record = run_job(tiny_job(objective=objective, train__epochs=1))
    assert record.status == "finished", record.error
    run = RunDirectory.find(record.run_id)
    picture = np.asarray(Image.open(run.path / "evaluation" / "super_resolution.png").convert("L"), dtype=float)
    rows = np.array_split(picture, 3)
    assert picture.shape[1] > picture.shape[0]
    # What was made of 6 x 7 pixels has lost the fine steps from pixel to pixel that the original has.
    enlarged, _, original = (np.abs(np.diff(row, axis=1)).mean() for row in rows)
    assert enlarged < 0.9 * original
    assert track_finished(run)
    state = load_state(run)
    assert state is not None
    assert state.mlflow_run_id is not None
    kept = open_store(None)._client.list_artifacts(state.mlflow_run_id, "evaluation")
    assert "evaluation/super_resolution.png" in [item.path for item in kept]
