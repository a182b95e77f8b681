"""Submission against a real cluster on this machine, with Ray's token authentication on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.cluster.conftest import LoopbackCluster

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("loopback_cluster"), pytest.mark.timeout(420)]

# Submits a command of the test's own where a job's would stand; the rest is what every submission goes through.
SUBMIT = """
job_id = cluster.submit(PreparedJob("tiny", "train", "kind: train\\n", {command!r}), home={home!r})
"""


def script(command: str, then: str, home: str = "~/.armillary") -> str:
    return SUBMIT.format(command=command, home=home) + then


def test_followed_job_runs_the_shipped_source_and_returns_its_exit_code(loopback_cluster: LoopbackCluster) -> None:
    command = (
        "python -c \"import armillary, os; print(armillary.__file__, os.environ['ARMILLARY_HOME'])\"; "
        f"cat job.yaml; grep -rq {loopback_cluster.token[:32]} . && echo leaked || echo clean; "
        "sleep 1; echo last line; exit 7"
    )
    then = """
pieces = []
job = cluster.follow(job_id, pieces.append)
print(job, cluster.jobs())
print(job.state, job.result)
print("".join(pieces))
"""
    done = loopback_cluster.python(script(command, then, home="/some/home"))
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line]
    assert lines[1] == "FAILED 7"
    source = next(line for line in lines if line.endswith("/some/home"))
    assert source.startswith(str(loopback_cluster.folder)), "the job ran an installed Armillary, not the shipped one"
    assert "kind: train" in lines
    assert (lines[-1], lines.count("last line")) == ("last line", 1)
    # The token is in no output and in no file that was shipped.
    assert "clean" in lines
    assert loopback_cluster.token not in done.stdout + done.stderr


def test_stop_interrupts_the_job_and_waits_for_its_end(loopback_cluster: LoopbackCluster) -> None:
    program = "import time\ntry: print('up', flush=True); time.sleep(120)\nexcept KeyboardInterrupt: print('tidy')"
    then = """
import time
while "up\\n" not in cluster.logs(job_id): time.sleep(0.3)
job = cluster.stop(job_id[:-1])
print(job.state, job.result, job.seconds < 60, "tidy" in cluster.logs(job_id), cluster.stop(job_id).state)
"""
    done = loopback_cluster.python(script(f'exec python -c "{program}"', then))
    assert done.stdout.strip() == "STOPPED 1 True True STOPPED", done.stdout + done.stderr


def test_jobs_commands_list_show_and_print(loopback_cluster: LoopbackCluster) -> None:
    done = loopback_cluster.python(script("echo hello there", "cluster.follow(job_id, str); print(job_id)"))
    job_id = done.stdout.strip()
    listed = loopback_cluster.armillary("jobs", "list", "--json", "--address", loopback_cluster.url)
    assert job_id in [job["id"] for job in json.loads(listed.stdout)]
    # The address may also come from the environment, as a dashboard's URL or as the cluster's own.
    for address in (loopback_cluster.url, loopback_cluster.gcs):
        shown = loopback_cluster.armillary("jobs", "status", job_id, "--json", RAY_ADDRESS=address)
        assert json.loads(shown.stdout)["state"] == "SUCCEEDED", shown.stderr
    printed = loopback_cluster.armillary("jobs", "logs", job_id, "--address", loopback_cluster.url)
    assert "hello there" in printed.stdout.splitlines()
    unknown = loopback_cluster.armillary("jobs", "status", "tinny", "--address", loopback_cluster.url)
    assert unknown.returncode == 2
    assert "unknown job 'tinny'" in unknown.stderr


def test_the_address_option_wins_over_the_environment(loopback_cluster: LoopbackCluster) -> None:
    done = loopback_cluster.armillary("jobs", "list", "--address", loopback_cluster.url, RAY_ADDRESS="127.0.0.1:1")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"RAY_AUTH_TOKEN_PATH": "", "RAY_AUTH_TOKEN": "0" * 64}, "does not accept the token given"),
        ({"RAY_AUTH_MODE": "disabled"}, "wants a token, and none was given"),
    ],
    ids=["wrong", "none"],
)
def test_a_client_without_the_token_is_refused(
    loopback_cluster: LoopbackCluster, changes: dict[str, str], problem: str
) -> None:
    done = loopback_cluster.armillary("jobs", "list", "--address", loopback_cluster.url, **changes)
    assert done.returncode == 2
    assert problem in done.stderr
    assert "RAY_AUTH_TOKEN" in done.stderr
    assert "0" * 64 not in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_doctor_reaches_the_cluster(loopback_cluster: LoopbackCluster) -> None:
    done = loopback_cluster.armillary("doctor", "--json", "--address", loopback_cluster.url)
    checks = {(check["group"], check["name"]): check for check in json.loads(done.stdout)["checks"]}
    assert checks["cluster", "ray"]["state"] == "ok"
    assert "token authentication on" in checks["cluster", "ray"]["found"]
    refused = loopback_cluster.armillary(
        "doctor", "--json", "--address", loopback_cluster.url, RAY_AUTH_MODE="disabled"
    )
    assert refused.returncode == 1
    assert "wants a token" in refused.stdout


def test_a_job_file_trains_on_the_cluster(loopback_cluster: LoopbackCluster, tmp_path: Path) -> None:
    home = tmp_path / "cluster-home"
    arguments = ["submit", "quickstart", "train.epochs=1", "name=far", "--follow", "--home", str(home)]
    done = loopback_cluster.armillary(*arguments, "--address", loopback_cluster.url)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    records = [json.loads(path.read_text()) for path in (home / "runs").glob("*/run.json")]
    assert [record["status"] for record in records] == ["finished"]
    assert records[0]["metrics"]["verification/auc"] > 0.5
