"""Runs that read text: from any column of strings, with a tokenizer that is kept with the run and used again."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from armillary.cli.main import app
from armillary.data.importers import import_dataset
from armillary.spec.errors import UserError
from armillary.spec.jobs import TrainJob
from armillary.spec.loading import apply_overrides
from armillary.training.launch import run_job
from armillary.training.model import load_tokenizer
from armillary.training.preflight import plan
from armillary.training.rundir import RunDirectory

WORDS = ("amber", "basalt", "cobalt", "dolomite", "emerald", "fluorite")


def notes_job(**changes: Any) -> TrainJob:
    values = {
        "data": {"name": "notes", "text": "remark", "split": "identity"},
        "backbone": {"name": "text_transformer", "embedding_dim": 8, "width": 8, "depth": 1},
        "objective": {"name": "simcse"},
        "train": {"epochs": 1, "batch_size": 8, "threads": 1, "checkpoint_every": 1},
        "evaluate": {"protocols": ["verification"]},
    }
    job = TrainJob.model_validate(values)
    return apply_overrides(job, {key.replace("__", "."): value for key, value in changes.items()})


@pytest.fixture
def notes(tmp_path: Path, armillary_home: Path) -> None:
    """Twelve classes of four rows, each with a caption, and with a remark of other words."""
    picture = io.BytesIO()
    Image.new("L", (8, 8)).save(picture, "PNG")
    rows = range(48)
    columns = {
        "image": [{"bytes": picture.getvalue(), "path": f"{row}.png"} for row in rows],
        "label": [f"class {row // 4}" for row in rows],
        "caption": ["a picture of somebody"] * len(rows),
        "remark": [f"{WORDS[row // 4 % 6]} with {WORDS[(row + row // 4) % 6]}" for row in rows],
    }
    pq.write_table(pa.table(columns), tmp_path / "notes.parquet")
    import_dataset("parquet", "notes", tmp_path / "notes.parquet", options={"columns": ("caption", "remark")})


def vocabulary(tokenizer: str) -> dict[str, int]:
    found: dict[str, int] = json.loads(tokenizer)["model"]["vocab"]
    return found


def test_another_column_than_captions(notes: None) -> None:
    remarks, captions = (plan(notes_job(data__text=column)).data for column in ("remark", "caption"))
    assert set(WORDS) <= set(vocabulary(remarks.tokenizer))
    assert "somebody" in vocabulary(captions.tokenizer)
    assert "somebody" not in vocabulary(remarks.tokenizer)
    assert remarks.fingerprint != captions.fingerprint
    with pytest.raises(UserError, match="remark"):
        plan(notes_job(data__text="remarks"))


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_a_run_keeps_its_tokenizer(notes: None, ray_cluster: Any) -> None:
    """Stored as it was trained; judged again with it, and resumed with it, whatever one would train today."""
    record = run_job(notes_job())
    assert record.status == "finished", record.error
    run, fresh = RunDirectory.find(record.run_id), plan(notes_job()).data.tokenizer
    assert load_tokenizer(run) == fresh

    def judged() -> float:
        result = CliRunner().invoke(app, ["evaluate", record.run_id, "--json"])
        assert result.exit_code == 0, result.output
        return float(json.loads(result.stdout)["metrics"]["verification/auc"])

    assert judged() == pytest.approx(record.metrics["verification/auc"], abs=1e-6)

    # One that gives the words each other's numbers: who trained a new one would not notice.
    stored, other = run.path / "model" / "tokenizer.json", json.loads(fresh)
    words = sorted(vocabulary(fresh).items(), key=lambda item: item[1])[2:]
    other["model"]["vocab"].update({word: len(words) + 3 - number for word, number in words})
    stored.write_text(json.dumps(other))
    assert judged() != pytest.approx(record.metrics["verification/auc"], abs=1e-6)
    run.update(status="stopped")
    resumed = run_job(notes_job(train__epochs=2), resume=run)
    assert resumed.status == "finished", resumed.error
    assert json.loads(load_tokenizer(run)) == other
