"""A real Ray cluster of one node with token authentication, started once for the tests that carry its group."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

START_SECONDS = 120
BIN = Path(sys.executable).parent
RAY_VARIABLES = (
    "RAY_ADDRESS",
    "RAY_API_SERVER_ADDRESS",
    "RAY_AUTH_MODE",
    "RAY_AUTH_TOKEN",
    "RAY_AUTH_TOKEN_PATH",
)


@dataclass(frozen=True)
class LoopbackCluster:
    """Where the cluster listens, and how a client gets in."""

    url: str
    gcs: str
    token: str
    token_file: Path
    folder: Path

    def environment(self, **changes: str) -> dict[str, str]:
        """A client's environment with the right token; a change to the empty text leaves a variable out."""
        merged = clean_environment() | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token_file)} | changes
        return {key: value for key, value in merged.items() if value}

    def armillary(self, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        """Runs the command line as a user would."""
        return run(sys.executable, "-m", "armillary", *arguments, environment=self.environment(**changes))

    def python(self, script: str, **changes: str) -> subprocess.CompletedProcess[str]:
        """Runs a script with ``cluster`` connected; Ray reads its token settings once in a process's life."""
        prelude = f"from armillary.cluster.submission import *\ncluster = Cluster.at({self.url!r})\n"
        return run(sys.executable, "-c", prelude + script, environment=self.environment(**changes))


def run(*command: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end."""
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def clean_environment() -> dict[str, str]:
    """This environment without any cluster of the user's in it, and with the tests' ``python`` first on the path."""
    kept = {key: value for key, value in os.environ.items() if key not in RAY_VARIABLES}
    return kept | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "RAY_USAGE_STATS_ENABLED": "0"}


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports: list[int] = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    return ports


@pytest.fixture(scope="session")
def loopback_cluster() -> Iterator[LoopbackCluster]:
    # Sockets below it have paths of at most 107 characters, which pytest's own folders can exceed.
    folder = Path(tempfile.mkdtemp(prefix="arm", dir=os.environ.get("RAY_TMPDIR", "/tmp")))
    gcs, dashboard, client, agent = free_ports(4)
    token_file = folder / "token"
    token = secrets.token_hex(32)
    token_file.write_text(token)
    cluster = LoopbackCluster(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{gcs}", token, token_file, folder)
    command = [str(BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=2"]
    command += [f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    command += [f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"]
    command += [f"--temp-dir={folder / 'ray'}", f"--object-store-memory={128 * 2**20}"]
    with (folder / "start.log").open("w") as log:
        process = subprocess.Popen(
            command,
            env=cluster.environment(),
            stdout=log,
            stderr=log,
            # A test run started in the background ignores interrupts, and every child would inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        _await_start(process, dashboard, folder / "start.log")
        yield cluster
    finally:
        _end(process)
        shutil.rmtree(folder, ignore_errors=True)


def _await_start(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.5)
        else:
            return
    pytest.fail(f"the cluster did not start:\n{log.read_text()[-3000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.terminate()
    _, alive = psutil.wait_procs(family, timeout=20)
    for survivor in alive:
        survivor.kill()
    process.wait(timeout=20)
