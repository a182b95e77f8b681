"""``armillary track``: send what MLflow does not have yet, and open its pages."""

from __future__ import annotations

import os
import socket
import sys
from typing import Annotated

import typer

app = typer.Typer(help="Send runs to MLflow, and open its pages.", no_args_is_help=True, add_completion=False)

_FIRST_PORT, _PORTS = 5000, 50


@app.command()
def sync(
    json_: Annotated[bool, typer.Option("--json", help="Print the outcome for programs.")] = False,
) -> None:
    """Send every run folder that is not complete in MLflow; safe to repeat."""
    from dataclasses import asdict

    from armillary.cli.console import out, print_json, print_note
    from armillary.tracking.spool import sync as send

    report = send(all=True, on_run=lambda run_id: print_note(f"sending {run_id}"))
    if json_:
        print_json(asdict(report))
    else:
        counts = f"{len(report.sent)} sent, {len(report.running)} not finished, {len(report.failed)} failed"
        out.print(counts, markup=False)
        for run_id, reason in report.failed.items():
            print_note(f"{run_id}: {reason}")
    if report.failed:
        raise typer.Exit(1)


@app.command()
def ui(
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port; the default is a free one.")] = None,
    uri: Annotated[str | None, typer.Option(help="MLflow store; the default is the one in the Armillary home.")] = None,
) -> None:
    """Open MLflow's pages on loopback; Ctrl-C ends them."""
    from armillary.cli.console import out
    from armillary.tracking.mlflow_store import artifact_root, check_uri, is_server, redact

    store = check_uri(uri, where="--uri")
    if is_server(store):
        out.print(redact(store), markup=False)
        return
    chosen = port or _free_port()
    out.print(f"MLflow: http://127.0.0.1:{chosen}  (Ctrl-C ends it)", markup=False)
    sys.stdout.flush()
    # By environment, so that no password shows in the list of processes.
    environment = {
        **os.environ,
        "MLFLOW_BACKEND_STORE_URI": store,
        "MLFLOW_DEFAULT_ARTIFACT_ROOT": artifact_root().as_uri(),
        "MLFLOW_DISABLE_TELEMETRY": os.environ.get("MLFLOW_DISABLE_TELEMETRY", "true"),
    }
    arguments = [sys.executable, "-m", "mlflow", "ui", "--host", "127.0.0.1", "--port", str(chosen), "--workers", "1"]
    os.execve(sys.executable, arguments, environment)


def _free_port() -> int:
    """The first port from MLflow's own on that nobody listens on."""
    from armillary.spec.errors import UserError

    for port in range(_FIRST_PORT, _FIRST_PORT + _PORTS):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise UserError(f"ports {_FIRST_PORT} to {_FIRST_PORT + _PORTS - 1} are all taken", hint="name one with --port")
