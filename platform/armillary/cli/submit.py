"""``armillary submit``: a job, as ``run`` takes it, on a cluster."""

from __future__ import annotations

from typing import Annotated

import typer

from armillary.cli.console import print_json, print_note
from armillary.cli.jobs import Address, AsJson, finish, follow_job

app = typer.Typer(help="Run a job on a cluster.")


@app.command()
def submit(
    job: Annotated[str, typer.Argument(help="A job file, or the name of a shipped one.", metavar="JOB")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="objective.margin=0.4 and the like.", metavar="[KEY=VALUE]...")
    ] = None,
    address: Address = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Print the job's log until it ends, and end with its exit code.")
    ] = False,
    home: Annotated[
        str | None, typer.Option(help="Armillary's folder on the cluster; ~/.armillary there.", metavar="FOLDER")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a job here, ship it with this Armillary, and run it on a Ray cluster.

    The cluster: --address, else the job's cluster.address, else RAY_ADDRESS. Its token: RAY_AUTH_MODE=token with
    RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH.
    """
    from armillary.cluster.connection import resolve_address
    from armillary.cluster.submission import CLUSTER_HOME, Cluster, prepare

    prepared = prepare(job, overrides or ())
    cluster = Cluster.at(resolve_address(address, prepared.address))
    job_id = cluster.submit(prepared, home=home or CLUSTER_HOME)
    if as_json:
        print_json({"id": job_id, "address": cluster.address})
    else:
        typer.echo(job_id)
    if follow:
        finish(follow_job(cluster, job_id))
    else:
        print_note(f"follow it: armillary jobs logs {job_id} --follow --address {cluster.address}")
