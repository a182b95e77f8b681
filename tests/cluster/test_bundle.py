from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from armillary.cluster.bundle import write_bundle
from armillary.cluster.submission import prepare
from armillary.spec.errors import UserError
from armillary.spec.loading import load_job

PACKAGE = Path(sys.modules["armillary"].__file__ or "").parent


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    write_bundle(folder, "kind: train\n")
    return folder


def test_it_holds_the_source_the_resources_and_the_job_and_nothing_else(bundle: Path) -> None:
    assert sorted(path.name for path in bundle.iterdir()) == ["armillary", "job.yaml"]
    assert (bundle / "job.yaml").read_text() == "kind: train\n"
    shipped = {path.relative_to(bundle / "armillary") for path in bundle.rglob("*.py")}
    assert shipped == {path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")}
    assert {path.suffix for path in bundle.rglob("*") if path.is_file()} <= {".py", ".yaml", ".yml", ".typed", ".html"}
    assert (bundle / "armillary" / "resources" / "jobs" / "quickstart.yaml").is_file()
    assert sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file()) < 5 * 2**20


def test_armillary_runs_from_it_and_finds_its_jobs_there(bundle: Path) -> None:
    code = "import armillary; from armillary.spec.home import resource; print(resource('jobs', 'quickstart.yaml'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=bundle, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(bundle / "armillary" / "resources" / "jobs" / "quickstart.yaml")


def test_a_prepared_sweep_needs_no_other_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base.yaml").write_text(
        "objective: {name: arcface}\ncluster: {address: 'http://head:8265'}\ndata: {name: '${env:FACES}'}\n"
    )
    (tmp_path / "space.yaml").write_text("objective.margin: {low: 0.1, high: 0.6}\n")
    (tmp_path / "sweep.yaml").write_text("kind: sweep\nname: far\nbase: base.yaml\nspace: space.yaml\n")
    monkeypatch.setenv("FACES", "s3://secret-bucket/faces")
    prepared = prepare(tmp_path / "sweep.yaml", ["trials=3"])

    assert (prepared.name, prepared.kind, prepared.address) == ("far", "sweep", "http://head:8265")
    assert prepared.entrypoint == "python -m armillary run job.yaml"
    assert "secret-bucket" not in prepared.text
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "job.yaml").write_text(prepared.text)
    there, here = load_job(elsewhere / "job.yaml"), load_job(tmp_path / "sweep.yaml", ["trials=3"])
    # On the cluster, the job joins the cluster it finds itself in; nothing else changes.
    expected = here.model_dump()
    expected["base"]["cluster"]["address"] = "auto"
    assert there.model_dump() == expected


@pytest.mark.parametrize(
    ("override", "message"),
    [("objective.name=arkface", "arcface"), ("objective.margin=7", "margin"), ("train.worker=2", "workers")],
)
def test_a_mistake_is_found_here(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare("quickstart", [override])


def test_each_kind_is_run_as_a_user_would_and_the_rest_is_refused(tmp_path: Path) -> None:
    assert prepare("regressions/nightly").entrypoint == "python -m armillary regress run job.yaml"
    (tmp_path / "judge.yaml").write_text("kind: evaluate\nrun: abc\n")
    with pytest.raises(UserError, match="found 'evaluate'"):
        prepare(tmp_path / "judge.yaml")


def test_submit_reports_a_mistake_in_the_job_before_it_looks_for_the_cluster() -> None:
    arguments = ["submit", "quickstart", "objective.margn=0.3", "--address", "http://127.0.0.1:1"]
    done = subprocess.run([sys.executable, "-m", "armillary", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "margn" in done.stderr
    assert "no cluster" not in done.stderr
